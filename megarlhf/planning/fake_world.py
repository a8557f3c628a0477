"""One rank of a world that does not exist: the real program on torch's meta device, whose tensors have sizes and no values.

This is the only place that knows what has to be told to a program that runs so; everything is as before afterwards. What is
replaced: the device; megatron's scratch buffer; two questions of megatron and torch about the kind of a tensor's device; the
attention kernel, which torch chooses by device; how reduce-scatters are sent together; and, in `Meter`, collectives and what the
host reads from the device.
Host tensors (token rows, masks, row numbers) are real throughout.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
from collections.abc import Iterator, Mapping
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarlhf.models import linear
from megarlhf.models.parameters import parameter_specs
from megarlhf.parallel import platform, side_stream
from megarlhf.parallel.alarm import Alarm
from megarlhf.parallel.groups import World, prepare_megatron_globals
from megarlhf.resharding.execute import Resharder

DEVICE = torch.device("meta")


@contextlib.contextmanager
def fake_world(rank: int, size: int) -> Iterator[World]:
    """Rank `rank` of `size`, for as long as the context lasts; nothing is sent and nothing computed.

    Models must be built and run within it, under a `Meter`. RuntimeError where this process is in a world already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a world already: a dry run needs one of its own")
    platform.prepare_megatron()
    store = FakeStore()
    dist.init_process_group("cpu:fake,meta:fake", store=store, rank=rank, world_size=size)
    try:
        with contextlib.ExitStack() as stack:
            for target, name, replacement in _replacements():
                stack.enter_context(mock.patch.object(target, name, replacement))
            prepare_megatron_globals()
            timeout = datetime.timedelta(minutes=30)
            yield World(rank=rank, size=size, local_rank=0, device=DEVICE, timeout=timeout, alarm=Alarm(store, rank), store=store)
    finally:
        dist.destroy_process_group()


def _replacements() -> list[tuple[object, str, object]]:
    return [
        (platform, "CPU", DEVICE),
        (torch.Tensor, "type", _cuda_type),
        (importlib.import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *args, **kwargs: None),
        (F, "scaled_dot_product_attention", _attention),
        (linear, "_float32_product", _float32_product),
        (dist, "all_gather_object", _same_everywhere),
        (parallel_state, "_GLOBAL_MEMORY_BUFFER", None),  # another world's would be as large as the widest model that it has seen
        (Resharder, "_agree_on_dtypes", _one_dtype),
        (side_stream, "host_buffer", _host_buffer),
        (param_and_grad_buffer, "_coalescing_manager", _sent_together),
    ]


_plain_type = torch.Tensor.type


def _cuda_type(tensor: Tensor, *args: object, **kwargs: object) -> object:
    """Megatron looks for "torch.cuda.FloatTensor" and the like."""
    answer = _plain_type(tensor, *args, **kwargs)
    return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """The kernels that CUDA takes: flash attention, which knows grouped heads, and with a mask the memory-efficient one."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, False)[0]


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """What CUDA does."""
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def _one_dtype(resharder: Resharder, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, int]:
    """All weights of a language model have the precision of its own."""
    size = next(iter(source.values())).element_size()
    return {spec.name: size for spec in parameter_specs(resharder.plan.architecture, resharder.plan.head)}


def _host_buffer(num_bytes: int) -> Tensor:
    """As long as it should be, in a byte of memory."""
    return torch.empty(1, dtype=torch.uint8).expand(num_bytes)


def _same_everywhere(gathered: list, value: object, group: object = None) -> None:
    gathered[:] = [value] * len(gathered)


@contextlib.contextmanager
def _sent_together(*args: object, **kwargs: object) -> Iterator[_Done]:
    yield _Done()


class _Done:
    def wait(self) -> None:
        """Nothing was sent."""
