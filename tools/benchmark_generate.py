"""Tokens per second of sampling: ours and transformers' `generate`, the same weights, in turn, in one process.

    python tools/benchmark_generate.py                          2 shapes x 2 sizes x 2 kinds of lengths x 1 and 2 threads, on a CPU
    python tools/benchmark_generate.py --size small --threads 1
    python tools/benchmark_generate.py --device cuda            1.3B in bf16 at batches of 1, 16, 64 and 256
    python tools/benchmark_generate.py --device cuda --cuda-graphs

Random weights of transformers' initialisation are converted by `megarlhf convert`'s own functions. Both sample at temperature 1 from the
whole vocabulary, from prompts of one length, and no token ends a response. "fixed": each row is given all `--new-tokens`. "ragged": a
row's limit is drawn from an exponential distribution cut off at `--new-tokens`, with a quarter of that as its mean; the rows' limits
stand in for responses that end by themselves. transformers is told them by a StoppingCriteria that says of each row whether it has ended,
which is what its own EOS does, and it goes on until the last row has; ours is told by `max_new_tokens`, a number per row. Neither side
orders its rows by their limits, which nobody would know: both take them as they come, `--batch` in flight at most, transformers one
batch after the other. Tokens of responses are counted, no others. "passed" is how many times as many tokens transformers passes through the
model, prompts and what follows a row's end included: the ratio that two equally fast programs would have.

On a GPU "of the limit" is the share of the copy rate that the device was measured to have, at which each step reads the weights once and
of each row its keys and values.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from megarlhf.batch import Prompts
from megarlhf.conversion.from_hf import from_hf
from megarlhf.engine.checkpoint import load_weights, saved_architecture
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.storage.checkpoints import read_saved

SIZES = {"small": (4, 256, 4, 512), "large": (12, 768, 12, 50257), "1.3b": (24, 2048, 16, 50257)}
"""Layers, hidden size, heads, vocabulary."""
BATCHES = {"small": [64], "large": [32], "1.3b": [8]}
"""On a CPU."""
SHAPES = ("gpt2", "llama")
LENGTHS = ("fixed", "ragged")
RATE = 3.593
"""Of the exponential distribution on [0, 1] whose mean is 1/4."""
COPIED = 2**30
"""Bytes of the copy that measures a device."""


@dataclass(frozen=True)
class Task:
    """What both sides are to do."""

    prompts: Tensor
    """[rows, prompt_len] ids."""
    limits: list[int]
    """Tokens of each row's response."""
    batch: int
    """Most rows at a time."""

    @property
    def tokens(self) -> int:
        """Of the responses."""
        return sum(self.limits)


def times_passed(task: Task) -> float:
    """Tokens that transformers passes through the model, over those of continuous batching."""
    width, n = task.prompts.shape[1], len(task.limits)
    batches = [task.limits[start : start + task.batch] for start in range(0, n, task.batch)]
    return sum(len(limits) * (width + max(limits) - 1) for limits in batches) / (n * (width - 1) + task.tokens)


class EndsAtLimits(transformers.StoppingCriteria):
    """Says of each row whether it has all its tokens."""

    def __init__(self, prompt_len: int, limits: list[int], device: torch.device) -> None:
        self.ends = torch.tensor(limits, device=device) + prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: object) -> Tensor:
        """[rows] bool."""
        return input_ids.shape[1] >= self.ends


def theirs(model: transformers.PreTrainedModel, task: Task) -> Callable[[], int]:
    """A function that answers `task` with transformers, batch after batch; returns how many tokens the responses have."""

    def run() -> int:
        width, found = task.prompts.shape[1], 0
        for start in range(0, len(task.limits), task.batch):
            prompts, limits = task.prompts[start : start + task.batch].to(model.device), task.limits[start : start + task.batch]
            ends = EndsAtLimits(width, limits, model.device)
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(limits),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([ends]),
            )
            found += sum(min(limit, out.shape[1] - width) for limit in limits)
        return found

    return run


def ours(generator: Generator, task: Task, *, graphs: bool = False) -> Callable[[], int]:
    """The same with our generator."""

    def run() -> int:
        rows, width = task.prompts.shape
        prompts = Prompts(tokens=task.prompts, lengths=torch.full((rows,), width), ids=torch.arange(rows))
        how = {"seed": 1, "iteration": 0, "max_batch_size": task.batch, "cuda_graphs": graphs}
        rollouts = generator.generate(prompts, max_new_tokens=task.limits, **how)
        return int(rollouts.response_mask.sum())

    return run


def hugging_face_model(shape: str, size: str, context: int, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Random weights of one of SHAPES in one of SIZES."""
    layers, hidden, heads, vocab = SIZES[size]
    torch.manual_seed(1)
    ends = {"bos_token_id": None, "eos_token_id": None}
    if shape == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocab, n_positions=context, n_embd=hidden, n_layer=layers, n_head=heads, **ends)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=-(-8 * hidden // 3 // 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            **ends,
        )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def converted(model: transformers.PreTrainedModel, world: World, precision: str) -> Generator:
    """Our generator with the weights of `model`; no token ends its responses."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "theirs"))
        from_hf(Path(folder, "theirs"), Path(folder, "ours"))
        saved = read_saved(Path(folder, "ours"))
        spec = ModelSpec(architecture=saved_architecture(saved, "model"), head="lm", precision=precision)
        engine = FrozenEngine(spec, world.groups(world.layout()), micro_batch_size=8)
        load_weights(saved, "model", engine, average=False)
    return Generator(engine.transformers, engine.groups, architecture=spec.architecture, eos_id=-1, pad_id=0)


def agree(model: transformers.PreTrainedModel, generator: Generator, task: Task) -> float:
    """The largest difference between a sampled token's log-probability of ours and what transformers' forward pass gives it."""
    rows = slice(0, min(4, task.batch))
    prompts = Prompts(
        tokens=task.prompts[rows],
        lengths=torch.full((len(task.prompts[rows]),), task.prompts.shape[1]),
        ids=torch.arange(len(task.prompts[rows])),
    )
    rollouts = generator.generate(prompts, max_new_tokens=8, seed=1, iteration=0)
    with torch.no_grad():
        found = model(rollouts.tokens.to(model.device)).logits[:, :-1].float().log_softmax(-1).cpu()
    difference = found.gather(-1, rollouts.tokens[:, 1:, None]).squeeze(-1) - rollouts.logprobs
    return float(difference[rollouts.response_mask].abs().max())


def limits_of(kind: str, rows: int, most: int) -> list[int]:
    """Each row's tokens, in an order that does not depend on them."""
    if kind == "fixed":
        return [most] * rows
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    share = -(1 - places * (1 - math.exp(-RATE))).log() / RATE
    limits = (share * most).round().clamp(1, most).long()
    limits[-1] = most
    return limits[torch.randperm(rows, generator=torch.Generator().manual_seed(2))].tolist()


def seconds_in_turn(sides: dict[str, Callable[[], int]], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Of each side, `rounds` times, one after the other."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            given = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - start)
            if given != tokens:
                raise SystemExit(f"{name} gave {given} tokens, and {tokens} were asked for")
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes that the device reads and writes per second, copying."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * COPIED / statistics.median(times)


def least_seconds(generator: Generator, task: Task, rate: float) -> float:
    """At `rate` bytes a second, where every step reads the weights once and each row's keys and values; rows fixed and all in flight."""
    weights = sum(parameter.numel() * parameter.element_size() for chunk in generator.chunks for parameter in chunk.parameters())
    per_token = generator.bytes_per_slot(1)
    width, total = task.prompts.shape[1], 0
    for start in range(0, len(task.limits), task.batch):
        limits = task.limits[start : start + task.batch]
        total += sum(weights + per_token * sum(width + step + 1 for limit in limits if limit > step) for step in range(max(limits)))
    return total / rate


def combinations(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Size and shape of each pair of models."""
    sizes = args.size or (["1.3b"] if args.device == "cuda" else ["small", "large"])
    yield from ((size, shape) for size in sizes for shape in args.shape or SHAPES)


def main() -> None:
    """Measure and print."""
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    world = World.connect()
    on_gpu = args.device == "cuda"
    if (world.device.type == "cuda") != on_gpu:
        raise SystemExit(f"--device {args.device}, and this process runs on {world.device}")
    rate = copy_rate(world.device) if on_gpu else None
    dtype, precision = (torch.bfloat16, "bf16") if on_gpu else (torch.float32, "fp32")
    print(
        f"{world.device}, {precision}, prompts of {args.prompt_len}, at most {args.new_tokens} new tokens, medians of {args.rounds} in turn"
    )
    if rate:
        print(f"copies at {rate / 1e9:.0f} GB/s, reads and writes counted")
    limit = " of the limit |" if on_gpu else ""
    print(f"| size | shape | lengths | rows, at a time | threads | ours, tokens/s | transformers | ratio | spread | passed |{limit}")
    print("|---" * (11 if on_gpu else 10) + "|")
    for size, shape in combinations(args):
        model = hugging_face_model(shape, size, args.prompt_len + args.new_tokens, dtype).to(world.device)
        generator = converted(model, world, precision)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch or ([1, 16, 64, 256] if on_gpu else BATCHES[size]):
                for kind in args.lengths or LENGTHS:
                    rows = args.rows or (batch if kind == "fixed" else 4 * batch)
                    prompts = torch.randint(0, SIZES[size][3], (rows, args.prompt_len), generator=torch.Generator().manual_seed(3))
                    task = Task(prompts, limits_of(kind, rows, args.new_tokens), batch)
                    brief = Task(prompts[:batch], [min(4, args.new_tokens)] * min(rows, batch), batch)
                    difference = agree(model, generator, brief)
                    if difference > args.tolerance:
                        raise SystemExit(f"not the same model: log-probabilities differ by {difference:.2g}")
                    sides = [{"ours": ours(generator, of, graphs=args.cuda_graphs), "theirs": theirs(model, of)} for of in (brief, task)]
                    seconds_in_turn(sides[0], brief.tokens, 1)
                    found = seconds_in_turn(sides[1], task.tokens, args.rounds)
                    ratios = [b / a for a, b in zip(found["ours"], found["theirs"], strict=True)]
                    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
                    columns = [
                        size,
                        shape,
                        kind,
                        f"{rows}, {batch}",
                        str(threads),
                        *(f"{task.tokens / medians[name]:.0f}" for name in ("ours", "theirs")),
                        f"{statistics.median(ratios):.2f}",
                        f"{min(ratios):.2f}-{max(ratios):.2f}",
                        f"{times_passed(task):.2f}",
                        *([f"{least_seconds(generator, task, rate) / medians['ours']:.0%}"] if rate else []),
                    ]
                    print("| " + " | ".join(columns) + " |", flush=True)
        del model, generator
    world.close()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="small and large by default, 1.3b on a GPU")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="both by default")
    parser.add_argument("--lengths", choices=LENGTHS, action="append", help="both by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch's CPU threads")
    parser.add_argument("--rows", type=int, help="prompts; by default --batch of them, of ragged lengths four times as many")
    parser.add_argument(
        "--batch", type=int, action="append", help="most rows in flight; 64 by default (large: 32), on a GPU 1, 16, 64 and 256"
    )
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, help="most that log-probabilities may differ by; 1e-4, in bf16 0.1")
    parser.add_argument("--cuda-graphs", action="store_true", help="ours with sampling.cuda_graphs, on a GPU")
    args = parser.parse_args()
    if args.cuda_graphs and args.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    args.tolerance = args.tolerance or (0.1 if args.device == "cuda" else 1e-4)
    args.threads = args.threads[:1] if args.device == "cuda" else args.threads
    return args


if __name__ == "__main__":
    main()
