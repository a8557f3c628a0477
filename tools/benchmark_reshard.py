"""What resharding costs, beside megatron-core's: torchrun --nproc_per_node 4 tools/benchmark_reshard.py

A GPT-2 of 124 M parameters goes from a training to a generation layout over 4 ranks, gloo on a CPU, in several pairs of layouts; in turn,
by our Publisher and by megatron-core's `swap_model_weights`, from the very same source. Its transport is our `GlooCopies`, since its own
asks for CUDA streams: slices are sent from where megatron put them and received where it wants them, and what a rank sends to itself is
copied. Plans are made before anything is measured. After each way every target is compared with the model as it would have been
initialised in that layout, bit for bit.

Printed for each pair: seconds, from the same moment on all ranks to the last one's end, and seconds of the processor in all ranks, which
other programs on the machine change less, medians; bytes that a rank receives from others,
the most of all ranks, and the bytes that went over the loopback device; and the most memory that a rank held beyond the source's weights,
the target's included (VmHWM, counted anew through /proc/self/clear_refs, less VmRSS before there was a target).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megarlhf.models.architecture import make_architecture
from megarlhf.models.parameters import parameter_specs
from megarlhf.models.transformer import ModelSpec, build_model, initialize, named_parameters
from megarlhf.parallel.collectives import largest_of_world, sum_of_world
from megarlhf.parallel.groups import World
from megarlhf.resharding.near_memory import NearMemory
from megarlhf.resharding.plan import nearest_layout, plan_reshard
from megarlhf.resharding.publish import Publisher

MB = 10**6
PAIRS = {
    "tp2pp2 -> tp2pp1": ({"tp": 2, "pp": 2}, {"tp": 2}),
    "tp4 -> tp2": ({"tp": 4}, {"tp": 2}),
    "pp4 -> tp2pp1": ({"pp": 4}, {"tp": 2}),
    "tp2pp2 -> same": ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 2}),
}


class GlooCopies(CopyService):
    """megatron-core's slices over the default group, for tensors on the CPU."""

    def __init__(self) -> None:
        self.sends: list[tuple[int, torch.Tensor, int]] = []
        self.receives: list[tuple[int, torch.Tensor, int]] = []
        self.bytes_received = 0
        """From other ranks, in the last run."""

    def submit_send(self, src_tensor: torch.Tensor, dest_rank: int) -> None:
        """Not called: megatron-core numbers its slices."""
        raise NotImplementedError

    def submit_recv(self, dest_tensor: torch.Tensor, src_rank: int) -> None:
        """Not called either."""
        raise NotImplementedError

    def submit_send_with_id(self, task_id: int, tensor: torch.Tensor, rank: int) -> None:
        """Something to send."""
        self.sends.append((task_id, tensor, rank))

    def submit_recv_with_id(self, task_id: int, tensor: torch.Tensor, rank: int) -> None:
        """Something to receive."""
        self.receives.append((task_id, tensor, rank))

    def run(self) -> None:
        """All that was submitted."""
        here = dist.get_rank()
        own = {task: tensor for task, tensor, rank in self.sends if rank == here}
        operations = [dist.P2POp(dist.irecv, tensor, rank) for _, tensor, rank in sorted(self.receives, key=_task) if rank != here]
        self.bytes_received = sum(operation.tensor.nbytes for operation in operations)
        operations += [dist.P2POp(dist.isend, tensor, rank) for _, tensor, rank in sorted(self.sends, key=_task) if rank != here]
        pending = dist.batch_isend_irecv(operations) if operations else []
        for task, tensor, rank in self.receives:
            if rank == here:
                tensor.copy_(own[task])
        for work in pending:
            work.wait()
        self.sends.clear()
        self.receives.clear()


def _task(submitted: tuple[int, torch.Tensor, int]) -> int:
    return submitted[0]


def _mark(tensors: dict, spec: ModelSpec) -> None:
    """Say of weights how they are split where megatron looks for it: only those that it initialises itself have it by themselves."""
    for of in parameter_specs(spec.architecture, spec.head):
        if of.name in tensors and of.split_dim is not None and not hasattr(tensors[of.name], "partition_dim"):
            set_tensor_model_parallel_attributes(tensors[of.name], is_parallel=True, dim=of.split_dim, stride=of.blocks)


class Ours:
    """Publishing: views where they can be, the rest exchanged; released after."""

    def __init__(self, spec: ModelSpec, source: dict, source_groups, target_groups) -> None:
        self.source = source
        self.publisher = Publisher(spec.architecture, spec.head, source_groups, target_groups)
        self.target = source
        if not self.publisher.in_place:
            self.target = named_parameters(build_model(spec, target_groups), target_groups)
            for parameter in self.target.values():
                parameter.requires_grad_(False)
        self.publisher.release(self.target)
        plan = plan_reshard(spec.architecture, spec.head, source_groups.layout, target_groups.layout)
        self.bytes_received = plan.bytes_received(source_groups.rank, element_size=next(iter(source.values())).element_size())

    def run(self) -> None:
        """Once."""
        self.publisher.publish(self.source, self.target, version=1)

    def clear(self) -> None:
        """Free what a generation has used."""
        self.publisher.release(self.target)


class Megatrons:
    """`swap_model_weights` into a second model, which stays."""

    def __init__(self, spec: ModelSpec, source_chunks: list, source: dict, target_groups) -> None:
        self.source_chunks, self.copies = source_chunks, GlooCopies()
        self.target_chunks = build_model(spec, target_groups)
        self.target = named_parameters(self.target_chunks, target_groups)
        for tensors in (source, self.target):
            _mark(tensors, spec)

    def run(self) -> None:
        """Once."""
        swap_model_weights(self.source_chunks, self.target_chunks, self.copies)

    def clear(self) -> None:
        """Forget what was copied, so that the next check means something."""

    @property
    def bytes_received(self) -> int:
        """By this rank in the last run."""
        return self.copies.bytes_received


@dataclass
class Found:
    """What one way of resharding took."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    received: int = 0
    on_the_wire: int = 0
    memory: int = 0


class Pair:
    """One pair of layouts, with the source's model."""

    def __init__(self, world: World, spec: ModelSpec, source_axes: dict, target_axes: dict) -> None:
        self.world, self.spec = world, spec
        self.source_groups = world.groups(world.layout(**source_axes))
        self.usual = world.layout(**target_axes)
        self.nearest = nearest_layout(spec.architecture, spec.head, self.source_groups.layout, self.usual)
        self.chunks = build_model(spec, self.source_groups)
        initialize(self.chunks, spec, self.source_groups, seed=1)
        self.source = named_parameters(self.chunks, self.source_groups)

    def ours(self) -> Ours:
        """With the generation groups that the product would take."""
        return Ours(self.spec, self.source, self.source_groups, self.world.groups(self.nearest))

    def megatrons(self) -> Megatrons:
        """With the generation groups in megatron's order."""
        return Megatrons(self.spec, self.chunks, self.source, self.world.groups(self.usual))

    def check(self, way: Ours | Megatrons, layout) -> None:
        """Stop where a target is not the model as it is initialised in that layout."""
        groups = self.world.groups(layout)
        expected = build_model(self.spec, groups)
        initialize(expected, self.spec, groups, seed=1)
        for name, parameter in named_parameters(expected, groups).items():
            if not torch.equal(parameter, way.target[name]):
                raise SystemExit(f"{type(way).__name__}: {name} did not arrive as it is in {layout}")

    def measure(self, make: Callable[[], Ours | Megatrons], layout) -> tuple[Ours | Megatrons, Found]:
        """Memory and bytes of one run, beyond the source; the targets are poisoned before it and compared after it."""
        found = Found()
        _trim()
        before = memory("VmRSS")
        way = make()
        way.run()
        way.clear()
        if way.target is not self.source:
            for parameter in way.target.values():
                parameter.data.fill_(-1)
        _trim()
        self.world.barrier()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        wire = loopback_bytes()
        self.world.barrier()
        way.run()
        self.world.barrier()
        found.memory, found.received = largest_of_world([memory("VmHWM") - before, way.bytes_received], self.world)
        found.on_the_wire = loopback_bytes() - wire
        self.check(way, layout)
        way.clear()
        return way, found

    def time(self, way: Ours | Megatrons, found: Found) -> None:
        """Once."""
        self.world.barrier()
        start, used = time.monotonic(), time.process_time()
        way.run()
        microseconds = round(1e6 * (time.process_time() - used))
        self.world.barrier()
        found.seconds.append(time.monotonic() - start)
        found.cpu_seconds.append(sum_of_world([microseconds], self.world)[0] / 1e6)
        way.clear()


def memory(line: str) -> int:
    """Bytes of this process by a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(row for row in text.splitlines() if row.startswith(f"{line}:")).split()[1])


def loopback_bytes() -> int:
    """Bytes that the loopback device has received so far."""
    rows = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return int(next(row for row in rows if row.strip().startswith("lo:")).split(":")[1].split()[0])


def _trim() -> None:
    """Give back what is freed, so that it is not taken for needed nothing the next time."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--messages", action="store_true", help="ours by messages, as between hosts, even where memory can be read")
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.messages:
        NearMemory._sees = lambda memory, rank, told: False
    world = World.connect()
    architecture = make_architecture(
        None, vocab_size=50257, num_layers=options.layers, hidden_size=options.hidden, num_heads=options.hidden // 64, max_seq_len=1024
    )
    spec = ModelSpec(architecture=architecture, head="lm", precision="bf16")
    if world.rank == 0:
        print(f"{2 * architecture.num_parameters() / MB:.0f} MB of weights, {world.size} ranks, {options.rounds} rounds")
    for name in options.pairs:
        pair = Pair(world, spec, *PAIRS[name])
        ours, our_costs = pair.measure(pair.ours, pair.nearest)
        theirs, their_costs = pair.measure(pair.megatrons, pair.usual)
        for _ in range(options.rounds):
            pair.time(ours, our_costs)
            pair.time(theirs, their_costs)
        if world.rank == 0:
            report(name, our_costs, their_costs)
        del pair, ours, theirs
    world.barrier()
    world.close()


def report(name: str, ours: Found, theirs: Found) -> None:
    """Print the medians."""
    print(f"{name}; load average {os.getloadavg()[0]:.1f}")
    for what in ("seconds", "cpu_seconds"):
        best = f"at best {min(getattr(ours, what)):.4f} and {min(getattr(theirs, what)):.4f}"
        _line(f"{what.replace('_', ' ')} ({best})", *(statistics.median(getattr(side, what)) for side in (ours, theirs)), digits=4)
    for what in ("received", "on_the_wire", "memory"):
        _line(f"MB {what.replace('_', ' ')}", *(getattr(side, what) / MB for side in (ours, theirs)), digits=1)


def _line(what: str, ours: float, theirs: float, *, digits: int) -> None:
    ratio = f"{ours / theirs:.2f}" if theirs else "-"
    print(f"  {what}: ours {ours:.{digits}f}, megatron's {theirs:.{digits}f}, ratio {ratio}", flush=True)


if __name__ == "__main__":
    main()
