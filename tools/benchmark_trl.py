"""Samples per second of a full PPO iteration with TRL's PPOTrainer, on the work that tools/benchmark_ppo.py measures.

    pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate
    python tools/benchmark_trl.py                                    one process on the CPU, float32
    python tools/benchmark_trl.py --ragged                           rows of unequal lengths, as they are in use

The PPO trainer of TRL 1.9.2 is `trl.experimental.ppo`; 1.12.0 is the last release that has one. The policy, the reference, the
reward and the value model are GPT-2 (GPT2LMHeadModel twice, GPT2ForSequenceClassification with one label twice) at random
initialization, without dropout. An iteration generates 32 tokens for each of 64 random prompts of 32 tokens, scores the 64
episodes, and makes 4 optimizer steps, each on 16 of them. Settings, in TRL's names:

    per_device_train_batch_size 64, gradient_accumulation_steps 1, num_mini_batches 4, num_ppo_epochs 1
        4 minibatches of 16 in one piece, each an optimizer step. 16 x 4 makes the same minibatches, but `accelerator.accumulate`
        then holds the step back until the fourth of them (unless the data set is one batch): one step an iteration.
    local_rollout_forward_batch_size 64
        generation and scoring in one batch; the KV cache in generation only, elsewhere it would be copied for nothing
    temperature 1, top_k 0, top_p 1, stop_token None, missing_eos_penalty None, whiten_rewards False
        the tokenizer's padding and end-of-text ids lie outside the models' vocabulary: no response is cut short or masked
    bf16 False, gradient_checkpointing False, optim adamw_torch_fused, attention sdpa
    activation gelu_pytorch_tanh            GPT-2's function in one kernel; the default, gelu_new, composes it of several
    num_sample_generations 0, report_to none, save_strategy no, eval_strategy no, no callback that prints

With `--ragged` prompts have 8 to 32 tokens, evenly drawn, which TRL pads on the left, and a response ends after the first of some ids, so
many that it has a quarter of --response-len on average (tools/ragged_rows.py): they are generation's end-of-text ids, as they would be
with stop_token "eos", and `truncate_response`, which knows one id only, is replaced by one that knows all of them.

TRL takes the sampling policy's log-probabilities from the scores of generation, so it scores with three forward passes (reference,
value, reward) where benchmark_ppo.py makes four, and it does not clip gradients. The forward passes of the first iteration, the
optimizer's steps and the episodes are counted and compared with what the settings promise (with `--ragged`, their widths at most that).
Prints the seconds of each iteration and, last, a line `N samples/s` (median over the iterations after warm-up).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter

from ragged_rows import ending_ids, prompt_lengths

try:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        PrinterCallback,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
except ModuleNotFoundError as error:
    install = "pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate"
    raise SystemExit(f"{error}. This benchmark needs TRL 1.9.2 (from 1.13 on TRL has no PPO trainer): {install}") from error


class IterationTimes(TrainerCallback):
    """Seconds of each iteration, from the end of one to the end of the next."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: list[float] = []
        self.busy: list[float] = []
        """Of the CPU, on all threads: what other programs on the machine change least."""
        self.mark = self.cpu_mark = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first iteration starts."""
        self.mark, self.cpu_mark = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """An iteration is over: TRL's step is one rollout batch with all its updates."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self.mark)
        self.busy.append(cpu - self.cpu_mark)
        self.mark, self.cpu_mark = now, cpu


class FirstIterationWork(TrainerCallback):
    """Forward passes of each model during the first iteration, by [rows, tokens]; later ones run without hooks."""

    def __init__(self, backbones: dict[str, torch.nn.Module]) -> None:
        """Watch these models."""
        self.passes: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in backbones}
        self.hooks = [module.register_forward_hook(self._recorder(name)) for name, module in backbones.items()]

    def _recorder(self, name: str):
        def record(module, inputs, output) -> None:
            self.passes[name][tuple(output.last_hidden_state.shape[:2])] += 1

        return record

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()


def main() -> None:
    """Measure, check and print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    times = IterationTimes()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_of(args, output_dir)
        responses = end_responses(args, trainer)
        trainer.add_callback(times)
        work = FirstIterationWork(
            {
                "policy": trainer.policy_model.transformer,
                "reference": trainer.ref_model.transformer,
                "value": trainer.value_model.transformer,
                "reward": trainer.reward_model.transformer,
            }
        )
        trainer.add_callback(work)
        trainer.train()
    steps = check_work(args, trainer, work)

    print(f"{args.layers} layers x {args.hidden_size} hidden x {args.heads} heads, vocabulary {args.vocab_size}, fp32")
    rows = f"8 to {args.prompt_len}" if args.ragged else f"{args.prompt_len}"
    print(f"{args.prompts} prompts of {rows} tokens, at most {args.response_len} response tokens, {args.minibatches} minibatches")
    if args.ragged:
        print(f"  {statistics.mean(responses):.2f} response tokens on average")
    print(f"1 process, {torch.get_num_threads()} threads, attention {trainer.policy_model.config._attn_implementation}")
    for name, passes in work.passes.items():
        counts = ", ".join(f"{count} x [{rows}, {tokens}]" for (rows, tokens), count in passes.items())
        print(f"  {name:<10} forward passes of an iteration: {counts}")
    print(f"  {trainer.state.global_step} iterations, {trainer.state.episode} episodes, {steps} optimizer steps")
    for number, (seconds, busy) in enumerate(zip(times.seconds, times.busy, strict=True)):
        print(f"  iteration {number:<3} {seconds:8.3f} s, {busy:8.3f} s of CPU{' (warm-up)' if number < args.warmup else ''}")
    print(f"  {'of CPU':<10} {statistics.median(times.busy[args.warmup :]):8.3f} s")
    print(f"{args.prompts / statistics.median(times.seconds[args.warmup :]):.1f} samples/s")


def end_responses(args: argparse.Namespace, trainer: PPOTrainer) -> list[float]:
    """Let responses end after any of several ids where they are ragged; each batch's mean length comes into the list returned."""
    means: list[float] = []
    if not args.ragged:
        return means
    ends = ending_ids(args.vocab_size, most=args.response_len, mean=args.response_len / 4)
    trainer.policy_model.generation_config.eos_token_id = ends
    trainer.policy_model.generation_config.pad_token_id = 0  # of rows that have ended while others go on: an id that can be embedded
    trainer.stop_token_id = ends[0]  # TRL truncates where there is one

    def truncate(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
        ended = (responses >= ends[0]).cumsum(dim=1)
        after = (ended - (responses >= ends[0]).int()) > 0  # an end stands before
        means.append(float((~after).sum(dim=1).float().mean()))
        return responses.masked_fill(after, pad_token_id)

    ppo_trainer.truncate_response = truncate
    return means


def trainer_of(args: argparse.Namespace, output_dir: str) -> PPOTrainer:
    """TRL's trainer on four GPT-2 models of one size."""
    architecture = GPT2Config(
        n_layer=args.layers,
        n_embd=args.hidden_size,
        n_head=args.heads,
        vocab_size=args.vocab_size,
        n_positions=args.prompt_len + args.response_len,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        num_labels=1,
    )
    settings = PPOConfig(
        output_dir=output_dir,
        total_episodes=args.prompts * (args.warmup + args.iterations),
        per_device_train_batch_size=args.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=args.minibatches,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=args.prompts,
        response_length=args.response_len,
        temperature=1.0,
        stop_token=None,
        missing_eos_penalty=None,
        whiten_rewards=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    policy = GPT2LMHeadModel(architecture)
    policy.generation_config.use_cache = True
    trainer = PPOTrainer(
        args=settings,
        processing_class=numbers_tokenizer(args.vocab_size),
        model=policy,
        ref_model=GPT2LMHeadModel(architecture),
        reward_model=GPT2ForSequenceClassification(architecture),
        value_model=GPT2ForSequenceClassification(architecture),
        train_dataset=Dataset.from_dict({"input_ids": prompts_of(args)}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """Random prompts, of one length or of several."""
    lengths = prompt_lengths(args.prompts, longest=args.prompt_len) if args.ragged else [args.prompt_len] * args.prompts
    ids = torch.randint(0, args.vocab_size, (args.prompts, args.prompt_len)).tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def numbers_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token ids written as numbers; padding and end of text are ids that no model can sample."""
    vocab = {str(number): number for number in range(vocab_size)} | {"<pad>": vocab_size, "<eos>": vocab_size + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def check_work(args: argparse.Namespace, trainer: PPOTrainer, work: FirstIterationWork) -> int:
    """Optimizer steps of the whole run, once the work done is known to be the work asked for."""
    seq_len = args.prompt_len + args.response_len
    scored, updated = {(args.prompts, seq_len): 1}, {(args.prompts // args.minibatches, seq_len): args.minibatches}
    generated = {(args.prompts, args.prompt_len): 1, (args.prompts, 1): args.response_len - 1}
    expected = {"policy": generated | updated, "reference": scored, "value": scored | updated, "reward": scored}
    if args.ragged:
        # how far generation went decides the widths: one pass for the prompts, and one of each of the others whatever their width
        for name, passes in work.passes.items():
            rows = Counter({(n, width) for n, width in passes if width > 1})
            assert all(width <= seq_len for _, width in rows), f"TRL made the forward passes {work.passes} of {name}"
            most = expected[name][(args.prompts, 1)] if name == "policy" else 0
            assert passes[(args.prompts, 1)] <= most, f"TRL made the forward passes {work.passes} of {name}"
            kinds = {n: sum(count for (m, width), count in passes.items() if m == n and width > 1) for n in (m for m, _ in rows)}
            wanted = {n: sum(count for (m, width), count in expected[name].items() if m == n and width > 1) for n in kinds}
            assert kinds == wanted, f"TRL made the forward passes {work.passes} of {name}, expected {wanted} by rows"
    else:
        assert work.passes == expected, f"TRL made the forward passes {work.passes} where {expected} were expected"

    iterations = args.warmup + args.iterations
    assert trainer.state.global_step == iterations, trainer.state.global_step
    assert trainer.state.episode == iterations * args.prompts, trainer.state.episode
    states = trainer.optimizer.state
    (steps,) = {int(states[parameter]["step"]) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert steps == iterations * args.minibatches, f"{steps} optimizer steps in {iterations} iterations of {args.minibatches} minibatches"
    return steps


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
    parser.add_argument("--iterations", type=int, default=8, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
