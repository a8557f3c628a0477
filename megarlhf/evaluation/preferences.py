"""How well a policy's own log-probabilities order completions as people did."""

from __future__ import annotations

from megarlhf.batch import PreferenceBatch
from megarlhf.engine.engine import Engine
from megarlhf.engine.terms import DpoLoss


def preference_metrics(model: Engine, loss: DpoLoss, batch: PreferenceBatch) -> dict[str, float]:
    """"valid/dpo_loss" over the prompts that have a comparison, and each of the loss's statistics over comparisons."""
    total, stats = loss(model.logprobs(batch, batch.response_mask), batch)
    means = {f"valid/{name}": float(value) / float(count) for name, (value, count) in stats.items()}
    return {"valid/dpo_loss": float(total) / loss.count(batch)} | means
