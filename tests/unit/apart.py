"""A dry run that refuses what a GPU and NCCL refuse, on tensors without values, which would put up with it."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megarlhf.planning.fake_world import DEVICE
from megarlhf.planning.meter import Meter

aten = torch.ops.aten
CROSSINGS = {aten.copy_.default, aten._to_copy.default}
"""From the host to the device and back: all others want their tensors together, but for host numbers of no dimension."""
OF_NCCL = {torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}


class ApartFromHost(Meter):
    """Raises AssertionError where a host tensor is put to a device tensor, or into a message, or a message is in pieces."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        here = [tensor.device == DEVICE for tensor in tensors]
        if func.namespace == "c10d":
            described = [(str(tensor.device), tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) for tensor in tensors]
            assert all(here) and all(whole and dtype in OF_NCCL for *_, dtype, whole in described), f"{func}: {described}"
        elif any(here) and not all(here) and func not in CROSSINGS:
            strangers = [tuple(tensor.shape) for tensor, device in zip(tensors, here, strict=True) if not device and tensor.dim()]
            assert not strangers, f"{func} of device tensors is given host tensors of shapes {strangers}"
        return super().__torch_dispatch__(func, types, args, kwargs)
