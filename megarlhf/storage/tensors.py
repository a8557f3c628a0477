"""Files of tensors: the safetensors format, which holds numbers and no code, written as a stream with its checksum.

The safetensors package checks a file; the bytes are written here because it first copies all tensors into memory, and read here
because it maps the file, whose pages then count as the process's.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
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
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BUFFER_BYTES = 16 * 2**20
"""What passes through the host at a time."""


@dataclass(frozen=True)
class Seal:
    """Size and SHA-256 checksum of a file, by which damage is found. (Of what Python brings, processors have instructions for this one.)"""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and let go of then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str]) -> Seal:
    """Write `tensors` from whatever device, `BUFFER_BYTES` at a time, and synchronise the file. OSError where that fails."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)  # each begins at a multiple of its element's size
    for name, tensor in ordered:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name, tensor in ordered:
            for part in _made(name, tensor).detach().reshape(-1).view(torch.uint8).split(BUFFER_BYTES):
                on_host = part.cpu()
                file.write(bytes_of(on_host))
                digest.update(bytes_of(on_host))
        file.flush()
        os.fsync(file.fileno())
    return Seal(8 + len(text) + end, digest.hexdigest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, for as long as it lives.

    Not by way of numpy, after which torch would never again let the tensor's storage give up its memory (engine/offload.py).
    """
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else memoryview(b"")


def damage(path: Path, seal: Seal) -> str | None:
    """What is wrong with a file that `seal` was made of, in words; None where it is as it was written. Reads all of it."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != seal.bytes:
            return f"{path} is damaged: it has {size} bytes, and {seal.bytes} were written"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(BUFFER_BYTES):
                digest.update(part)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None if digest.hexdigest() == seal.sha256 else f"{path} is damaged: its content is not what was written (checksum)"


@dataclass(frozen=True)
class TensorEntry:
    """What a file says of one of its tensors."""

    dtype: torch.dtype | None
    """None where it is none of `DTYPES`: such a tensor is not read."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


class TensorFile:
    """A file of tensors, for reading parts of them: what is read is in memory, and nothing else of the file."""

    def __init__(self, path: Path) -> None:
        """ValueError, with the file's name, where it is not whole or not such a file."""
        self.path = path
        try:
            with safe_open(str(path), framework="pt") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a file of tensors: {error}") from error
        header.pop("__metadata__", None)
        self.entries = {
            name: TensorEntry(DTYPES.get(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start .. stop - 1 of a tensor, flat; all of it, in its shape, without `stop`.

        ValueError where there is no such tensor, or its values cannot be read.
        """
        entry = self._entry(name)
        out = torch.empty(entry.shape if stop is None else (stop - start,), dtype=entry.dtype)
        self.read_into(out.view(-1), name, start)
        return out

    def read_into(self, out: Tensor, name: str, start: int = 0) -> None:
        """Set a contiguous host tensor `out` [n], of the tensor's dtype, to its elements from `start` on. ValueError as for `read`."""
        entry = self._entry(name)
        into = bytes_of(out)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.offset + start * entry.dtype.itemsize)
                while into and (count := file.readinto(into)):
                    into = into[count:]
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if into:
            raise ValueError(f"{self.path} cannot be read: it ends before the values of {name} do")

    def _entry(self, name: str) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None or entry.dtype is None:
            raise ValueError(f"{self.path} holds no tensor {name}" + (" of a kind that can be read" if entry else ""))
        return entry


def _made(name: str, tensor: Tensor | LazyTensor) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor
    made = tensor.make()
    assert (tuple(made.shape), made.dtype) == (tensor.shape, tensor.dtype), f"{name} was announced as {tensor}, and is {made.shape}"
    return made
