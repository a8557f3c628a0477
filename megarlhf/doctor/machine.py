"""Devices, limits and the network's settings of one machine."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megarlhf.doctor.findings import DOUBT, NOTE, OK, WRONG, Finding
from megarlhf.parallel import platform
from megarlhf.parallel.measure import matrix_product_flops

GIB = 2**30
LEAST_SHARED_MEMORY = GIB
"""NCCL takes some 10 to 30 MB for each GPU of a machine and communicator, and there are dozens of communicators."""
LEAST_OPEN_FILES = 4096
"""Each connection to a rank and each worker of a loader takes some."""
OLDEST_CAPABILITY = (8, 0)
DISABLED = {"NCCL_P2P_DISABLE": "GPUs of a machine exchange through its memory", "NCCL_IB_DISABLE": "machines exchange over TCP"}
CPU_FLAGS = {"avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def device_findings(*, quick: bool, need_gpu: bool) -> list[Finding]:
    """What this machine computes on, and how fast it multiplies."""
    findings = _gpus() if torch.cuda.is_available() else [_cpu(), *_no_gpu(need_gpu)]
    if not quick:
        fp32, bf16 = (matrix_product_flops(dtype, platform.device()) for dtype in (torch.float32, torch.bfloat16))
        findings += judge_speeds(fp32, bf16)
    return findings


def judge_speeds(fp32: float, bf16: float) -> list[Finding]:
    """What one rank multiplies, in FLOP/s."""
    findings = [Finding("devices", OK, f"matrix products of one rank: fp32 {_flops(fp32)}, bf16 {_flops(bf16)}")]
    if bf16 < fp32:
        findings.append(Finding("devices", NOTE, "bf16 is slower than fp32 here: precision: fp32 is the faster, and twice the memory"))
    return findings


def _gpus() -> list[Finding]:
    driver, findings = _driver(), []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = (gpu.major, gpu.minor)
        text = f"GPU {index}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}, driver {driver}"
        old = capability < OLDEST_CAPABILITY
        way_out = "its bf16 is emulated: precision: fp16 or fp32" if old else ""
        findings.append(Finding("devices", DOUBT if old else OK, text, way_out))
    return findings


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _cpu() -> Finding:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = dict(reversed([tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line]))
    flags = fields.get("flags", "").split()
    has = ", ".join(name for flag, name in CPU_FLAGS.items() if flag in flags) or "no AVX-512"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("devices", OK, f"CPU: {fields.get('model name', 'unknown')}, {cores} cores to be used, {has}; runs go over gloo")


def _no_gpu(need_gpu: bool) -> list[Finding]:
    present = bool(list(Path("/dev").glob("nvidia[0-9]*"))) or shutil.which("nvidia-smi") is not None
    if present:
        text = f"this machine has a GPU, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
        return [Finding("devices", WRONG, text, "a torch built for this driver, or a newer driver; is CUDA_VISIBLE_DEVICES empty?")]
    if need_gpu:
        return [Finding("devices", WRONG, "no GPU is there", "in a container: --gpus all, and NVIDIA's container toolkit")]
    return []


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.0f} GFLOP/s"


def limit_findings() -> list[Finding]:
    """The limits of this process and machine, judged."""
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None
    open_files, memlock = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    return judge_limits(shared, open_files, memlock, cuda=torch.cuda.is_available())


def judge_limits(shared_memory: int | None, open_files: int, memlock: int, *, cuda: bool) -> list[Finding]:
    """What of the limits would bite: bytes of /dev/shm (None where there is none), open files, bytes of locked memory."""
    findings = []
    shown = "none" if shared_memory is None else f"{shared_memory / GIB:.2g} GiB"
    if shared_memory is None or shared_memory < LEAST_SHARED_MEMORY:
        text = f"shared memory (/dev/shm): {shown}; several ranks of a machine exchange through it and would fail"
        findings.append(Finding("limits", WRONG if cuda else DOUBT, text, "docker run --ipc=host, or --shm-size=16g"))
    else:
        findings.append(Finding("limits", OK, f"shared memory (/dev/shm): {shown}"))
    if open_files != resource.RLIM_INFINITY and open_files < LEAST_OPEN_FILES:
        text = f"open files: {open_files} for each process, and connections to many ranks take more than {LEAST_OPEN_FILES}"
        findings.append(Finding("limits", DOUBT, text, "ulimit -n 65536 before the start"))
    else:
        findings.append(Finding("limits", OK, "open files: " + ("no limit" if open_files == resource.RLIM_INFINITY else str(open_files))))
    if cuda and memlock not in (resource.RLIM_INFINITY, -1) and memlock < GIB:
        text = f"locked memory: {memlock // 1024} KiB; InfiniBand registers its buffers in it"
        findings.append(Finding("limits", DOUBT, text, "ulimit -l unlimited, or docker run --ulimit memlock=-1"))
    return findings


def network_findings() -> list[Finding]:
    """What the environment tells NCCL and gloo, judged."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    interfaces = [name for _, name in socket.if_nameindex()]
    return judge_network(os.environ, interfaces, ranks_here=ranks_here, cuda=torch.cuda.is_available())


def judge_network(env: Mapping[str, str], interfaces: Sequence[str], *, ranks_here: int, cuda: bool) -> list[Finding]:
    """Settings that name what is not there, or that cost speed; and all that are set, to be seen."""
    findings = []
    shown = [f"{name}={env[name]}" for name in sorted(env) if name.startswith(("NCCL_", "GLOO_", "CUDA_", "OMP_NUM"))]
    nothing = "nothing is set of NCCL_*, GLOO_*, CUDA_*, OMP_NUM_THREADS"
    findings.append(Finding("network", NOTE, f"set: {', '.join(shown)}" if shown else nothing))
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = env.get(name, "").lstrip("=")
        if wanted and not wanted.startswith("^") and not any(_names(part, interfaces, name) for part in wanted.split(",")):
            text = f"{name} is {env[name]}, and this machine has {', '.join(interfaces)}"
            findings.append(Finding("network", WRONG, text, "name one of these that reaches the other machines, or unset it"))
    for name, loss in DISABLED.items():
        if cuda and env.get(name, "0") != "0":
            findings.append(Finding("network", DOUBT, f"{name} is {env[name]}: {loss}", "unset it, unless this cluster needs it"))
    if ranks_here > 1 and "OMP_NUM_THREADS" not in env:
        text = f"OMP_NUM_THREADS is not set, and {ranks_here} ranks of this machine take all its cores each"
        findings.append(Finding("network", DOUBT, text, "OMP_NUM_THREADS=1, as launcher/start.sh has it"))
    segments = any("expandable_segments:True" in env.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if cuda and segments and env.get("NCCL_GRAPH_REGISTER") != "0":
        text = "expandable_segments are on and NCCL_GRAPH_REGISTER is not 0: CUDA graphs of several ranks would read wrong addresses"
        findings.append(Finding("network", DOUBT, text, "NCCL_GRAPH_REGISTER=0, as launcher/start.sh has it"))
    if cuda and env.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        text = "CUDA_DEVICE_MAX_CONNECTIONS is not 1: tensor-parallel communication overlaps less"
        findings.append(Finding("network", DOUBT, text, "CUDA_DEVICE_MAX_CONNECTIONS=1, as launcher/start.sh has it"))
    return findings


def _names(part: str, interfaces: Sequence[str], variable: str) -> bool:
    """Whether an interface is meant: NCCL takes the start of a name, gloo the whole."""
    return any(name.startswith(part) if variable.startswith("NCCL") else name == part for name in interfaces)
