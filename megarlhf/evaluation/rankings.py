"""How often a reward model prefers what people preferred."""

from __future__ import annotations

from megarlhf.algorithms.ranking import ranking_loss
from megarlhf.batch import RankingBatch
from megarlhf.engine.engine import Engine


def ranking_metrics(engine: Engine, batch: RankingBatch) -> dict[str, float]:
    """Loss per prompt and accuracy over comparisons, ties left out (Ouyang et al. 2022, section 4.1)."""
    loss, stats = ranking_loss(engine.scores(batch), batch.ranks, batch.prompt_index)
    right, pairs = stats["accuracy"]
    prompts = len(batch.prompt_index.unique())
    return {"valid/ranking_loss": float(loss) / prompts, "valid/accuracy": float(right) / max(1.0, float(pairs))}
