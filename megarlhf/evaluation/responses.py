"""Responses sampled for a fixed set of prompts, and what a reward model and a reference say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from megarlhf.batch import Prompts, Rollouts
from megarlhf.config.sections import SamplingConfig
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine, require_finite
from megarlhf.generation.generator import Generator
from megarlhf.generation.in_flight import Listener
from megarlhf.parallel.seed import derive_seed

NUM_SAMPLES = 4
"""Responses that a run writes down at each iteration or evaluation, to be read."""
ANSWER_FIELDS = ("prompt", "response", "finished", "reward", "kl", "sample")
"""What the record of an answer says of itself."""

SAID = "log-probabilities of what it says"
Purpose = Literal["ppo rollouts", "ppo validation", "sft validation", "generate", "evaluate", "chat"]
"""What responses are sampled for. Each has a noise of its own, of the same seed: no two purposes see the same draws."""


class Scorer(Protocol):
    """What gives responses a score: a reward model's engine, or rewards of one's own."""

    def scores(self, batch: Rollouts) -> Tensor:
        """[batch] float32, the same on every rank."""
        ...


@dataclass(frozen=True)
class Judged:
    """Responses and their judgement."""

    rollouts: Rollouts
    scores: Tensor | None
    """[batch] of the reward model, where there is one."""
    kl: Tensor | None
    """[batch] nats: sum over the response of log pi - log pi_ref, where there is a reference."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means under `prefix`: reward_mean, kl, response_len, finished_fraction."""
        lengths = (self.rollouts.lengths - self.rollouts.prompt_lengths).double()
        means = {"response_len": lengths.mean(), "finished_fraction": self.rollouts.finished.double().mean()}
        if self.scores is not None:
            means["reward_mean"] = self.scores.double().mean()
        if self.kl is not None:
            means["kl"] = self.kl.double().mean()
        return {f"{prefix}/{name}": float(value) for name, value in means.items()}


@dataclass(frozen=True)
class ResponseJudge:
    """Samples a response to every prompt, each time with the same noise, and judges it."""

    generator: Generator
    prompts: Prompts
    sampling: SamplingConfig
    seed: int
    purpose: Purpose
    reward: Scorer | None = None
    reference: Engine | None = None
    policy: Engine | None = None
    """The engine behind the generator; needed with a reference."""

    def judge(self) -> Judged:
        """The generator's present weights on the fixed prompts."""
        rollouts = generate(self.generator, self.prompts, self.sampling, seed=self.seed, purpose=self.purpose)
        scores = self.reward.scores(rollouts) if self.reward is not None else None
        kl = None
        if self.reference is not None:
            mask, temperature = rollouts.response_mask, self.sampling.temperature or 1.0
            logprobs, ref_logprobs = (m.logprobs(rollouts, mask, temperature=temperature) for m in (self.policy, self.reference))
            kl = (logprobs - ref_logprobs).sum(dim=1)
        return Judged(rollouts, scores, kl)


def generator_of(engine: Engine, tokenizer: Tokenizer, *, stop_ids: Sequence[int] = ()) -> Generator:
    """A generator in the engine's own layout, from its own weights; responses end after any of `stop_ids` too."""
    return Generator(
        engine.transformers,
        engine.groups,
        architecture=engine.spec.architecture,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        stop_ids=stop_ids,
        check_weights=lambda: engine.offload.need("weights"),
    )


def generate(
    generator: Generator,
    prompts: Prompts,
    sampling: SamplingConfig,
    *,
    seed: int,
    purpose: Purpose,
    iteration: int = 0,
    listener: Listener | None = None,
) -> Rollouts:
    """Sample one response to each prompt as `sampling` says, with the noise of (seed, purpose, iteration).

    NotFiniteError where their log-probabilities are not finite, since any token can come of such; those of PPO's rollouts are left to
    the update, which knows of it.
    """
    rollouts = generator.generate(
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=derive_seed(seed, "sampling", purpose),
        iteration=iteration,
        max_batch_size=sampling.max_batch_size,
        kv_cache_bytes=sampling.kv_cache_bytes,
        cuda_graphs=sampling.cuda_graphs,
        listener=listener,
    )
    if purpose != "ppo rollouts":
        require_finite(rollouts.logprobs, SAID, precision=generator.precision)
    return rollouts


def response_records(
    rollouts: Rollouts,
    tokenizer: Tokenizer,
    *,
    first: int | None = None,
    fields: Sequence[Mapping[str, Any]] = (),
    **columns: Tensor | None,
) -> list[dict[str, object]]:
    """The `first` rollouts (None: all) as text: "prompt", "response", "finished", and their number in every column [batch] given.

    `fields` [batch] are what the prompts' records said besides: they stand in the answer's record too, with "input_" before
    a name that means something else there.
    """
    records = []
    for i in range(rollouts.num_rows if first is None else min(first, rollouts.num_rows)):
        start, stop = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
        ids = rollouts.tokens[i, :stop].tolist()
        record = answer_record(tokenizer, ids[:start], ids[start:], finished=bool(rollouts.finished[i]), fields=fields[i] if fields else {})
        records.append(record | {name: float(column[i]) for name, column in columns.items() if column is not None})
    return records


def answer_record(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], *, finished: bool, fields: Mapping[str, Any]
) -> dict[str, object]:
    """The record of one answer, from token ids."""
    said = {"prompt": tokenizer.decode(list(prompt)), "response": tokenizer.decode(list(response)), "finished": finished}
    return _carried(fields) | said


def response_lines(judged: Judged, tokenizer: Tokenizer, prompts: Sequence[PromptRow]) -> str:
    """The answers to `prompts` and their judgement, as JSON lines."""
    fields = [row.fields for row in prompts]
    records = response_records(judged.rollouts, tokenizer, fields=fields, reward=judged.scores, kl=judged.kl)
    return "".join(json.dumps(record) + "\n" for record in records)


def _carried(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's fields under names that an answer does not use itself."""
    carried = {name: value for name, value in fields.items() if name not in ANSWER_FIELDS}
    for name in (name for name in fields if name in ANSWER_FIELDS):  # in their order: that of a set is another in every process
        free = f"input_{name}"
        while free in carried:
            free = f"input_{free}"
        carried[free] = fields[name]
    return carried
