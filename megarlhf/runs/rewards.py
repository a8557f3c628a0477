"""Rewards of one's own beside a reward model's, or in its place: functions that a user wrote, called on rank 0 for all ranks."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.algorithms.rewards import weighted_rewards
from megarlhf.batch import Rollouts
from megarlhf.config.ppo import PpoRewardConfig, RewardFunctionConfig
from megarlhf.data.functions import found_at, load_function
from megarlhf.data.tokenized import PromptRow
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.engine import Engine
from megarlhf.evaluation.responses import response_records
from megarlhf.parallel.groups import World
from megarlhf.runs.agreement import on_rank_0

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
"""(prompts, responses, the other fields of the prompts' records) -> a reward for each response."""
LARGEST = torch.finfo(torch.float32).max
MODEL = "model"
"""What the reward model is called among the rewards."""


class RewardFunctions:
    """The functions that a configuration names, loaded on rank 0 alone: nothing else is ever imported."""

    def __init__(self, configs: Sequence[RewardFunctionConfig], world: World) -> None:
        """Load them; a collective of the world. What is wrong is in `problems`, the same on every rank."""
        self.configs = configs
        self.world = world
        self._functions: list[Function] = []
        self.fingerprints: dict[str, str]
        """The key of each function -> a hash of its file's content and of its name, for a resume to find again."""
        self.fingerprints, self.problems = on_rank_0(world, self._load)

    def _load(self) -> tuple[dict[str, str], list[str]]:
        fingerprints, problems = {}, []
        for number, config in enumerate(self.configs):
            key = f"reward.functions[{number}].function"
            try:
                self._functions.append(load_function(config.function))
            except ValueError as error:
                problems.append(f"{key}: {error}")
            else:
                content = Path(config.path).read_bytes() + config.name.encode()
                fingerprints[key] = hashlib.sha256(content).hexdigest()
        return fingerprints, problems

    def values(self, rollouts: Rollouts, rows: Sequence[PromptRow], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Name -> [batch] float32; a collective of the world. `rows` are the prompts of the rollouts, one each.

        ConfigError on every rank, with the record where one is at fault, where a function fails or gives no finite numbers.
        """
        if not self.configs:
            return {}
        return on_rank_0(self.world, self._values, rollouts, rows, tokenizer)

    def _values(self, rollouts: Rollouts, rows: Sequence[PromptRow], tokenizer: Tokenizer) -> dict[str, Tensor]:
        texts = response_records(rollouts, tokenizer)
        prompts, responses = [text["prompt"] for text in texts], [text["response"] for text in texts]
        found = {}
        for config, function in zip(self.configs, self._functions, strict=True):
            found[config.name] = torch.tensor(called(function, config.function, prompts, responses, rows))
        return found


def called(function: Function, name: str, prompts: list[str], responses: list[str], rows: Sequence[PromptRow]) -> list[float]:
    """What a function gives for a batch. ValueError where it fails, or gives anything but one finite number for each response."""

    def of(part: slice) -> Any:
        return function(prompts[part], responses[part], [copy.deepcopy(dict(row.fields)) for row in rows[part]])

    try:
        values = of(slice(None))
    except Exception as error:
        where = found_at(error, name.rpartition(":")[0], _culprit(of, rows))
        raise ValueError(f"{name}: {type(error).__name__}: {error}{where}") from error
    try:
        if isinstance(values, Mapping | Set | str | bytes):  # whose items are keys, in no order, or letters
            raise TypeError
        values = list(values)
    except TypeError:
        wanted = f"it must return a list with a number for each of the {len(rows)} responses"
        raise ValueError(f"{name} returned {values!r:.60}; {wanted}") from None
    if len(values) != len(rows):
        raise ValueError(f"{name} returned {len(values)} values for {len(rows)} responses; it must return one for each")
    return [_number(name, value, row, response) for value, row, response in zip(values, rows, responses, strict=True)]


def _culprit(of: Callable[[slice], Any], rows: Sequence[PromptRow]) -> str:
    """Which record a function fails for, when it is asked for one at a time."""
    for i, row in enumerate(rows):
        try:
            of(slice(i, i + 1))
        except Exception:
            return f"for the response to {row.source}"
    return ""


def _number(name: str, value: Any, row: PromptRow, response: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST:
        said = f"{name} gave {value!r:.40} for {row.source}, response {response[:60]!a}"
        raise ValueError(f"{said}; a reward is a finite number{f', at most {LARGEST:.3g}' if math.isfinite(number) else ''}")
    return number


@dataclass(frozen=True)
class Rewards:
    """The weighted rewards of a run: a reward model's, functions', or both."""

    config: PpoRewardConfig
    model: Engine | None
    functions: RewardFunctions
    tokenizer: Tokenizer

    def by_source(self, rollouts: Rollouts, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
        """"model" and the name of each function -> its rewards [batch], before weights. `rows`: the rollouts' prompts."""
        of_model = {MODEL: self.model.scores(rollouts)} if self.model is not None else {}
        return of_model | self.functions.values(rollouts, rows, self.tokenizer)

    def combined(self, by_source: Mapping[str, Tensor], *, normalize: bool) -> Tensor:
        """[batch]: the weighted sum of what `by_source` gave."""
        weights = {MODEL: self.config.weight} | {config.name: config.weight for config in self.config.functions}
        return weighted_rewards(list(by_source.values()), [weights[name] for name in by_source], normalize=normalize)

    def metrics(self, by_source: Mapping[str, Tensor]) -> dict[str, float]:
        """Each reward's mean before weights, where there are rewards of one's own."""
        if not self.config.functions:
            return {}
        return {f"rollout/reward_of_{name}": float(values.double().mean()) for name, values in by_source.items()}


@dataclass(frozen=True)
class RewardsOf:
    """The rewards of responses to fixed prompts: what a `ResponseJudge` asks."""

    rewards: Rewards
    rows: Sequence[PromptRow]

    def scores(self, rollouts: Rollouts) -> Tensor:
        """[batch], as they are: over other responses there is nothing to normalize by."""
        return self.rewards.combined(self.rewards.by_source(rollouts, self.rows), normalize=False)
