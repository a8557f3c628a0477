"""How much a step and a run compute by the model's own arithmetic: what utilisation and PF-days are counted in."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megarlhf.config import ConfigError
from megarlhf.config.dpo import DpoConfig
from megarlhf.config.training import RewardConfig
from megarlhf.data.files import BadRecord, record_of, stored_records
from megarlhf.models.architecture import Architecture
from megarlhf.models.parameters import Head
from megarlhf.planning.models import RunModels

DEMONSTRATIONS, RANKINGS = 12_725, 33_207
"""Ouyang et al. 2022, Table 6: training prompts of the SFT and the reward model."""
PAIR = ("chosen", "rejected")
"""What a record compares that holds no list."""
COMPLETIONS = 9
"""Most completions of one prompt (Ouyang et al. 2022, section 3.5: 4 to 9)."""
FIRST_RECORDS = 100
PF_DAY = 1e15 * 86_400


@dataclass(frozen=True)
class Work:
    """What one step does, and how many there are."""

    model_flops: float
    """Of the step, without anything computed again; attention over whole rows (Narayanan et al. 2021, equation 3)."""
    update_flops: float
    """Its part in forward and backward passes."""
    tokens: int
    """That are trained on in a step (PPO: the policy's episodes and text)."""
    episode_tokens: int
    """PPO: prompts and responses of an iteration, else 0."""
    steps: int
    notes: tuple[str, ...] = ()
    """What had to be assumed."""


def forward_flops(a: Architecture, head: Head, *, width: int, logits: int, rows: int = 1) -> float:
    """FLOPs of a forward pass over rows of `width` tokens, of which `logits` go through the head.

    The last layer is asked for these alone: of the others it needs keys and values (models/layer.py).
    """
    queries, keys = a.num_heads * a.head_size, a.num_kv_heads * a.head_size
    gate = 2 if a.activation == "swiglu" else 1
    layer = a.hidden_size * (2 * queries + 2 * keys + (gate + 1) * a.ffn_size)
    token = 2 * a.num_layers * (layer + 2 * queries * width)
    unasked = 2 * a.hidden_size * (queries + (gate + 1) * a.ffn_size)  # of a token: behind the last layer's attention
    output = 2 * a.vocab_size * a.hidden_size if head == "lm" else 2 * a.hidden_size
    return rows * (width * token - (width - logits) * unasked + logits * output)


def work_of(models: RunModels) -> Work:
    """The work of a stage's step with rows as long as they may be."""
    of_stage = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "dpo": _dpo, "ppo": _ppo}
    return of_stage[models.config.stage](models)


def _pretrain(models: RunModels) -> Work:
    c, plan = models.config, models.plans["model"]
    flops = 3 * forward_flops(plan.architecture, "lm", width=c.data.seq_len, logits=c.data.seq_len, rows=c.batch_size)
    return Work(flops, flops, c.batch_size * c.data.seq_len, 0, c.steps)


def _sft(models: RunModels) -> Work:
    c, a = models.config, models.plans["model"].architecture
    width = c.limits.max_prompt_len + c.limits.max_response_len
    flops, tokens = forward_flops(a, "lm", width=width, logits=c.limits.max_response_len, rows=c.batch_size), c.batch_size * width
    if c.pretraining_mix:
        text_rows = max(1, round(c.pretraining_mix * c.batch_size))
        flops += forward_flops(a, "lm", width=c.data.pretraining.seq_len, logits=c.data.pretraining.seq_len, rows=text_rows)
        tokens += text_rows * c.data.pretraining.seq_len
    number, notes = _records(c.data.train, DEMONSTRATIONS, "demonstrations")
    return Work(3 * flops, 3 * flops, tokens, 0, c.epochs * math.ceil(number / c.batch_size), notes)


def _reward(models: RunModels) -> Work:
    c, a = models.config, models.plans["model"].architecture
    completions, notes = completions_of_prompt(c)
    width, rows = c.limits.max_prompt_len + c.limits.max_response_len, c.batch_size * completions
    flops = 3 * forward_flops(a, "scalar", width=width, logits=1, rows=rows)
    number, assumed = _records(c.data.train, RANKINGS, "rankings")
    return Work(flops, flops, rows * width, 0, c.epochs * math.ceil(number / c.batch_size), (*assumed, *notes))


def _dpo(models: RunModels) -> Work:
    c, a = models.config, models.plans["model"].architecture
    completions, notes = completions_of_prompt(c)
    width, rows = c.limits.max_prompt_len + c.limits.max_response_len, c.batch_size * completions
    how = {"width": width, "logits": c.limits.max_response_len, "rows": rows}
    update, tokens = 3 * forward_flops(a, "lm", **how), rows * width
    if c.dpo.ptx_coef:
        seq_len, text_rows = c.data.pretraining.seq_len, c.dpo.ptx_ratio * c.batch_size
        update += 3 * forward_flops(a, "lm", width=seq_len, logits=seq_len, rows=text_rows)
        tokens += text_rows * seq_len
    judged = forward_flops(models.plans["reference"].architecture, "lm", **how) / c.epochs  # each ranking once, before the first step
    number, assumed = _records(c.data.train, RANKINGS, "rankings")
    notes = (*notes, "reference: it is asked before the model is built and then let go of; its seconds are spread over the steps")
    return Work(update + judged, update, tokens, 0, c.epochs * math.ceil(number / c.batch_size), (*assumed, *notes))


def completions_of_prompt(config: RewardConfig | DpoConfig) -> tuple[int, tuple[str, ...]]:
    """(completions of a prompt, as the file of rankings has most often, else as many as were ranked in the paper; what was assumed).

    ConfigError where the file is damaged.
    """
    path = Path(config.data.train)
    if path.is_file():
        try:
            records = [record_of(*stored) for stored in itertools.islice(stored_records(path), FIRST_RECORDS)]
        except BadRecord as error:
            raise ConfigError(f"data.train: {error}") from error
        lists = [[record[name] for name in ("responses", "summaries") if isinstance(record.get(name), list)] for record in records]
        if lists:
            return Counter(len(found[0] if found else PAIR) for found in lists).most_common(1)[0][0], ()
    number = min(COMPLETIONS, config.model.micro_batch_size)
    return number, (f"{path} is not here: {number} completions of each prompt are assumed",)


def _ppo(models: RunModels) -> Work:
    c, s = models.config, models.config.ppo
    policy, others = models.plans["policy"].architecture, ("value", "reward", "reference")
    new = c.generation.sampling.max_new_tokens
    prompt, width = c.limits.max_prompt_len, c.limits.max_prompt_len + new
    episodes = {"width": width, "rows": s.batch_size}
    of_policy = forward_flops(policy, "lm", logits=new, **episodes)
    scoring = of_policy * s.recompute_logprobs
    of_others = {
        role: forward_flops(models.plans[role].architecture, models.plans[role].head, logits=new, **episodes)
        for role in others
        if role in models.plans
    }
    scoring += sum(of_others.values())
    text_rows = s.ptx_ratio * s.batch_size if s.ptx_coef else 0
    seq_len = c.data.pretraining.seq_len if s.ptx_coef else 0
    text = forward_flops(policy, "lm", width=seq_len, logits=seq_len, rows=text_rows)
    update = 3 * s.epochs * (of_policy + of_others.get("value", 0.0) + text)
    half = (prompt + width) // 2  # a new token attends to this many on average
    generate = forward_flops(policy, "lm", width=prompt, logits=1, rows=s.batch_size)
    generate += forward_flops(policy, "lm", width=half, logits=half, rows=s.batch_size) * new / half
    tokens = s.epochs * (s.batch_size * width + text_rows * seq_len)
    return Work(update + scoring + generate, update, tokens, s.batch_size * width, s.iterations)


def _records(path: Path | str, assumed: int, what: str) -> tuple[int, tuple[str, ...]]:
    path = Path(path)
    if path.is_file():
        try:
            return max(1, sum(1 for _ in stored_records(path))), ()
        except BadRecord as error:
            raise ConfigError(f"data: {error}") from error
    return assumed, (f"{path} is not here: the paper's {assumed:,} {what} are assumed",)
