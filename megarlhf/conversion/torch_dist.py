"""Megatron's torch_dist checkpoints: which tensor lies where, and how a part of one is read. Nothing in them is run.

    iter_0000100/
      metadata.json     {"sharded_backend": "torch_dist", ...}
      .metadata         a pickle: the shape and chunks of every tensor, and where each chunk's bytes lie
      common.pt         a pickle in a zip file: the training's arguments, counters, ...; since megatron-core 0.19 among the tensors
      __0_0.distcp ...  tensors as torch.save writes them, one after the other
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.conversion.inert_pickle import Record, load_inert
from megarlhf.storage.files import read_json

METADATA, COMMON, BACKEND, LATEST = ".metadata", "common.pt", "metadata.json", "latest_checkpointed_iteration.txt"
COMMON_OBJECT = "common_state/shard_0_1"
_DCP = "torch.distributed.checkpoint"
METADATA_RECORDS = frozenset(
    [
        *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
        *(f"{_DCP}.metadata.{name}" for name in ("BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        *(f"{_DCP}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
    ]
)
"""All that torch and megatron-core write into .metadata."""
COMMON_RECORDS = frozenset(
    [
        "argparse.Namespace",
        "types.SimpleNamespace",
        "torch.device",
        *(f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
        *(f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")),
        "torch.storage.UntypedStorage",
    ]
)
"""What the arguments in common.pt are made of, besides classes of Megatron's own."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    name: str
    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...] = field(repr=False)

    def read(self, layer: int | None = None) -> Tensor:
        """All of it, or one layer of a tensor whose first dimension is that of layers; a chunk's bytes are held besides.

        ValueError where the file is not what .metadata says, or chunks are missing.
        """
        first, rest = (slice(layer, layer + 1), self.shape[1:]) if layer is not None else (slice(0, self.shape[0]), self.shape[1:])
        out = torch.empty((first.stop - first.start, *rest), dtype=self.dtype)
        filled = 0
        for chunk in self.chunks:
            start, stop = max(first.start, chunk.offsets[0]), min(first.stop, chunk.offsets[0] + chunk.sizes[0])
            if start < stop:
                part = self._values(chunk)[start - chunk.offsets[0] : stop - chunk.offsets[0]]
                inner = [slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                out[(slice(start - first.start, stop - first.start), *inner)] = part
                filled += part.numel()
        if filled != out.numel():
            raise ValueError(f"{self.folder / METADATA}: {filled} of the {out.numel()} elements of {self.name} are in the files")
        return out if layer is None else out[0]

    def _values(self, chunk: Chunk) -> Tensor:
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                saved = io.BytesIO(file.read(chunk.length))
            values = torch.load(saved, map_location="cpu", weights_only=True)
        except Exception as error:  # what is damaged makes torch's reader fail in any way
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} cannot be read where {self.name} should be: {why}") from error
        if not isinstance(values, Tensor) or tuple(values.shape) != chunk.sizes or values.dtype != self.dtype:
            raise ValueError(f"{path} holds another thing than {METADATA} says of {self.name}: {getattr(values, 'shape', values)}")
        return values


def checkpoint_folder(path: Path) -> Path | None:
    """The folder of a torch_dist checkpoint that `path` is, or is the parent of; None where it is neither.

    ValueError where the parent's newest is not there.
    """
    if (path / METADATA).is_file():
        return path
    if not (path / LATEST).is_file():
        return None
    latest = (path / LATEST).read_bytes().decode("utf-8", "replace").strip()
    name = f"iter_{int(latest):07d}" if latest.isdecimal() and len(latest) < 10 else "release"
    if not (path / name / METADATA).is_file():
        raise ValueError(f"{path / LATEST} says {latest[:40]!r}, and {path / name} is no torch_dist checkpoint: it has no {METADATA}")
    return path / name


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> every tensor of a checkpoint, none of them read. ValueError where .metadata is damaged, or names what it must not."""
    path, metadata = folder / METADATA, _metadata(folder)
    try:
        places = {}
        for index, info in metadata.storage_data.items():
            if getattr(index, "offset", None) is not None:
                places[index.fqn, tuple(index.offset)] = info
        return {
            name: _tensor(folder, name, entry, places) for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "chunks")
        }
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it does not describe tensors as torch does ({error})") from error


def _metadata(folder: Path) -> Any:
    if (folder / BACKEND).is_file() and (backend := read_json(folder / BACKEND).get("sharded_backend")) != "torch_dist":
        raise ValueError(f"{folder / BACKEND}: sharded_backend {backend!r} is not supported, only 'torch_dist'")
    path = folder / METADATA
    with path.open("rb") as file:
        return load_inert(file, path, records=METADATA_RECORDS)


def _tensor(folder: Path, name: str, entry: Record, places: Mapping[tuple, Record]) -> StoredTensor:
    dtype = entry.properties.parts[0] if entry.properties.parts else entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or not isinstance(name, str):
        raise ValueError(f"{name!r} is of the kind {dtype!r}")
    shape = _numbers(entry.size)
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if len(offsets) != len(shape) or any(a + b > c for a, b, c in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {name} lies outside of it")
        chunks.append(Chunk(offsets, sizes, *_place(name, places[name, offsets])))
    return StoredTensor(name, folder, shape, dtype, tuple(chunks))


def _place(name: str, info: Record) -> tuple[str, int, int]:
    """(file, first byte, bytes) of what is stored."""
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{name} is compressed, which is not supported")
    file, start, length = info.relative_path, *_numbers((info.offset, info.length))
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"{name} lies in {file!r}, which is not the name of a file beside it")
    return file, start, length


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and number >= 0 for number in numbers) or math.prod(numbers) >= 2**62:
        raise ValueError(f"{numbers} are no sizes")
    return numbers


def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the training that wrote a checkpoint, by name. ValueError where there are none, or they are damaged."""
    path, start, length = _common(folder)
    try:
        with path.open("rb") as file:
            file.seek(start)
            saved = io.BytesIO(file.read(length))
        with zipfile.ZipFile(saved) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(name)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    common = load_inert(io.BytesIO(content), path, records=COMMON_RECORDS, packages=("megatron.", "transformer_engine."))
    if isinstance(common, list) and len(common) == 1:  # as objects among tensors are
        [common] = common
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, Record):
        raise ValueError(f"{path} holds no arguments of a Megatron-LM training, from which the model's sizes are taken")
    return {name: value for name, value in vars(arguments).items() if name != "parts"}


def _common(folder: Path) -> tuple[Path, int, int]:
    """(file, first byte, bytes) of what is no tensor: common.pt, or from megatron-core 0.19 on an object among the tensors."""
    stored = {} if (folder / COMMON).exists() else getattr(_metadata(folder), "storage_data", None)
    try:
        for index, info in (stored or {}).items():
            if index.fqn == COMMON_OBJECT:
                file, start, length = _place(COMMON_OBJECT, info)
                return folder / file, start, length
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / METADATA} is damaged: it does not say where {COMMON_OBJECT} lies ({error})") from error
    return folder / COMMON, 0, -1
