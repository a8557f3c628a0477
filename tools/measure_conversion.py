"""Peak memory of converting a large model in and out: python tools/measure_conversion.py --folder EMPTY_FOLDER [--layers 24]

Writes a Llama of random bfloat16 weights (1.35 B parameters, 2.7 GB by default) tensor by tensor, converts it to a checkpoint and back,
each in a process of its own, and prints what each took beyond what Python and its imports take. Needs three times the model on disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from megarlhf.conversion.configuration import architecture_from_hf
from megarlhf.conversion.families import FAMILIES
from megarlhf.conversion.forms import their_shapes
from megarlhf.models.parameters import parameter_specs
from megarlhf.storage.tensors import LazyTensor, write_tensors

CHILD = """
import resource, sys
from megarlhf.conversion.command import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
status = main(["--from", sys.argv[1], "--to", sys.argv[2]])
print("KiB", before, peak())
sys.exit(status)
"""


def main() -> None:
    """Write, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    largest, total = write_model(options.folder / "model", options.layers)
    print(f"a model of {total / 1e9:.2f} GB, its largest tensor {largest / 1e6:.0f} MB")
    for source, target, what in (("model", "checkpoint", "in"), ("checkpoint", "back", "out")):
        start = time.perf_counter()
        command = [sys.executable, "-c", CHILD, str(options.folder / source), str(options.folder / target)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        before, peak = (1024 * int(word) / 1e6 for word in done.stdout.splitlines()[-1].split()[1:])
        seconds = time.perf_counter() - start
        print(f"{what}: peak {peak:.0f} MB, {before:.0f} MB of it after the imports; {peak - before:.0f} MB for the model; {seconds:.0f} s")


def write_model(folder: Path, layers: int) -> tuple[int, int]:
    """Write the model; returns (bytes of its largest tensor, of all)."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    architecture, family = architecture_from_hf(config), FAMILIES["llama"]
    tensors = {}
    for spec in parameter_specs(architecture, "lm"):
        source = family.source(spec.name)
        for name, shape in zip(source.names, their_shapes(source.form, spec.shape, architecture), strict=True):
            make = functools.partial(torch.randn, shape, dtype=torch.bfloat16)
            tensors[name] = LazyTensor(shape, torch.bfloat16, make)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    sizes = [tensor.bytes for tensor in tensors.values()]
    return max(sizes), sum(sizes)


if __name__ == "__main__":
    main()
