"""From a Megatron-LM checkpoint of the form torch_dist to a checkpoint of ours.

Our parameters have megatron-core's names and its order of rows, so that a tensor of theirs is one of ours but for three things:
all layers of a parameter are one tensor, with the layers as its first dimension, as a rule; norms that Transformer Engine fuses
have the names of the layers that they are fused into; and the vocabulary is padded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.conversion.incoming import PART_BYTES, tokenizer_beside, write_incoming
from megarlhf.conversion.megatron_arguments import architecture_from_megatron
from megarlhf.conversion.torch_dist import COMMON, METADATA, StoredTensor, read_arguments, read_tensors
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import TIED_NAME, Head, ParameterSpec, parameter_specs

FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Our norms -> what they are called where they are fused into the layer behind them."""
TRUNK = ("embedding.", "decoder.", "output_layer.", "mtp.", "model.")
"""What a model's tensors begin with; the optimizer's and the loop's begin otherwise."""
LAYERS = "decoder.layers."
VOCABULARY = (TIED_NAME, "output_layer.weight")
SHOWN = 5


@dataclass(frozen=True)
class MegatronModel:
    """A model in a torch_dist checkpoint, of which nothing is read yet."""

    folder: Path
    architecture: Architecture
    head: Head
    places: Mapping[str, tuple[StoredTensor, int | None]]
    """Our name -> their tensor, and the layer of it that is meant where it holds all layers."""

    def dtype(self, spec: ParameterSpec) -> torch.dtype:
        """What one of our parameters is held in: theirs."""
        return self.places[spec.name][0].dtype

    def read(self, spec: ParameterSpec) -> Tensor:
        """One of our parameters, whole, vocabulary padded."""
        tensor, layer = self.places[spec.name]
        values = tensor.read(layer)
        return F.pad(values, (0, 0, 0, spec.shape[0] - values.shape[0])) if spec.name in VOCABULARY else values


def from_megatron(
    folder: Path, target: Path, *, tokenizer: Path | None, eos_token: str | None = None, part_bytes: int = PART_BYTES
) -> list[str]:
    """Convert the checkpoint `folder` (iter_0000100, say) to one of ours; returns what is to be said of it. See `write_incoming`."""
    model = read_megatron_folder(folder)
    tokenizer = tokenizer or tokenizer_beside(folder)
    return write_incoming(model, target, kind="Megatron-LM", tokenizer=tokenizer, eos_token=eos_token, part_bytes=part_bytes)


def read_megatron_folder(folder: Path) -> MegatronModel:
    """The model in `folder`. ValueError names what is missing, left over, misshapen or not supported, with its file."""
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name.startswith(TRUNK)}
    if TIED_NAME not in tensors or len(tensors[TIED_NAME].shape) != 2:
        raise ValueError(f"{folder / METADATA}: it holds no {TIED_NAME} of two dimensions, which every GPT model of Megatron-LM has")
    try:
        architecture = architecture_from_megatron(read_arguments(folder), vocab_rows=tensors[TIED_NAME].shape[0])
        if architecture.num_layers > max((tensor.shape[0] for tensor in tensors.values() if tensor.shape), default=0) + len(tensors):
            raise ValueError(f"num_layers {architecture.num_layers} are more than the files hold")
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(folder)) else f"{folder / COMMON}: {error}") from error
    places, problems = _places(folder, tensors, architecture)
    if problems:
        more = f"\nand {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n".join(problems[:SHOWN]) + more)
    return MegatronModel(folder, architecture, "lm", places)


def _places(
    folder: Path, tensors: Mapping[str, StoredTensor], a: Architecture
) -> tuple[dict[str, tuple[StoredTensor, int | None]], list[str]]:
    """(each of our parameters -> where it lies, what stands between the files and the arguments)."""
    places, problems = {}, []
    for spec in parameter_specs(a, "lm"):
        found = next(((tensors[name], layer) for name, layer in _names(spec.name) if name in tensors), None)
        if found is None:
            problems.append(f"{folder / METADATA}: it holds no {spec.name}, which the arguments in {COMMON} need")
            continue
        tensor, layer = found
        rows = a.vocab_size if spec.name in VOCABULARY else spec.shape[0]
        shape = (*(() if layer is None else (a.num_layers,)), rows, *spec.shape[1:])
        if tensor.shape != shape:
            problems.append(f"{folder / METADATA}: {tensor.name} has the shape {list(tensor.shape)}, and the arguments need {list(shape)}")
        elif not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            problems.append(f"{folder / METADATA}: {tensor.name} is of a kind that is not supported ({tensor.dtype})")
        places[spec.name] = found
    used = {tensor.name for tensor, _ in places.values()}
    for name, tensor in tensors.items():
        if name not in used and "_extra_state" not in name and math.prod(tensor.shape):
            problems.append(f"{folder / METADATA}: {name} is left over: the arguments in {COMMON} describe no such tensor")
    return places, problems


def _names(name: str) -> list[tuple[str, int | None]]:
    """(their name, the layer where it is of all layers) under which one of our parameters may lie."""
    if not name.startswith(LAYERS):
        return [(name, None)]
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    fused = next((theirs + rest.removeprefix(ours) for ours, theirs in FUSED.items() if rest.startswith(ours)), rest)
    return [
        found
        for kind in dict.fromkeys((rest, fused))
        for found in ((f"{LAYERS}{kind}", int(number)), (f"{LAYERS}{number}.{kind}", None))
    ]
