"""CPU or CUDA: the one place that knows.

megatron-core is written for CUDA: ``torch.cuda.current_device()``, ``device="cuda"`` and ``tensor.type() ==
"torch.cuda.FloatTensor"`` stand in its training path. Where no CUDA device is available, `prepare_megatron` lets its
modules see a torch whose ``cuda`` is the CPU. Only megatron's own modules see it; torch itself stays as it is, with one
exception: `Tensor.type` answers "torch.cuda..." to callers inside megatron. Where CUDA is available nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import mmap
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for its parameters (glibc's malloc.h)."""
MAPPED_BYTES = 32 * 2**20
"""What is at least so large glibc maps anew whatever it is told: its largest threshold."""
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)
MEGATRON_MODULES = (
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)


def device() -> torch.device:
    """The device of this process: its current CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The collective backend that goes with `device`: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def keep_freed_memory() -> None:
    """On the CPU, let the allocator keep what is freed instead of giving it back to the system.

    By default glibc maps every large tensor anew, and first touching its pages costs about as much as an elementwise
    operation on it. Where there is no such setting nothing happens.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def multiply_float32_in_full() -> None:
    """On CUDA, have float32 matrices multiplied in float32: NVIDIA's images tell torch to round their numbers to TF32's 10 bits first.

    They set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which torch reads when it is loaded.
    """
    torch.set_float32_matmul_precision("highest")


def give_back_freed_memory() -> None:
    """On CUDA, give what the allocator keeps back to the device: what comes next cuts it otherwise. A CPU's is used again as it is."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ask_for_large_pages(tensor: torch.Tensor) -> None:
    """On the CPU, have a new tensor that is mapped anew in spite of `keep_freed_memory` touched 2 MiB at a time, not 4 KiB.

    The system may do so or not; nothing but time depends on it.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < MAPPED_BYTES or not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    first, stop = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((stop - first) * page), mmap.MADV_HUGEPAGE)


def synchronize() -> None:
    """Wait until the device has done what the current stream was given, so that wall clocks tell the truth; copies beside it go on."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """What is done inside goes by this name in a profile: torch's, and on CUDA that of NVIDIA's tools."""
    on_device = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), on_device:
        yield


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """What torch's profiler can watch here."""
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]


def free_host_memory() -> int:
    """Bytes of this machine's memory that programs can still take."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(line for line in file if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def device_memory_bytes() -> int | None:
    """Memory of this process's CUDA device; None on the CPU, whose memory is others' too."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else None


def peak_memory_is_of_phases() -> bool:
    """Whether `forget_peak_memory` can forget: only CUDA's allocator counts anew, a process's resident set does not."""
    return torch.cuda.is_available()


def forget_peak_memory() -> None:
    """Let `peak_memory_bytes` count from what is held now, where that can be."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """The most memory this process has held: allocated CUDA memory, or the resident set on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Stream:
    """A stream on a device that has none: everything is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class _View(types.ModuleType):
    """A module seen through: own attributes first, then those of the module behind it."""

    def __init__(self, behind: types.ModuleType, **own: Any) -> None:
        super().__init__(behind.__name__)
        self.__dict__["_behind"] = behind
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _cuda_on_cpu() -> types.ModuleType:
    nvtx = _View(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing)
    return _View(
        torch.cuda,
        current_device=lambda: CPU,
        device_count=lambda: 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_Stream,
        Event=_Stream,
        current_stream=_Stream,
        default_stream=_Stream,
        stream=lambda stream: contextlib.nullcontext(),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        initial_seed=torch.initial_seed,
        memory_allocated=lambda *args: 0,
        memory_reserved=lambda *args: 0,
        is_current_stream_capturing=lambda: False,
        nvtx=nvtx,
    )


def _on_cpu(where: Any) -> Any:
    if isinstance(where, int) or (isinstance(where, str) and where.startswith("cuda")):
        return CPU
    if isinstance(where, torch.device) and where.type == "cuda":
        return CPU
    return where


def _factory(make: Any) -> Any:
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return make(*args, **kwargs)

    return on_cpu


def _cuda_type_names() -> None:
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        if not args and not kwargs and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return answer.replace("torch.", "torch.cuda.")
        return answer

    torch.Tensor.type = type_name


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """What is imported inside is decorated with no torch.compile, and finds no wandb.

    megatron-core compiles fused CUDA kernels and its inference server looks for wandb as they are imported. Neither is ever reached on
    the CPU, and loading torch's compiler and wandb for them takes as long as everything else together.
    """
    compile_, wandb = torch.compile, sys.modules.get("wandb")
    torch.compile = lambda model=None, **options: (lambda function: function) if model is None else model
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # "import wandb" then raises ImportError
    try:
        yield
    finally:
        torch.compile = compile_
        if wandb is None:
            del sys.modules["wandb"]


def prepare_megatron() -> None:
    """Import megatron-core and, where there is no CUDA, let it run on the CPU. Safe to call again.

    Called before anything else imports megatron-core it takes half the time (`_no_compiler`).
    """
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        # Newer releases import triton for mixture-of-experts kernels that are never reached here.
        sys.modules.setdefault("megatron.core.transformer.moe.ops.paged_stash", types.ModuleType("paged_stash"))
    with contextlib.nullcontext() if torch.cuda.is_available() else _no_compiler():
        modules = [importlib.import_module(name) for name in MEGATRON_MODULES]
    if torch.cuda.is_available() or getattr(modules[-1].torch, "_behind", None) is torch:
        return
    view = _View(torch, cuda=_cuda_on_cpu(), **{name: _factory(getattr(torch, name)) for name in FACTORIES})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _cuda_type_names()
