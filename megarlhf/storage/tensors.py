"""Files of tensors: the safetensors format, which holds numbers and no code, written as a stream with its checksum.

Reading is the safetensors package's; writing is here because that package first copies all tensors into memory as bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
BUFFER_BYTES = 16 * 2**20
"""What passes through the host at a time."""


@dataclass(frozen=True)
class Seal:
    """Size and BLAKE2b checksum of a file, by which damage is found."""

    bytes: int
    blake2b: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
    """Write `tensors` from whatever device, `BUFFER_BYTES` at a time, and synchronise the file. OSError where that fails."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for tensor in tensors.values():
            for part in tensor.detach().reshape(-1).view(torch.uint8).split(BUFFER_BYTES):
                on_host = part.cpu().numpy()
                file.write(on_host)
                digest.update(on_host)
        file.flush()
        os.fsync(file.fileno())
    return Seal(8 + len(text) + end, digest.hexdigest())


def damage(path: Path, seal: Seal) -> str | None:
    """What is wrong with a file that `seal` was made of, in words; None where it is as it was written. Reads all of it."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != seal.bytes:
            return f"{path} is damaged: it has {size} bytes, and {seal.bytes} were written"
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while part := file.read(BUFFER_BYTES):
                digest.update(part)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None if digest.hexdigest() == seal.blake2b else f"{path} is damaged: its content is not what was written (checksum)"


class TensorFile:
    """A file of tensors, opened for reading parts of them."""

    def __init__(self, path: Path) -> None:
        """ValueError, with the file's name, where it is not whole or not such a file."""
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.names = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a file of tensors: {error}") from error

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of a flat tensor. ValueError where there is no such tensor."""
        if name not in self.names:
            raise ValueError(f"{self.path} holds no tensor {name}")
        return self._file.get_slice(name)[start:stop]
