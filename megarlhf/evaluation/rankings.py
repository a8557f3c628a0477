"""How often a reward model prefers what people preferred."""

from __future__ import annotations

from megarlhf.algorithms.ranking import count_prompts, ranking_loss
from megarlhf.batch import RankingBatch
from megarlhf.engine.engine import Engine


def ranking_metrics(engine: Engine, batch: RankingBatch) -> dict[str, float]:
    """Loss over the prompts that have a comparison, and accuracy over comparisons (Ouyang et al. 2022, section 4.1).

    Ties are no comparisons; where there are only ties there is nothing to say, and no metric.
    """
    loss, stats = ranking_loss(engine.scores(batch), batch.ranks, batch.prompt_index)
    right, pairs = stats["accuracy"]
    if pairs == 0:
        return {}
    prompts = count_prompts(batch.ranks, batch.prompt_index)
    return {"valid/ranking_loss": float(loss) / prompts, "valid/accuracy": float(right) / float(pairs)}
