"""GPUs and what connects them, in numbers of their data sheets, and how much of these programs reach."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Sources: NVIDIA's data sheets of the A100 (2021), H100 SXM5 (2023) and H200 SXM (2024): dense bf16, memory bandwidth, NVLink in one
    direction (half of the printed sum of both). Memory is what torch reports of the card, a little less than its name says. Between
    nodes: one InfiniBand adapter per GPU, HDR (200 Gb/s) beside A100 and NDR (400 Gb/s) beside H100 and H200, as in DGX systems.
    """

    name: str
    memory_bytes: float
    flops: float
    """Dense bf16 per second."""
    memory_bandwidth: float
    """Bytes per second."""
    inside: float
    """Bytes per second from one GPU to others of its node."""
    between: float
    """Bytes per second from one GPU to those of other nodes."""
    host: float
    """Bytes per second from one GPU to pinned host memory, in one direction: PCIe of 16 lanes, generation 4 or 5."""
    matmul_share: float
    """Of `flops` that large matrix products reach: cuBLAS on an A100 about 250 of 312 TFLOP/s; an H100 at its power limit, 650 to
    700 of 989."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-40gb", memory_bytes=39.4 * GIB, flops=312e12, memory_bandwidth=1555e9,
            inside=300e9, between=25e9, host=32e9, matmul_share=0.8,
        ),  # fmt: skip
        Gpu(
            name="a100-80gb", memory_bytes=79.2 * GIB, flops=312e12, memory_bandwidth=2039e9,
            inside=300e9, between=25e9, host=32e9, matmul_share=0.8,
        ),  # fmt: skip
        Gpu(
            name="h100-80gb", memory_bytes=79.1 * GIB, flops=989e12, memory_bandwidth=3350e9,
            inside=450e9, between=50e9, host=64e9, matmul_share=0.68,
        ),  # fmt: skip
        Gpu(
            name="h200", memory_bytes=139.8 * GIB, flops=989e12, memory_bandwidth=4800e9,
            inside=450e9, between=50e9, host=64e9, matmul_share=0.68,
        ),  # fmt: skip
    )
}
MEMORY_SHARE = 0.85
"""Of the memory bandwidth that kernels reach."""
LINK_SHARE = 0.8
"""Of a link's bandwidth that NCCL's rings reach with large messages."""
CALL_SECONDS = 20e-6
"""A collective or message takes this long whatever its size."""
KERNEL_SECONDS = 5e-6
"""What the host takes to start one kernel: without CUDA graphs small ones wait for it."""
RESERVED_BYTES = 5e9
"""CUDA's context, NCCL's buffers and the allocator's gaps: 4 to 6 GB in practice."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    inside: float
    """Bytes per second, as `Gpu.inside`, or as the user measured it."""
    between: float
    reserved_bytes: float = RESERVED_BYTES

    @property
    def num_ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU for tensors."""
        return self.gpu.memory_bytes - self.reserved_bytes

    def __str__(self) -> str:
        inside, between = self.inside * 8 / GB, self.between * 8 / GB
        links = f"{inside:.0f} Gb/s inside" + (f", {between:.0f} Gb/s between nodes" if self.nodes > 1 else "")
        return f"{self.nodes} x {self.gpus_per_node} {self.gpu.name}, {links}"
