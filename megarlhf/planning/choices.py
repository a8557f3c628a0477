"""What a search of layouts chooses among, and the keys of a configuration that say a choice."""

from __future__ import annotations

from dataclasses import dataclass

from megarlhf.parallel.layout import ParallelLayout
from megarlhf.planning.models import RunModels

SIZES = (1, 2, 4)
"""Micro-batch sizes that are tried: rows, or prompts with all their completions."""
RECOMPUTE = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
RESTS = {"policy": ("gradients", "optimizer", "average"), "value": ("weights", "gradients", "optimizer"),
         "reward": ("weights",), "reference": ("weights",)}  # fmt: skip
"""Model -> what rests on the host between its uses, where a candidate offloads."""


@dataclass(frozen=True)
class Choice:
    """One candidate for the model that is trained (PPO: the policy, with the reference beside it)."""

    layout: ParallelLayout
    micro_batch_size: int
    """Rows."""
    recompute: str
    gathered: bool = False
    """PPO: whether generation takes all layers on one stage, a copy, in place of the policy's own layout."""
    offload: bool = False
    """PPO: whether models rest on the host between their uses (RESTS)."""

    def overrides(self, models: RunModels) -> list[str]:
        """The same as keys of a configuration."""
        at, role = self.layout, trained_role(models)
        axes = f"tp: {at.tp}, pp: {at.pp}, virtual_pp: {at.virtual_pp}, sequence_parallel: {str(at.sequence_parallel).lower()}"
        rows = [f"{role}.micro_batch_size={self.micro_batch_size}", f"{role}.micro_batch_tokens=null"]
        keys = [f"{role}.parallel={{{axes}}}", *rows, f"{role}.recompute={self.recompute}"]
        if role == "policy":
            keys += [f"reference.parallel={{{axes}}}", f"generation.parallel={f'{{tp: {at.tp}}}' if self.gathered else 'null'}"]
            keys += [f"{of}.offload=[{', '.join(RESTS[of]) if self.offload else ''}]" for of in models.plans]
        return keys

    def __str__(self) -> str:
        place = (", generation gathered" if self.gathered else "") + (", offload" if self.offload else "")
        return f"{self.layout}, micro-batch {self.micro_batch_size}, recompute {self.recompute}{place}"


def trained_role(models: RunModels) -> str:
    """The model whose layout is looked for."""
    return "policy" if models.config.stage == "ppo" else "model"
