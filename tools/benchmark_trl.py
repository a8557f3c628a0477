"""Samples per second of a full PPO iteration with TRL's PPOTrainer, on the work that tools/benchmark_ppo.py measures.

    pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate
    python tools/benchmark_trl.py                                    one process on the CPU, float32

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

TRL takes the sampling policy's log-probabilities from the scores of generation, so it scores with three forward passes (reference,
value, reward) where benchmark_ppo.py makes four, and it does not clip gradients. The forward passes of the first iteration, the
optimizer's steps and the episodes are counted and compared with what the settings promise. Prints the seconds of each iteration
and, last, a line `N samples/s` (median over the iterations after warm-up).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter

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
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ModuleNotFoundError as error:
    install = "pip install torch==2.13.0 trl==1.9.2 transformers==5.23.0 datasets accelerate"
    raise SystemExit(f"{error}. This benchmark needs TRL 1.9.2 (from 1.13 on TRL has no PPO trainer): {install}") from error


class IterationTimes(TrainerCallback):
    """Seconds of each iteration, from the end of one to the end of the next."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: list[float] = []
        self.mark = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first iteration starts."""
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """An iteration is over: TRL's step is one rollout batch with all its updates."""
        now = time.perf_counter()
        self.seconds.append(now - self.mark)
        self.mark = now


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
    print(f"{args.prompts} prompts of {args.prompt_len} tokens, {args.response_len} response tokens, {args.minibatches} minibatches")
    print(f"1 process, {torch.get_num_threads()} threads, attention {trainer.policy_model.config._attn_implementation}")
    for name, passes in work.passes.items():
        counts = ", ".join(f"{count} x [{rows}, {tokens}]" for (rows, tokens), count in passes.items())
        print(f"  {name:<10} forward passes of an iteration: {counts}")
    print(f"  {trainer.state.global_step} iterations, {trainer.state.episode} episodes, {steps} optimizer steps")
    for number, seconds in enumerate(times.seconds):
        print(f"  iteration {number:<3} {seconds:8.3f} s{' (warm-up)' if number < args.warmup else ''}")
    print(f"{args.prompts / statistics.median(times.seconds[args.warmup :]):.1f} samples/s")


def trainer_of(args: argparse.Namespace, output_dir: str) -> PPOTrainer:
    """TRL's trainer on four GPT-2 models of one size."""
    architecture = GPT2Config(
        n_layer=args.layers,
        n_embd=args.hidden_size,
        n_head=args.heads,
        vocab_size=args.vocab_size,
        n_positions=args.max_seq_len,
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
        train_dataset=Dataset.from_dict({"input_ids": torch.randint(0, args.vocab_size, (args.prompts, args.prompt_len)).tolist()}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def numbers_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token ids written as numbers; padding and end of text are ids that no model can sample."""
    vocab = {str(number): number for number in range(vocab_size)} | {"<pad>": vocab_size, "<eos>": vocab_size + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def check_work(args: argparse.Namespace, trainer: PPOTrainer, work: FirstIterationWork) -> int:
    """Optimizer steps of the whole run, once the work done is known to be the work asked for."""
    seq_len = args.prompt_len + args.response_len
    scored, updated = {(args.prompts, seq_len): 1}, {(args.prompts // args.minibatches, seq_len): args.minibatches}
    generated = {(args.prompts, args.prompt_len): 1, (args.prompts, 1): args.response_len - 1}
    expected = {"policy": generated | updated, "reference": scored, "value": scored | updated, "reward": scored}
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
    parser.add_argument("--max-seq-len", type=int, default=128, help="learned positions")
    parser.add_argument("--prompts", type=int, default=64, help="episodes of one iteration")
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--response-len", type=int, default=32)
    parser.add_argument("--minibatches", type=int, default=4, help="optimizer steps of one iteration")
    parser.add_argument("--iterations", type=int, default=8, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
