"""How often a reward model prefers what people preferred."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from megarlhf.algorithms.ranking import count_prompts, ranking_loss
from megarlhf.batch import RankingBatch
from megarlhf.data.tokenized import RankingRow
from megarlhf.evaluation.intervals import interval_metrics


def ranking_metrics(scores: Tensor, batch: RankingBatch) -> dict[str, float]:
    """Loss over the prompts that have a comparison; accuracy and gap over comparisons (Ouyang et al. 2022, section 4.1).

    Ties are no comparisons; where there are only ties there is nothing to say, and no metric.
    Args: scores [completions] of a reward model.
    """
    loss, stats = ranking_loss(scores, batch.ranks, batch.prompt_index)
    if stats["accuracy"][1] == 0:
        return {}
    prompts = count_prompts(batch.ranks, batch.prompt_index)
    return {"valid/ranking_loss": float(loss) / prompts} | {f"valid/{name}": float(x) / float(pairs) for name, (x, pairs) in stats.items()}


def ranking_records(scores: Tensor, rows: Sequence[RankingRow]) -> list[dict[str, object]]:
    """Each ranking's source, group, scores, comparisons and how many of them are right. Args: scores [completions], in order."""
    records, ends = [], [0]
    for row in rows:
        ends.append(ends[-1] + len(row.ranks))
    for row, (start, end) in zip(rows, pairwise(ends), strict=True):
        of_row = scores[start:end].tolist()
        gaps = [
            of_row[i] - of_row[j] for i, better in enumerate(row.ranks) for j, worse in enumerate(row.ranks) if better < worse
        ]
        found = {"comparisons": len(gaps), "right": sum(gap > 0 for gap in gaps)}
        records.append({"source": row.source, "group": row.group, "ranks": list(row.ranks), "scores": of_row, **found})
    return records


def accuracy_by_prompt(records: Sequence[dict]) -> dict[str, float]:
    """The mean over prompts of the share of their comparisons that is right, with its interval: prompts are independent, pairs not."""
    return interval_metrics("valid/accuracy_by_prompt", [record["right"] / record["comparisons"] for record in records])


def accuracy_by_group(records: Sequence[dict]) -> dict[str, float]:
    """Accuracy over each group's comparisons, and the groups' mean with its standard error (Ouyang et al. 2022, section 4.1).

    Nothing where no ranking says its group.
    """
    right, pairs = Counter(), Counter()
    for record in records:
        right[record["group"]] += record["right"]
        pairs[record["group"]] += record["comparisons"]
    groups = sorted((group for group in pairs if group is not None), key=str)
    if not groups:
        return {}
    accuracies = [right[group] / pairs[group] for group in groups]
    mean = sum(accuracies) / len(groups)
    found = {f"valid/accuracy_of_group/{group}": accuracy for group, accuracy in zip(groups, accuracies, strict=True)}
    found["valid/accuracy_over_groups"] = mean
    if len(groups) > 1:
        variance = sum((accuracy - mean) ** 2 for accuracy in accuracies) / (len(groups) - 1)
        found["valid/accuracy_over_groups_stderr"] = math.sqrt(variance / len(groups))
    return found
