"""Files that are whole or not there, and what is said of those that are not."""

import json
import os

import pytest
import torch

from megarlhf.storage.files import read_json, write_atomically
from megarlhf.storage.tensors import BUFFER_BYTES, LazyTensor, TensorFile, damage, write_tensors


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, '{"a": "\u00e4"}')
    assert read_json(path) == {"a": "\u00e4"}
    write_atomically(path, b"{}")
    assert read_json(path) == {} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not whole JSON"),
        (b'{"a": 1', "not whole JSON"),
        (b"\xff\xfe{}", "not whole JSON"),
        (b"[1]", "it holds list, not dict"),
        (b"null", "it holds NoneType, not dict"),
        (b"[" * 100000, "not whole JSON"),
        (b"1" * 10000, "not whole JSON"),
    ],
)
def test_a_torn_file_is_named(tmp_path, content, said):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"state.json is damaged: .*{said}"):
        read_json(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read: "):
            read_json(path)


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "a.json") == {}


TENSORS = {
    "a": torch.arange(10, dtype=torch.float32),
    "b": torch.randn(3, 4).bfloat16(),
    "empty": torch.zeros(0),
    "strided": torch.arange(12.0).view(3, 4).T,
    "long": torch.arange(BUFFER_BYTES // 8 + 3),
}


def test_tensors_come_back_and_other_readers_read_them(tmp_path):
    from safetensors.torch import load_file

    seal = write_tensors(tmp_path / "t.safetensors", TENSORS, {"what": "ever"})
    assert damage(tmp_path / "t.safetensors", seal) is None
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    file = TensorFile(tmp_path / "t.safetensors")
    assert file.metadata == {"what": "ever"} and torch.equal(file.read("a", 3, 7), TENSORS["a"][3:7])
    with pytest.raises(ValueError, match="t.safetensors holds no tensor c"):
        file.read("c", 0, 1)


def test_tensors_are_made_one_at_a_time_as_they_are_written(tmp_path):
    from safetensors.torch import load_file

    made, path = [], tmp_path / "t.safetensors"

    def make(name, tensor):
        made.append((name, path.stat().st_size if path.exists() else None))
        return tensor

    odd = torch.arange(3, dtype=torch.bfloat16)  # what follows would begin in the middle of one of its elements
    given = {"a": odd, "b": torch.randn(2, 5), "c": odd + 1, "d": torch.randn(1, dtype=torch.float64)}
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda n=name, t=t: make(n, t)) for name, t in given.items()}
    seal = write_tensors(path, lazy, {})
    assert [name for name, _ in made] == ["d", "b", "a", "c"], "each begins at a multiple of its element's size"
    assert damage(path, seal) is None
    read, file = load_file(path), TensorFile(path)
    for name, tensor in given.items():
        assert torch.equal(read[name], tensor) and torch.equal(file.read(name), tensor)
        assert file.entries[name].offset % tensor.element_size() == 0
    assert torch.equal(file.read("b", 3, 7), given["b"].view(-1)[3:7])
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="t.safetensors cannot be read: it ends before the values of c do"):
        file.read("c")


def test_every_flipped_byte_and_every_cut_is_found(tmp_path):
    path = tmp_path / "t.safetensors"
    seal = write_tensors(path, {"a": torch.arange(5.0)}, {})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "t.safetensors is damaged: its content is not what was written" in damage(path, seal)
        path.write_bytes(whole[:place])
        assert f"it has {place} bytes, and {len(whole)} were written" in damage(path, seal)
    path.unlink()
    assert damage(path, seal) == f"{path} is missing"


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 100, (10**15).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_what_is_not_a_file_of_tensors_is_named(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="t.safetensors cannot be read as a file of tensors"):
        TensorFile(path)
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00" + json.dumps({}).encode() + b" " * 6 + os.urandom(4))
    with pytest.raises(ValueError, match="t.safetensors cannot be read as a file of tensors"):
        TensorFile(path)
