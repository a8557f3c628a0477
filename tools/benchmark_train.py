"""Tokens per second and MFU of an optimizer step of SFT, of the reward model and of PPO-ptx, at the paper's lengths of rows.

    python tools/benchmark_train.py                                       one process, this program alone
    python tools/benchmark_train.py --peer trl/bin/python --pairs 5       TRL's SFT and reward trainers in turn, and median ratios
    torchrun --nproc_per_node 8 tools/benchmark_train.py --device cuda --preset gpt3-1.3b --precision bf16 --scale 1 --vocab-size 50257

Prompts and responses have the quantiles and means of Ouyang et al. 2022, Tables 9 and 11 (tools/ragged_rows.py), all times --scale, and
random ids. A step is the trainer's own: batches of --batch-size demonstrations, comparisons of two completions, or episodes with a row
of text each. Tokens are real ones, as every side counts them. MFU is the model's own arithmetic (attention over whole rows, nothing that
is computed again) over what one matrix product [tokens of a micro-batch, hidden] x [hidden, 4 hidden] reaches here at its best, measured
before. Seconds of CPU stand beside those of the clock: other programs on the machine change them less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ragged_rows import paper_rows, write_rows

STEPS = ("sft", "reward", "ppo")
PEERS = {"sft": ("sft", "sft-packed", "sft-wrapped"), "reward": ("reward",), "ppo": ()}
"""What the peer has for a step: tools/benchmark_trl_train.py's names."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second, by the clock and of CPU."""

    tokens_per_second: float
    tokens_per_cpu_second: float


def main() -> None:
    """Measure and print."""
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from megarlhf.parallel.groups import World

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)
    world = World.connect()
    say = print if world.rank == 0 else lambda *values: None
    ceiling = matrix_product_flops(args, world.device)
    say(f"{world.size} rank(s) on {world.device.type}, {torch.get_num_threads()} threads each; matrix product {ceiling / 1e9:.1f} GFLOP/s")
    for step in args.steps:
        rows = paper_rows(step, args.batch_size, scale=args.scale)
        run, tokens, flops = prepared(args, world, step, rows)
        ours: list[Speed] = []
        theirs: dict[str, list[Speed]] = {peer: [] for peer in PEERS[step] if args.peer}
        for _ in range(args.pairs):
            ours.append(measured(run, tokens, args.iterations, world))
            for peer, speeds in theirs.items():
                if world.rank == 0:
                    speeds.append(of_peer(args, peer, rows))
                world.barrier()
        report(say, step, ours, theirs, tokens=tokens, flops=flops, ceiling=ceiling * world.size)
    world.close()


def matrix_product_flops(args: argparse.Namespace, device) -> float:
    """The best of some timings of one product of this model's shape, FLOP/s."""
    import torch

    from megarlhf.models.transformer import DTYPES
    from megarlhf.parallel import platform

    hidden = architecture(args).hidden_size
    a, b = (
        torch.randn(shape, dtype=DTYPES[args.precision], device=device)
        for shape in ((args.micro_batch_tokens, hidden), (hidden, 4 * hidden))
    )
    best = float("inf")
    for _ in range(20):
        platform.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        platform.synchronize()
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * a.shape[0] * b.numel() / best


def architecture(args: argparse.Namespace):
    """The model's."""
    from megarlhf.models.architecture import make_architecture

    longest = max(sum(row[:1]) + max(row[1:]) for step in STEPS for row in paper_rows(step, args.batch_size, scale=args.scale))
    sizes = {"num_layers": args.layers, "hidden_size": args.hidden_size, "num_heads": args.heads} if args.preset is None else {}
    return make_architecture(args.preset, vocab_size=args.vocab_size, max_seq_len=max(longest, round(2048 * args.scale)), **sizes)


def prepared(args: argparse.Namespace, world, step: str, rows: list[list[int]]) -> tuple[Callable[[], object], int, float]:
    """(a function that takes one optimizer step on the rows, its tokens, and the FLOPs of the model's arithmetic in it)."""
    from megarlhf.engine.optimizer import AdamSettings
    from megarlhf.engine.trainable import TrainEngine
    from megarlhf.models.transformer import ModelSpec, initialize
    from megarlhf.planning.work import forward_flops

    a = architecture(args)
    groups = world.groups(world.layout(tp=args.tp, pp=args.pp, sequence_parallel=args.sequence_parallel))
    spec = ModelSpec(architecture=a, head="scalar" if step == "reward" else "lm", precision=args.precision, recompute=args.recompute)
    how = {"micro_batch_size": args.batch_size, "micro_batch_tokens": args.micro_batch_tokens}
    engine = TrainEngine(spec, groups, adam=AdamSettings(), seed=1, **how)
    initialize(engine.transformers, spec, groups, seed=1)
    engine.optimizer.adopt_parameters()
    terms = {"sft": sft_terms, "reward": reward_terms, "ppo": ppo_terms}[step](args, rows)
    flops = 0.0
    for term in terms:
        wanted = term.loss.positions(term.batch)
        logits = wanted.sum(dim=1).tolist() if wanted is not None else [1] * term.batch.num_rows
        flops += sum(3 * forward_flops(a, spec.head, width=n, logits=k) for n, k in zip(term.batch.lengths.tolist(), logits, strict=True))
    return lambda: engine.step(terms, learning_rate=1e-5), sum(int(term.batch.lengths.sum()) for term in terms), flops


def random_rows(args: argparse.Namespace, lengths: list[int], prompts: list[int]):
    """(tokens, lengths, mask of the positions that predict a token behind the prompt), with random ids."""
    import torch

    lengths, prompts = torch.tensor(lengths), torch.tensor(prompts)
    tokens = torch.randint(0, args.vocab_size, (len(lengths), int(lengths.max())), generator=torch.Generator().manual_seed(1))
    at = torch.arange(tokens.shape[1] - 1)
    return tokens, lengths, (at >= prompts[:, None] - 1) & (at < lengths[:, None] - 1)


def sft_terms(args: argparse.Namespace, rows: list[list[int]]) -> list:
    """The loss on demonstrations' responses."""
    from megarlhf.batch import TextBatch
    from megarlhf.engine.terms import LanguageModelLoss, Term

    tokens, lengths, mask = random_rows(args, [sum(row) for row in rows], [row[0] for row in rows])
    return [Term("model", LanguageModelLoss(), TextBatch(tokens=tokens, lengths=lengths, loss_mask=mask))]


def reward_terms(args: argparse.Namespace, rows: list[list[int]]) -> list:
    """The loss on comparisons of two completions."""
    import torch

    from megarlhf.batch import RankingBatch
    from megarlhf.engine.terms import RankingLoss, Term

    tokens, lengths, _ = random_rows(args, [row[0] + n for row in rows for n in row[1:]], [row[0] for row in rows for _ in row[1:]])
    of_prompt = {"ranks": torch.tensor([1, 2]).repeat(len(rows)), "prompt_index": torch.arange(len(rows)).repeat_interleave(2)}
    return [Term("reward", RankingLoss(), RankingBatch(tokens=tokens, lengths=lengths, **of_prompt))]


def ppo_terms(args: argparse.Namespace, rows: list[list[int]]) -> list:
    """The policy's loss on episodes, and a row of text beside each."""
    import torch

    from megarlhf.batch import Experience, TextBatch
    from megarlhf.engine.terms import LanguageModelLoss, PolicyLoss, Term

    tokens, lengths, mask = random_rows(args, [sum(row) for row in rows], [row[0] for row in rows])
    logprobs, advantages = torch.full(mask.shape, -6.0), torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    known = {"old_logprobs": logprobs, "ref_logprobs": logprobs, "advantages": advantages, "response_mask": mask}
    width = round(2048 * args.scale)
    text, widths, of_text = random_rows(args, [width] * len(rows), [1] * len(rows))
    return [
        Term("policy", PolicyLoss(clip=0.2), Experience(tokens=tokens, lengths=lengths, **known)),
        Term("ptx", LanguageModelLoss(), TextBatch(tokens=text, lengths=widths, loss_mask=of_text), weight=27.8),
    ]


def measured(run: Callable[[], object], tokens: int, iterations: int, world) -> Speed:
    """The median over --iterations steps, after one that is not counted."""
    from megarlhf.parallel import platform

    seconds: list[float] = []
    busy: list[float] = []
    for _ in range(1 + iterations):
        world.barrier()
        platform.synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        run()
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    return Speed(tokens / statistics.median(seconds[1:]), tokens / statistics.median(busy[1:]))


def of_peer(args: argparse.Namespace, peer: str, rows: list[list[int]]) -> Speed:
    """The same from tools/benchmark_trl_train.py in the peer's environment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        write_rows(path, rows)
        a = architecture(args)
        words = {
            "--rows": path, "--kind": peer, "--iterations": args.iterations, "--layers": a.num_layers, "--hidden-size": a.hidden_size,
            "--heads": a.num_heads, "--vocab-size": a.vocab_size, "--max-seq-len": a.max_seq_len, "--threads": args.threads or 0,
            "--precision": args.precision, "--device": args.device,
        }  # fmt: skip
        command = [
            args.peer,
            str(Path(__file__).with_name("benchmark_trl_train.py")),
            *(str(word) for pair in words.items() for word in pair),
        ]
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")}
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def report(
    say: Callable, step: str, ours: list[Speed], theirs: dict[str, list[Speed]], *, tokens: int, flops: float, ceiling: float
) -> None:
    """A line for this program, and one for each peer with the median of the pairs' ratios."""
    fast, busy = (statistics.median(getattr(speed, name) for speed in ours) for name in ("tokens_per_second", "tokens_per_cpu_second"))
    mfu = flops * fast / tokens / ceiling
    say(f"{step:<15}: {fast:10.0f} tokens/s, {busy:10.0f} per second of CPU; MFU {mfu:.3f}; {tokens} tokens in a step")
    for peer, speeds in theirs.items():
        ratios = [mine.tokens_per_second / other.tokens_per_second for mine, other in zip(ours, speeds, strict=True)]
        of_cpu = [mine.tokens_per_cpu_second / other.tokens_per_cpu_second for mine, other in zip(ours, speeds, strict=True)]
        other = statistics.median(speed.tokens_per_second for speed in speeds)
        clock, cpu = statistics.median(ratios), statistics.median(of_cpu)
        say(f"  TRL {peer:<11}: {other:10.0f} tokens/s; ratio {clock:.2f} by the clock, {cpu:.2f} of CPU")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--peer", help="the Python of an environment with TRL; none: this program alone")
    parser.add_argument("--pairs", type=int, default=1, help="rounds in which all sides are measured in turn")
    parser.add_argument("--iterations", type=int, default=4, help="measured steps of a round, after one that is not")
    parser.add_argument("--preset", help="a preset of sizes in place of the three below")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--scale", type=float, default=0.125, help="what the paper's lengths are multiplied by")
    parser.add_argument("--batch-size", type=int, default=32, help="demonstrations, comparisons or episodes of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--threads", type=int, help="torch CPU threads of each rank, and of the peer")
    args = parser.parse_args()
    if args.peer and not Path(args.peer).exists():
        sys.exit(f"--peer: there is no {args.peer}")
    return args


if __name__ == "__main__":
    main()
