"""What is done otherwise where there is a GPU, as far as it can be seen without one."""

import concurrent.futures
import contextlib
import os
import sys
import types
from unittest import mock

import pytest
import torch

from megarlhf.data import dali
from megarlhf.models import attention
from megarlhf.parallel import groups, side_stream
from megarlhf.planning import plan

CUDA = torch.device("cuda", 0)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)): ...


def of_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
): ...  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "capability", "has"), [(None, (9, 0), False), (of_2_10, (9, 0), False), (of_2_11, (9, 0), False), (of_2_12, (9, 0), True),
                                      (of_2_12, (8, 0), True), (of_2_12, (7, 5), False)],
)  # fmt: skip
def test_the_varlen_kernel_is_taken_where_torch_and_the_gpu_have_all_that_is_asked_of_it(kernel, capability, has):
    module = None if kernel is None else types.SimpleNamespace(varlen_attn=kernel)
    attention._runs_varlen_kernel.cache_clear()
    with mock.patch.dict(sys.modules, {"torch.nn.attention.varlen": module}):
        with mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability):
            found = {size: attention.has_varlen_kernel(CUDA, torch.bfloat16, size) for size in (64, 100, 256, 264)}
            assert found == {64: has, 100: False, 256: has, 264: False}
            assert not attention.has_varlen_kernel(CUDA, torch.float32, 64)
    attention._runs_varlen_kernel.cache_clear()


def test_nothing_is_uploaded_for_groups_of_rows_that_the_kernel_does_not_need():
    with mock.patch.object(attention, "_RowsTogether") as made:
        rows = attention.PackedRows((3, 2, 9), torch.device("cpu"))
        assert not made.called and rows.positions.tolist() == [0, 1, 2, 0, 1, *range(9)]
        assert len(rows._groups) == made.call_count == 2


def test_a_gpu_multiplies_float32_as_float32_whatever_its_image_says():
    properties = types.SimpleNamespace(uuid="GPU-1")
    instead = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": mock.Mock()}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 has it
        with mock.patch.multiple(torch.cuda, **instead, get_device_properties=lambda index: properties):
            assert groups._choose_device(3).endswith("GPU-1")
        assert torch.get_float32_matmul_precision() == "highest" and instead["set_device"].call_args.args == (1,)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("num_bytes", [1, 9, 16 * 2**20, 3 * 2**30 + 5, 5_637_144_577])
def test_what_rests_takes_no_more_pinned_memory_than_it_needs(num_bytes):
    """torch rounds each pinned tensor up to a power of two."""
    with mock.patch.object(side_stream, "host_buffer", lambda size: size):
        pieces = side_stream.host_buffers(num_bytes)
    taken = sum(1 << (size - 1).bit_length() for size in pieces)
    assert sum(pieces) == num_bytes <= taken < num_bytes + 16 * 2**20 and len(pieces) < 12


class PipelineOfDali:
    """What megarlhf asks of nvidia.dali's Pipeline; on a device it gives tensors that no host can read."""

    def __init__(self, *, device_id, **unused):
        self.device_id, self.number = device_id, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception): ...

    def set_outputs(self, source):
        self.source = source

    def build(self): ...

    def run(self, stream=None):
        rows = torch.from_numpy(self.source(types.SimpleNamespace(iteration=self.number)))[None]
        self.number += 1
        found = rows if self.device_id is None else rows.to("meta")
        return (types.SimpleNamespace(as_tensor=lambda: found),)


def test_rows_that_dali_reads_stay_on_the_host_beside_a_gpu():
    """Where micro-batches are packed: rows on a device could not be put beside a batch's others, nor be pinned."""
    corpus = types.SimpleNamespace(seq_len=4, row=lambda row: torch.arange(4).numpy() + row)
    order = types.SimpleNamespace(rows=lambda start, n: [(0, row) for row in range(start, start + n)])
    external = types.SimpleNamespace(external_source=lambda batches, **how: mock.Mock(side_effect=batches, gpu=lambda: batches))
    module = types.SimpleNamespace(Pipeline=PipelineOfDali, fn=external, types=types.SimpleNamespace(INT64=None))
    gpu = {"is_available": lambda: True, "current_device": lambda: 0, "current_stream": lambda: None}
    with mock.patch.dict(sys.modules, {"nvidia.dali": module, "nvidia": types.SimpleNamespace(dali=module)}):
        with mock.patch.multiple(torch.cuda, **gpu):
            loader = dali.DaliLoader(dali.BlendedText((corpus,), order))
            found = [loader.rows(start, 2) for start in (0, 2, 7)]
    assert [rows.tolist() for rows in found] == [[[row + at for at in range(4)] for row in (n, n + 1)] for n in (0, 2, 7)]


def test_dry_runs_see_no_gpu():
    """Megatron builds what it is to build on the GPU where it sees one, and a dry run's tensors are to have no values."""
    seen = []

    @contextlib.contextmanager
    def pool(*unused, **how):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        yield types.SimpleNamespace(map=lambda function, hands: [])

    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "0,1"}), mock.patch.object(concurrent.futures, "ProcessPoolExecutor", pool):
        assert plan.dry_runs([None]) == [] and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert seen == [""]
