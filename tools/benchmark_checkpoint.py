"""What a checkpoint costs, beside torch's DCP on the same tensors: torchrun --nproc_per_node 8 tools/benchmark_checkpoint.py --folder F

A GPT-2 of 124 M parameters (500 MB in float32) is trained at tp2 pp2 dp2 over 8 ranks, gloo on a CPU. In turn, several rounds: some
steps without a save; the same steps beside a save in the background, ours and DCP's `async_save`; a save that is waited for; a load.
Every rank hands DCP the tensors that it writes itself, so that both write the same bytes, and both synchronise their files; ours are
checksummed besides. Before a load the system is asked to forget the files.

Printed: seconds, GB per second, and the most memory that any rank held beyond what it had before (VmHWM, counted anew through
/proc/self/clear_refs, less VmRSS, after malloc_trim: a process keeps what it frees, and would otherwise seem to need nothing the second
time); medians over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megarlhf.batch import TextBatch
from megarlhf.engine import checkpoint
from megarlhf.engine.optimizer import AdamSettings
from megarlhf.engine.terms import LanguageModelLoss, Term
from megarlhf.engine.trainable import TrainEngine
from megarlhf.models.architecture import make_architecture
from megarlhf.models.transformer import ModelSpec, initialize
from megarlhf.parallel.collectives import largest_of_world, sum_of_world
from megarlhf.parallel.groups import World
from megarlhf.runs.saving import Saving
from megarlhf.storage.checkpoints import read_saved

MB, GB = 10**6, 10**9


class Model:
    """A model that is trained, and the ways to save it."""

    def __init__(self, world: World, folder: Path, *, layers: int, hidden: int) -> None:
        architecture = make_architecture(
            None, vocab_size=50257, num_layers=layers, hidden_size=hidden, num_heads=hidden // 64, max_seq_len=1024
        )
        groups = world.groups(world.layout(tp=2, pp=2) if world.size % 4 == 0 else world.layout())
        spec = ModelSpec(architecture=architecture, head="lm")
        self.world, self.folder, self.layout = world, folder, groups.layout
        self.engine = TrainEngine(spec, groups, micro_batch_size=2, adam=AdamSettings(), seed=1)
        initialize(self.engine.transformers, spec, groups, seed=1)
        self.engine.optimizer.adopt_parameters()
        self.saving = Saving(folder, world, in_background=True, after=lambda step, best: None)
        self.gloo = dist.new_group(backend="gloo")  # for DCP's thread, which runs beside the steps
        self.parameters = architecture.num_parameters()
        tokens = torch.randint(50257, (4, 32), generator=torch.Generator().manual_seed(1))
        batch = TextBatch(tokens=tokens, lengths=torch.full((4,), 32), loss_mask=torch.ones(4, 31, dtype=torch.bool))
        self.terms = [Term("model", LanguageModelLoss(), batch)]
        self.models = {"model": self.engine}

    def steps(self, number: int) -> None:
        """Take some optimizer steps."""
        for _ in range(number):
            self.engine.step(self.terms, learning_rate=1e-4)

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What this rank writes, under names that no other rank has: for DCP."""
        of_model = checkpoint.own_part(self.models).tensors["model"]
        return {f"{self.world.rank}.{kind}.{entry}": values for kind, part in of_model.items() for entry, values in part.items()}

    def save(self, *, wait: bool) -> None:
        """Ours, begun or to its end."""
        refused = self.saving.start({"step": 1}, self.models, best=False, wait=wait)
        assert refused is None, refused

    def save_dcp(self) -> None:
        """DCP's, to its end."""
        dcp.save(self.own_tensors(), storage_writer=self._writer(), process_group=self.gloo)

    def begin_dcp(self) -> object:
        """DCP's in the background; its future."""
        return dcp.async_save(self.own_tensors(), storage_writer=self._writer(), process_group=self.gloo)

    def load(self) -> None:
        """Ours, as a resume does: every file is compared with its checksum, then each rank reads what it needs."""
        saved = read_saved(self.folder / "step_00000001")
        assert not saved.damages(self.world.rank, self.world.size)
        self.world.barrier()
        checkpoint.load(saved, self.models)

    def load_dcp(self) -> None:
        """DCP's, into the tensors that the optimizer holds."""
        dcp.load(self.own_tensors(), checkpoint_id=self.folder / "dcp", process_group=self.gloo)

    def _writer(self) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.folder / "dcp", sync_files=True, overwrite=True)


class Measured:
    """Seconds and extra memory of what was done, by name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seconds: dict[str, list[float]] = {}
        self.extra: dict[str, list[float]] = {}

    def __call__(self, name: str, *work: Callable[[], object]) -> object:
        """Do `work` one after the other, on all ranks from the same moment to the last one's end; returns what the first gave."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.world.barrier()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, since = memory("VmRSS"), time.monotonic()
        results = [part() for part in work]
        self.world.barrier()
        self.seconds.setdefault(name, []).append(time.monotonic() - since)
        peak = largest_of_world([memory("VmHWM") - before], self.world)[0]
        self.extra.setdefault(name, []).append(peak / MB)
        return results[0]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])


def memory(line: str) -> int:
    """Bytes of this process by a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(row for row in text.splitlines() if row.startswith(f"{line}:")).split()[1])


def forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rounds(model: Model, measured: Measured, options: argparse.Namespace) -> None:
    """All there is to measure, once."""

    def steps() -> None:
        model.steps(options.steps)

    futures = []
    measured("steps", steps)
    measured("steps beside ours", lambda: model.save(wait=False), steps, model.saving.finish)
    measured("steps", steps)
    measured("steps beside DCP", lambda: futures.append(model.begin_dcp()), steps, lambda: futures.pop().result())
    for name, save, load in (("ours", lambda: model.save(wait=True), model.load), ("DCP", model.save_dcp, model.load_dcp)):
        measured(f"save {name}", save)
        forget(model.folder)
        measured(f"load {name}", load)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; a new folder, removed at the end")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="beside a save")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")  # DCP's, which is replaced in every round
    world = World.connect()
    if world.rank == 0:
        options.folder.mkdir(parents=True)
    world.barrier()
    model, measured = Model(world, options.folder, layers=options.layers, hidden=options.hidden), Measured(world)
    model.steps(1)
    rounds(model, Measured(world), options)  # what is done for the first time is not measured
    for _ in range(options.rounds):
        rounds(model, measured, options)
    size, own = sum_of_world([checkpoint.own_part(model.models).bytes], world)[0], checkpoint.own_part(model.models).bytes
    largest = largest_of_world([own], world)[0]
    if world.rank == 0:
        report(model, measured, options, size=size, largest=largest)
        shutil.rmtree(options.folder)
    world.barrier()
    world.close()


def report(model: Model, measured: Measured, options: argparse.Namespace, *, size: int, largest: int) -> None:
    """Print the medians."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{model.parameters / 1e6:.0f} M parameters, {model.layout}, {options.rounds} rounds; load averages {load}")
    print(f"a checkpoint has {size / GB:.2f} GB; the largest rank's share of it {largest / MB:.0f} MB")
    plain = measured.median("steps")
    print(f"{options.steps} steps without a save: {plain:.2f} s")
    for name in ("ours", "DCP"):
        beside, save, load = (measured.median(f"{what} {name}") for what in ("steps beside", "save", "load"))
        extra = {what: statistics.median(measured.extra[f"{what} {name}"]) for what in ("steps beside", "save", "load")}
        print(f"{name}: a save beside the steps costs {beside - plain:+.2f} s and {extra['steps beside']:.0f} MB more")
        for what, seconds in (("save", save), ("load", load)):
            rate = size / GB / seconds
            print(f"{name}: a {what} that is waited for {seconds:.2f} s, {rate:.2f} GB/s, {extra[what]:.0f} MB more")
    print(f"memory beside steps alone: {statistics.median(measured.extra['steps']):.0f} MB more")


if __name__ == "__main__":
    main()
