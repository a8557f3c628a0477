"""The sections that stages share. Defaults are the paper's (Ouyang et al. 2022) where it gives one, and say so."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from megarlhf.config.architecture import ArchitectureConfig
from megarlhf.config.rules import (
    ROWS,
    TOKENS,
    Corpus,
    Count,
    CountOrNone,
    InputFile,
    NotNegative,
    OutputFolder,
    Positive,
    Range,
    Rows,
    RunOrCheckpoint,
    Share,
    ShareBelowOne,
    Text,
    TokenizerPath,
    Tokens,
)

Precision = Literal["fp32", "bf16", "fp16"]
Ranks = Annotated[int, Range(1, 2**16, why="there are not that many ranks")]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is spread over the ranks; its data-parallel size is what remains of the world."""

    tp: Ranks = 1
    """Tensor-parallel ranks."""
    pp: Ranks = 1
    """Pipeline stages."""
    virtual_pp: Ranks = 1
    """Chunks of layers per stage (interleaved 1F1B); needs pp > 1."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; needs tp > 1."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = []
        if self.virtual_pp > 1 and self.pp == 1:
            found.append(f"virtual_pp {self.virtual_pp} needs pp > 1")
        if self.sequence_parallel and self.tp == 1:
            found.append("sequence_parallel needs tp > 1")
        return found


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and what it leaves there."""

    dir: OutputFolder
    """The run's folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/. A run started again here goes on from its newest
    checkpoint, at any layout. Its seed, and in sft and reward its batch, must stay; what else has changed is said."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    """Seed of initial weights, data order, dropout and sampling."""
    save_every: CountOrNone = 0
    """Steps (PPO: iterations) between checkpoints, besides those of save_minutes and the last; 0: none."""
    save_minutes: Annotated[float, Range(0, 1e6)] | None = 30.0
    """Minutes after which the next step saves a checkpoint whatever its number; null: never."""
    stop_after_minutes: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """Minutes after its start at which a run saves and stops, after the step that is under way, with exit status 75, on which the Slurm
    scripts start it again; null: never. A step is taken in any case."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay; older ones are removed after a newer is complete."""
    keep_every: CountOrNone = 0
    """Checkpoints of steps that this divides stay for good, besides the newest; 0: none."""
    save_in_background: bool = True
    """Copy what is to be saved to host memory and write it beside the steps that follow; the last save is waited for. Where half of
    the free memory does not hold the copy, and with false, training waits until a checkpoint is written."""
    resume: Literal["newest", "newest_good"] = "newest"
    """The checkpoint to go on from: the newest, refused where it is damaged; or the newest whose files are what was written."""
    max_skipped_steps: Count = 10
    """Steps in a row without finite gradients after which the run stops; those by which fp16 finds its loss scale do not count."""
    alert_deviations: Annotated[float, Range(1, 1e6)] | None = 8.0
    """A loss or KL so many robust deviations above the median of those before raises an alert metric and a line; null: none does."""
    alert_window: Annotated[int, Range(2, 10**5)] = 50
    """Steps (PPO: iterations) before that alerts are measured by; there is none before so many."""
    eval_every: CountOrNone = 0
    """Steps (PPO: iterations) between evaluations on validation data; 0 evaluates at the end only."""
    sinks: tuple[Literal["jsonl", "wandb", "tensorboard"], ...] = ("jsonl",)
    """Where metrics go. jsonl is metrics.jsonl in the run's folder."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """Whether wandb sends what it records."""
    profile_step: CountOrNone = 0
    """Step (PPO: iteration) that torch's profiler records, into <dir>/profiles, a trace of each rank for ui.perfetto.dev or Chrome with
    the phases by their names; 0: none. Recorded steps are slower."""
    threads: Annotated[int, Range(1, 4096)] | None = None
    """torch CPU threads of each rank; None leaves torch's own choice."""
    timeout_minutes: Annotated[float, Range(0.05, 10080)] = 30.0
    """How long a rank waits for another, at the start and in every exchange, before the run ends."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return [f"sinks names {kind} twice" for kind in dict.fromkeys(self.sinks) if self.sinks.count(kind) > 1]

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        found = [] if self.sinks else ["sinks is empty: the run leaves no metrics"]
        if self.wandb_mode == "online" and "wandb" not in self.sinks:
            found.append("wandb_mode is online, and sinks does not name wandb")
        return found


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of a run: where its weights come from, how it is laid out and computed."""

    load: RunOrCheckpoint | None = None
    """A run folder or a checkpoint to take weights and architecture from."""
    load_model: Text | None = None
    """Which of a checkpoint's models; None: the only one, or the policy of a PPO run."""
    load_average: bool = True
    """Take the exponential moving average where the checkpoint has one (Ouyang et al. 2022, Appendix C.4)."""
    architecture: ArchitectureConfig | None = None
    """A model with fresh weights, where `load` is not given; only for models that are trained."""
    parallel: ParallelConfig | None = None
    """This model's layout; None: the run's `parallel`."""
    precision: Precision = "fp32"
    """Weights and activations; a trained model keeps float32 master weights (the paper: fp16)."""
    micro_batch_size: Rows = 8
    """Most rows of one forward pass; they pass one after the other, without padding."""
    micro_batch_tokens: Annotated[int, Range(1, 2**24)] | None = None
    """Most tokens of one forward pass, whatever the number of rows, in place of micro_batch_size; a longer row passes alone."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        if self.load is None and self.architecture is None and not isinstance(self, TrainedModelConfig):
            return ["load must be given: a run's folder or a checkpoint to take weights from"]
        if (self.load is None) == (self.architecture is None):
            both = "both are" if self.load is not None else "neither is"
            return [f"load (weights of an earlier run) or architecture (fresh weights) must be given, and not both; {both}"]
        found = []
        if self.architecture is not None and not isinstance(self, TrainedModelConfig):
            found.append("architecture would give random weights to a model that is never trained: give load, a run or a checkpoint")
        if self.load is None and self.load_model is not None:
            found.append(f"load_model {self.load_model} names a model of a checkpoint, and load is not given")
        return found


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """AdamW and its learning rate."""

    learning_rate: NotNegative
    """Peak learning rate."""
    beta1: ShareBelowOne = 0.9
    """First-moment decay (Ouyang et al. 2022, Appendix C)."""
    beta2: ShareBelowOne = 0.95
    """Second-moment decay (Ouyang et al. 2022, Appendix C)."""
    eps: Annotated[float, Range(1e-20, 1)] = 1e-8
    """Added to the root of the second moment (Brown et al. 2020, Appendix B)."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Decoupled decay of weight matrices; the paper names none."""
    clip_grad: Positive | None = 1.0
    """Largest global gradient norm (Brown et al. 2020, Appendix B); null does not clip."""

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        if self.learning_rate == 0:
            return ["learning_rate 0 trains nothing"]
        found = [f"learning_rate {self.learning_rate:g} moves every weight by about as much in each step"] if self.learning_rate > 1 else []
        if self.learning_rate * self.weight_decay >= 1:
            found.append(f"weight_decay {self.weight_decay:g} times learning_rate {self.learning_rate:g} removes the weights in one step")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(ModelConfig):
    """A model that is trained."""

    adam: AdamConfig
    """Its optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of attention, or those of whole layers."""
    overlap: bool = False
    """Exchange gradients and weights between data-parallel ranks in parts, beside the computation: the sums are the same but for
    their order."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that every model of a run shares."""

    path: TokenizerPath
    """A sentencepiece .model, a Hugging Face tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt."""
    eos_token: Text | None = None
    """The end-of-text token's text where the file does not say which it is."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long rows may be, and what happens to records that cannot be used."""

    max_prompt_len: Tokens = 1024
    """Most tokens of a prompt (Ouyang et al. 2022, Appendix C: longer ones were filtered out)."""
    max_response_len: Annotated[int, Range(2, TOKENS, why="no model here has a longer context")] = 1024
    """Most tokens of a response, EOS included (Ouyang et al. 2022, Appendix C)."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """A broken or too long record: stop with its file and line, or leave it out and report how many were."""


@dataclass(frozen=True, kw_only=True)
class HeldOutTextConfig:
    """Packed text to evaluate on, in Megatron's .bin/.idx format."""

    valid_prefix: Corpus | None = None
    """Held-out text: path of the .bin and .idx files without their endings."""
    seq_len: Annotated[int, Range(2, TOKENS)] = 2048
    """Tokens of one packed row (the paper's context)."""
    valid_rows: Annotated[int, Range(1, ROWS)] = 64
    """Most held-out rows to evaluate on."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One corpus of a blend."""

    prefix: Corpus
    """Path of its .bin and .idx files without their endings."""
    weight: Positive
    """Its share of the rows is this over the sum of all weights, whatever its size."""


@dataclass(frozen=True, kw_only=True)
class PretrainingDataConfig(HeldOutTextConfig):
    """Pretraining text in Megatron's .bin/.idx format, written by `megarlhf preprocess`, and held-out text beside it."""

    prefix: Corpus | None = None
    """Path of the .bin and .idx files without their endings; null: `blend` names several."""
    blend: tuple[CorpusConfig, ...] = ()
    """Several corpora whose rows are mixed by weight: [{prefix: wiki, weight: 0.3}, {prefix: books, weight: 0.7}]."""
    loader: Literal["default", "dali"] = "default"
    """How rows are read: directly, or ahead of time by NVIDIA DALI (its package must be installed). Both give the same batches."""

    def corpora(self) -> list[tuple[str, str, float]]:
        """(key within the section, prefix, weight) of each corpus."""
        if self.prefix is not None:
            return [("prefix", self.prefix, 1.0)]
        return [(f"blend[{number}].prefix", corpus.prefix, corpus.weight) for number, corpus in enumerate(self.blend)]

    def violations(self) -> list[str]:
        """Rules within the section."""
        if (self.prefix is None) == (not self.blend):
            given = "neither is" if self.prefix is None else "both are"
            return [f"prefix (one corpus) or blend (several with weights) must be given, and not both; {given}"]
        names = Counter(os.path.normpath(corpus.prefix) for corpus in self.blend)
        return [
            f"blend names {name} {count} times: name it once, with the sum of the weights" for name, count in names.items() if count > 1
        ]

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        return [
            f"valid_prefix is {key}, {prefix}: the loss on it is that of text trained on"
            for key, prefix, _ in self.corpora()
            if prefix == self.valid_prefix
        ]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: Annotated[float, Range(0, 100)] = 1.0
    """What logits are divided by (Ouyang et al. 2022, Appendix C.4: 1); 0 takes the most likely token."""
    top_k: Annotated[int, Range(1, 10**7)] | None = None
    """Sample among the k most likely tokens only; null: all. In PPO top_k and top_p bias the update: its ratio is of the
    probabilities over the whole vocabulary, which are not those that were sampled from."""
    top_p: Annotated[float, Range(0, 1, above=True)] | None = None
    """Sample among the smallest set with this probability; null: all."""
    max_new_tokens: Tokens = 1024
    """Longest response, EOS included (Ouyang et al. 2022, Appendix C)."""
    max_batch_size: Rows | None = None
    """Most rows that one copy of the generator holds at a time, a waiting one entering where another ends; null: all of its share."""
    kv_cache_bytes: Annotated[int, Range(1, 2**50)] | None = None
    """Most bytes of keys and values on a rank while responses are sampled: as many rows at a time as they hold; null: max_batch_size
    alone decides. Fewer than one row takes are refused, with what it takes."""
    cuda_graphs: bool = False
    """Capture the steps that only decode as CUDA graphs, a few sizes of batch, and repeat them; refused where the device is no GPU."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        if 0 < self.temperature < 0.01:
            return [f"temperature must be 0 (the most likely token) or at least 0.01, got {self.temperature:g}: logits would overflow"]
        return []

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        cut = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        return [f"{name} has no effect with temperature 0" for name in cut] if self.temperature == 0 else []


@dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """How often A's answers are better than B's to the same prompts."""

    responses: InputFile | None = None
    """A's answers, JSONL such as a run's responses.jsonl; null: the model's to `prompts`."""
    against: InputFile | None = None
    """B's answers: `reward`, or `model` where that is a reward model, says whose is better."""
    labels: InputFile | None = None
    """JSONL of {"id" or "prompt", "preference": "a", "b" or "tie"}: people say whose is better."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return ["responses are compared with B's: against must name their file"] if self.responses and self.against is None else []

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        same = self.against is not None and self.against == self.responses
        return [f"against is responses, {self.against}: a model ties with itself"] if same else []


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves from step to step."""

    shape: Literal["cosine", "constant"] = "cosine"
    """cosine: to final_fraction of the peak over the whole run (Ouyang et al. 2022, Appendices C.1 to C.3); constant."""
    warmup_steps: CountOrNone = 0
    """Linear warm-up steps (the paper's SFT: none)."""
    final_fraction: Share = 0.1
    """What the cosine ends at, as a fraction of the peak."""

    def doubts(self) -> list[str]:
        """What is hardly meant."""
        idle = self.shape == "constant" and self.final_fraction != 0.1
        return [f"final_fraction {self.final_fraction:g} has no effect with shape constant"] if idle else []


@dataclass(frozen=True, kw_only=True)
class AdaptiveKlConfig:
    """A coefficient that follows a target KL (Ziegler et al. 2019, section 2.2); the paper's is fixed."""

    target: Positive = 6.0
    """KL of a whole response in nats."""
    horizon: Count = 10000
    """Episodes over which the coefficient may move by about a fifth."""
