"""Samples per second of a full PPO iteration: generate, score with four models, update, hand the weights over.

    python tools/benchmark_ppo.py                                    one process
    torchrun --nproc_per_node 2 tools/benchmark_ppo.py --tp 2        any layout
    python tools/benchmark_ppo.py --ragged                           rows of unequal lengths, as they are in use

The trainer is the real one, on random weights and random prompts. By default no response meets an end-of-text token, and every
iteration does the same work. With `--ragged` prompts have 8 to 32 tokens, evenly drawn, and a response ends after the first of some
ids, so many that it has a quarter of --response-len on average (tools/ragged_rows.py): sampled, as an end of text is. Prints
seconds per phase and, last, a line `N samples/s` (median over iterations). `--profile FILE` writes where the iteration after those
goes, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ragged_rows import ending_ids, prompt_lengths

from megarlhf.config.ppo import (
    GenerationConfig,
    PpoConfig,
    PpoDataConfig,
    PpoPolicyConfig,
    PpoReferenceConfig,
    PpoRewardConfig,
    PpoSettings,
    PpoValueConfig,
)
from megarlhf.config.sections import (
    AdamConfig,
    ArchitectureConfig,
    LimitsConfig,
    ParallelConfig,
    RunConfig,
    SamplingConfig,
    TokenizerConfig,
)
from megarlhf.parallel import platform
from megarlhf.parallel.groups import World

PHASES = ("generate", "score", "update", "reshard")


@dataclass(frozen=True)
class NumbersTokenizer:
    """Token ids without text; the end-of-text id is one that no model can sample."""

    vocab_size: int
    eos_id: int = -1
    pad_id: int = 0
    unk_id: None = None
    fingerprint: str = "numbers"

    def encode(self, text: str) -> list[int]:
        """Ids written as numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Numbers."""
        return " ".join(map(str, ids))


def main() -> None:
    """Measure and print."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    world = World.connect()
    from megarlhf.runs.folder import Run
    from megarlhf.trainers.ppo import ProximalPolicyOptimization

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(args, folder)
        with Run(config, world) as run:  # nothing is written
            trainer = ProximalPolicyOptimization(config, run, NumbersTokenizer(args.vocab_size), prompts_of(args))
            if args.ragged:
                ends = ending_ids(args.vocab_size, most=args.response_len, mean=args.response_len / 4)
                trainer.generator.generator.last_ids = frozenset(ends)
            measure(args, trainer, world)
    world.close()


def prompts_of(args: argparse.Namespace) -> list:
    """Random prompts, of one length or of several."""
    from megarlhf.data.tokenized import PromptRow

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, args.vocab_size, (args.prompts, args.prompt_len), generator=generator).tolist()
    lengths = prompt_lengths(args.prompts, longest=args.prompt_len) if args.ragged else [args.prompt_len] * args.prompts
    return [PromptRow(row[:length], "random") for row, length in zip(ids, lengths, strict=True)]


def measure(args: argparse.Namespace, trainer, world: World) -> None:
    """Run the iterations; rank 0 prints what they took."""
    seconds: list[float] = []
    busy: list[float] = []
    lengths: list[float] = []
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for iteration in range(args.warmup + args.iterations):
        world.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        metrics = trainer.step(iteration)
        platform.synchronize()
        if iteration >= args.warmup:
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - cpu)
            lengths.append(metrics["rollout/response_len"])
            for phase in PHASES:
                phases[phase].append(metrics[f"time/{phase}_seconds"])
    if args.profile:
        with cProfile.Profile() as profile:
            trainer.step(args.warmup + args.iterations)
        if world.rank == 0:
            with open(args.profile, "w", encoding="utf-8") as file:
                pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(60)
    if world.rank == 0:
        print(f"{args.layers} layers x {args.hidden_size} hidden x {args.heads} heads, vocabulary {args.vocab_size}, {args.precision}")
        rows = f"8 to {args.prompt_len}" if args.ragged else f"{args.prompt_len}"
        print(f"{args.prompts} prompts of {rows} tokens, at most {args.response_len} response tokens, {args.minibatches} minibatches")
        print(f"  {statistics.mean(lengths):.2f} response tokens on average")
        print(f"{world.size} rank(s), training layout {trainer.roles.policy.groups.layout}, {torch.get_num_threads()} threads each")
        for phase in PHASES:
            print(f"  {phase:<10} {statistics.median(phases[phase]):8.3f} s")
        print(f"  {'iteration':<10} {statistics.median(seconds):8.3f} s (min {min(seconds):.3f}, max {max(seconds):.3f})")
        print(f"  {'of CPU':<10} {statistics.median(busy):8.3f} s of rank 0 (min {min(busy):.3f}, max {max(busy):.3f})")
        print(f"  peak memory of rank 0: {platform.peak_memory_bytes() / 2**20:.0f} MiB")
        print(f"{args.prompts / statistics.median(seconds):.1f} samples/s")


def config_of(args: argparse.Namespace, folder: str) -> PpoConfig:
    """The run that is measured: four models of one size, no pretraining term."""
    architecture = ArchitectureConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, num_heads=args.heads, max_seq_len=args.prompt_len + args.response_len
    )
    adam = AdamConfig(learning_rate=1e-5)
    rows = args.micro_batch_size or args.prompts // args.minibatches  # small enough for the caches of a CPU
    every = {"architecture": architecture, "micro_batch_size": rows, "precision": args.precision}
    return PpoConfig(
        stage="ppo",
        run=RunConfig(dir=folder),
        tokenizer=TokenizerConfig(path="unused"),
        parallel=ParallelConfig(tp=args.tp, pp=args.pp),
        policy=PpoPolicyConfig(adam=adam, **every),
        value=PpoValueConfig(adam=adam, **every),
        reward=PpoRewardConfig(**every),
        reference=PpoReferenceConfig(**every),
        data=PpoDataConfig(prompts="unused"),
        limits=LimitsConfig(max_prompt_len=args.prompt_len),
        ppo=PpoSettings(
            iterations=args.warmup + args.iterations + 1,
            batch_size=args.prompts,
            minibatch_size=args.prompts // args.minibatches,
            ptx_coef=0.0,
            recompute_logprobs=args.recompute_logprobs,
        ),
        generation=GenerationConfig(
            parallel=ParallelConfig(tp=args.generation_tp or args.tp, pp=args.generation_pp or args.pp),
            sampling=SamplingConfig(max_new_tokens=args.response_len),
        ),
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=64, help="episodes of one iteration")
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--response-len", type=int, default=32)
    parser.add_argument("--ragged", action="store_true", help="prompts and responses of unequal lengths; the lengths given are the most")
    parser.add_argument("--minibatches", type=int, default=4, help="optimizer steps of one iteration")
    parser.add_argument("--micro-batch-size", type=int, help="most rows of one forward pass; a minibatch by default")
    parser.add_argument("--recompute-logprobs", action="store_true", help="take old log-probabilities from a pass of their own")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--generation-tp", type=int, help="tensor-parallel size of the generator; the policy's by default")
    parser.add_argument("--generation-pp", type=int, help="pipeline stages of the generator; the policy's by default")
    parser.add_argument("--iterations", type=int, default=8, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--profile", metavar="FILE", help="write where one iteration more goes, by function")
    parser.add_argument("--threads", type=int, help="torch CPU threads of each rank")
    return parser.parse_args()


if __name__ == "__main__":
    main()
