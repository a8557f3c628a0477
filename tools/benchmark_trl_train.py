"""Tokens per second of TRL's SFT or reward trainer on given rows: the peer of tools/benchmark_train.py, which calls it.

    pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate

GPT-2 at random initialization, without dropout; random ids. TRL's defaults but for: gradient checkpointing off, learning rate 1e-5, no
logging, saving or truncation, the batch of a step cut into TRL's own 8 rows per device with gradient accumulation, torch's fused AdamW,
GPT-2's activation in one kernel. sft-packed is `packing=True` (best fit decreasing) into rows of --max-seq-len; each such row is one of
8, and all 8 are laid end to end for a kernel that keeps them apart: without one, as on a CPU, every token is multiplied with every other.
sft-wrapped cuts the text of all rows into rows of --max-seq-len wherever they end: attention crosses from a demonstration into the next,
which is another loss. A comparison counts as one row, as in TRL. Tokens are those that are no padding. The last line printed is JSON:
tokens per second by the clock and of CPU, over --iterations steps after one that is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from ragged_rows import read_rows

try:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    install = "pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate"
    raise SystemExit(f"{error}. This benchmark needs TRL: {install}") from error

PER_DEVICE = 8
PACKING = {"sft-packed": "bfd", "sft-wrapped": "wrapped"}


class StepTimes(TrainerCallback):
    """Seconds and tokens of each optimizer step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.busy: list[float] = []
        self.tokens: list[int] = []
        self.seen = 0

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The first micro-batch of a step comes."""
        self.start, self.cpu = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The optimizer has stepped."""
        now, cpu = self._now()
        self.seconds.append(now - self.start)
        self.busy.append(cpu - self.cpu)


def main() -> None:
    """Measure and print."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    rows = read_rows(args.rows)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = (reward_trainer if args.kind == "reward" else sft_trainer)(args, rows, output_dir)
        times = StepTimes(args.device)
        trainer.add_callback(times)
        tokens = count_tokens(trainer)
        trainer.train()
    per_step = trainer.args.gradient_accumulation_steps
    in_step = sum(tokens[: per_step * (1 + args.iterations)]) / (1 + args.iterations)
    seconds, busy = (statistics.median(values[1:]) for values in (times.seconds, times.busy))
    print(json.dumps({"tokens_per_second": in_step / seconds, "tokens_per_cpu_second": in_step / busy}))


def count_tokens(trainer) -> list[int]:
    """Let the collator note each micro-batch's tokens that are no padding."""
    counted: list[int] = []
    collate = trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        mask = batch.get("attention_mask")
        counted.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    return counted


def sft_trainer(args: argparse.Namespace, rows: list[list[int]], output_dir: str) -> SFTTrainer:
    """On prompts and responses, the loss on the responses."""
    ids = [torch.randint(0, args.vocab_size, (prompt + response,)).tolist() for prompt, response in rows]
    masks = [[0] * prompt + [1] * response for prompt, response in rows]
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
    settings = {**common(args, len(rows), output_dir), "max_length": args.max_seq_len, "completion_only_loss": True}
    if args.kind != "sft":
        settings |= {"packing": True, "packing_strategy": PACKING[args.kind], "gradient_accumulation_steps": 1}
    config = SFTConfig(**settings)
    return SFTTrainer(model=GPT2LMHeadModel(architecture(args)), args=config, train_dataset=data, processing_class=numbers_tokenizer(args))


def reward_trainer(args: argparse.Namespace, rows: list[list[int]], output_dir: str) -> RewardTrainer:
    """On comparisons of two completions."""
    prompts = [torch.randint(0, args.vocab_size, (prompt,)).tolist() for prompt, *_ in rows]
    ids = [
        [prompt + torch.randint(0, args.vocab_size, (row[at],)).tolist() for prompt, row in zip(prompts, rows, strict=True)]
        for at in (1, 2)
    ]
    data = Dataset.from_dict({"chosen_ids": ids[0], "rejected_ids": ids[1]})
    config = RewardConfig(**common(args, len(rows), output_dir), max_length=None)
    model = GPT2ForSequenceClassification(architecture(args))
    return RewardTrainer(model=model, args=config, train_dataset=data, processing_class=numbers_tokenizer(args))


def common(args: argparse.Namespace, rows: int, output_dir: str) -> dict:
    """What both trainers are told."""
    return {
        "output_dir": output_dir, "max_steps": 1 + args.iterations, "per_device_train_batch_size": min(PER_DEVICE, rows),
        "gradient_accumulation_steps": max(1, rows // PER_DEVICE), "learning_rate": 1e-5, "optim": "adamw_torch_fused",
        "use_cpu": args.device == "cpu", "bf16": args.precision == "bf16", "fp16": args.precision == "fp16",
        "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def architecture(args: argparse.Namespace) -> GPT2Config:
    """The model's."""
    return GPT2Config(
        n_layer=args.layers,
        n_embd=args.hidden_size,
        n_head=args.heads,
        vocab_size=args.vocab_size + 2,  # with the padding, which TRL embeds, and the end of text
        n_positions=args.max_seq_len,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        pad_token_id=args.vocab_size,
        bos_token_id=None,
        eos_token_id=args.vocab_size + 1,
        use_cache=False,
        num_labels=1,
    )


def numbers_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Token ids written as numbers; padding and end of text are the two ids behind them."""
    vocab = {str(number): number for number in range(args.vocab_size)} | {"<pad>": args.vocab_size, "<eos>": args.vocab_size + 1}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="0")), pad_token="<pad>", eos_token="<eos>")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sft", "sft-packed", "sft-wrapped", "reward"), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON: the lengths of each row's prompt and response, or two completions")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="torch CPU threads; 0: torch's own choice")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
