"""The sections that stages share. Defaults are the paper's (Ouyang et al. 2022) where it gives one, and say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def at_least(section: object, lowest: float, *names: str) -> list[str]:
    """A sentence for every named field below `lowest`; fields that are None pass."""
    values = {name: getattr(section, name) for name in names}
    return [f"{name} must be at least {lowest}, got {value}" for name, value in values.items() if value is not None and value < lowest]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is spread over the ranks; its data-parallel size is what remains of the world."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    virtual_pp: int = 1
    """Chunks of layers per stage (interleaved 1F1B); needs pp > 1, and pp > 2 where collectives go over gloo."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; needs tp > 1."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 1, "tp", "pp", "virtual_pp")
        if self.virtual_pp > 1 and self.pp == 1:
            found.append(f"virtual_pp {self.virtual_pp} needs pp > 1")
        if self.sequence_parallel and self.tp == 1:
            found.append("sequence_parallel needs tp > 1")
        return found


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and what it leaves there."""

    dir: str
    """The run's folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/. A run started again here goes on from its newest
    checkpoint, at any layout. Its seed, and in sft and reward its batch, must stay; what else has changed is said."""
    seed: int = 1
    """Seed of initial weights, data order, dropout and sampling."""
    save_every: int = 0
    """Steps (PPO: iterations) between checkpoints, besides those of save_minutes and the last; 0: none."""
    save_minutes: float | None = 30.0
    """Minutes after which the next step saves a checkpoint whatever its number; null: never."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; older ones are removed after a newer is complete."""
    resume: Literal["newest", "newest_good"] = "newest"
    """The checkpoint to go on from: the newest, refused where it is damaged; or the newest whose files are what was written."""
    max_skipped_steps: int = 10
    """Steps in a row without finite gradients after which the run stops; those by which fp16 finds its loss scale do not count."""
    eval_every: int = 0
    """Steps (PPO: iterations) between evaluations on validation data; 0 evaluates at the end only."""
    sinks: tuple[Literal["jsonl", "wandb", "tensorboard"], ...] = ("jsonl",)
    """Where metrics go. jsonl is metrics.jsonl in the run's folder."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """Whether wandb sends what it records."""
    threads: int | None = None
    """torch CPU threads of each rank; None leaves torch's own choice."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 0, "seed", "save_every", "save_minutes", "eval_every")
        return found + at_least(self, 1, "keep_checkpoints", "max_skipped_steps", "threads")


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """A model built from nothing: a GPT-3 preset, or sizes, or a preset with some sizes replaced."""

    preset: str | None = None
    """gpt3-125m, gpt3-350m, gpt3-760m, gpt3-1.3b, gpt3-2.7b, gpt3-6.7b, gpt3-13b or gpt3-175b (Brown et al. 2020, Table 2.1)."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_heads: int | None = None
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key-value heads (grouped-query attention); None: as many as heads."""
    ffn_size: int | None = None
    """Width of the feed-forward layer; None: four times hidden_size."""
    max_seq_len: int | None = None
    """Context in tokens; None: 2048."""
    head_size: int | None = None
    """Width of one attention head; None: hidden_size / num_heads."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each sublayer."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    """Feed-forward activation; gelu_tanh is GPT-2's."""
    parallel_residual: bool = False
    """Attention and feed-forward both read the layer's input (GPT-NeoX)."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (Qwen3)."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position embedding."""
    rotary_base: float = 10000.0
    """Base period of rotary positions."""
    rotary_fraction: float = 1.0
    """Share of each head that rotary positions turn (GPT-NeoX: 0.25)."""
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies are changed for a lengthened context: not, all divided by the factor, or the slow ones (Llama 3.1)."""
    rotary_scaling_factor: float = 1.0
    """What frequencies are divided by."""
    rotary_low_frequency_factor: float = 1.0
    """llama3: frequencies that turn less often than this in the original context are divided."""
    rotary_high_frequency_factor: float = 4.0
    """llama3: frequencies that turn more often than this in the original context stay."""
    rotary_original_context: int = 8192
    """llama3: the context in tokens before it was lengthened."""
    bias: bool = True
    """Biases in linear layers."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values where `bias` is off (Qwen2)."""
    tied_embeddings: bool = True
    """Whether the language-model head is the embedding."""
    init_std: float = 0.02
    """Standard deviation of initial weights (GPT-2)."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "max_seq_len", "head_size")
        found = at_least(self, 1, *sizes, "rotary_scaling_factor", "rotary_original_context")
        if not 0 < self.rotary_fraction <= 1:
            found.append(f"rotary_fraction must be in (0, 1], got {self.rotary_fraction}")
        return found


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of a run: where its weights come from, how it is laid out and computed."""

    load: str | None = None
    """A run folder or a checkpoint to take weights and architecture from."""
    load_model: str | None = None
    """Which of a checkpoint's models; None: the only one, or the policy of a PPO run."""
    load_average: bool = True
    """Take the exponential moving average where the checkpoint has one (Ouyang et al. 2022, Appendix C.4)."""
    architecture: ArchitectureConfig | None = None
    """A model with fresh weights; needed where `load` is not given."""
    parallel: ParallelConfig | None = None
    """This model's layout; None: the run's `parallel`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Weights and activations; a trained model keeps float32 master weights (the paper: fp16)."""
    micro_batch_size: int = 8
    """Most rows of one forward pass."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 1, "micro_batch_size")
        if (self.load is None) == (self.architecture is None):
            both = "both are" if self.load is not None else "neither is"
            found.append(f"load (weights of an earlier run) or architecture (fresh weights) must be given, and not both; {both}")
        return found


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """AdamW and its learning rate."""

    learning_rate: float
    """Peak learning rate."""
    beta1: float = 0.9
    """First-moment decay (Ouyang et al. 2022, Appendix C)."""
    beta2: float = 0.95
    """Second-moment decay (Ouyang et al. 2022, Appendix C)."""
    eps: float = 1e-8
    """Added to the root of the second moment (Brown et al. 2020, Appendix B)."""
    weight_decay: float = 0.0
    """Decoupled decay of weight matrices; the paper names none."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm (Brown et al. 2020, Appendix B); null does not clip."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 0, "learning_rate", "eps", "weight_decay", "clip_grad")
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        return found + [f"{name} must be in [0, 1), got {beta}" for name, beta in betas.items() if not 0 <= beta < 1]


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(ModelConfig):
    """A model that is trained."""

    adam: AdamConfig
    """Its optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of attention, or those of whole layers."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that every model of a run shares."""

    path: str
    """A sentencepiece .model, a Hugging Face tokenizer.json, or a folder with GPT-2's vocab.json and merges.txt."""
    eos_token: str | None = None
    """The end-of-text token's text where the file does not say which it is."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long rows may be, and what happens to records that cannot be used."""

    max_prompt_len: int = 1024
    """Most tokens of a prompt (Ouyang et al. 2022, Appendix C: longer ones were filtered out)."""
    max_response_len: int = 1024
    """Most tokens of a response, EOS included (Ouyang et al. 2022, Appendix C)."""
    on_bad_record: Literal["raise", "skip"] = "raise"
    """A broken or too long record: stop with its file and line, or leave it out and report how many were."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return at_least(self, 1, "max_prompt_len") + at_least(self, 2, "max_response_len")



@dataclass(frozen=True, kw_only=True)
class HeldOutTextConfig:
    """Packed text to evaluate on, in Megatron's .bin/.idx format."""

    valid_prefix: str | None = None
    """Held-out text: path of the .bin and .idx files without their endings."""
    seq_len: int = 2048
    """Tokens of one packed row (the paper's context)."""
    valid_rows: int = 64
    """Most held-out rows to evaluate on."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        return at_least(self, 2, "seq_len") + at_least(self, 1, "valid_rows")


@dataclass(frozen=True, kw_only=True)
class PretrainingDataConfig(HeldOutTextConfig):
    """Pretraining text in Megatron's .bin/.idx format, written by tools/preprocess_data.py, and held-out text beside it."""

    prefix: str
    """Path of the .bin and .idx files without their endings."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 1.0
    """What logits are divided by (Ouyang et al. 2022, Appendix C.4: 1); 0 takes the most likely token."""
    top_k: int | None = None
    """Sample among the k most likely tokens only; null: all. In PPO top_k and top_p bias the update: its ratio is of the
    probabilities over the whole vocabulary, which are not those that were sampled from."""
    top_p: float | None = None
    """Sample among the smallest set with this probability; null: all."""
    max_new_tokens: int = 1024
    """Longest response, EOS included (Ouyang et al. 2022, Appendix C)."""
    max_batch_size: int | None = None
    """Most rows that one copy of the generator holds at a time; null: all of its share."""

    def violations(self) -> list[str]:
        """Rules within the section."""
        found = at_least(self, 0, "temperature") + at_least(self, 1, "top_k", "max_new_tokens", "max_batch_size")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p must be in (0, 1], got {self.top_p}")
        return found


