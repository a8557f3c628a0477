"""The example's closing table: every model against the one that was downloaded, judged by rule.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rule import preference, score

from megarlhf.evaluation.intervals import win_rate
from megarlhf.telemetry.tables import format_table

MODELS = {"SmolLM2-135M-Instruct": "start", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx"}


def main() -> None:
    """Read every model's evaluation and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="the example's folder of runs")
    runs = parser.parse_args().runs
    known_words = frozenset((runs / "data" / "known_words.txt").read_text(encoding="utf-8").splitlines())
    scores, rows = {}, []
    for name, folder in MODELS.items():
        path = runs / "evaluation" / folder
        answers = [json.loads(line) for line in (path / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
        metrics = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        scores[folder] = [score(row["names"], row["response"], row["finished"], known_words) for row in answers]
        judged = [preference(a, b) for a, b in zip(scores[folder], scores["start"], strict=True)]
        rate, low, high = win_rate(judged)
        rows.append(
            (
                name,
                "-" if folder == "start" else f"{rate:.3f} [{low:.3f}, {high:.3f}]",
                f"{sum(scores[folder]) / len(scores[folder]):.2f}",
                f"{metrics['valid/reward_mean']:+.3f}",
                f"{metrics['valid/kl']:.2f}",
                f"{metrics['valid/text_loss']:.3f}",
                f"{metrics['valid/response_len']:.1f}",
                f"{metrics['valid/finished_fraction']:.2f}",
            )
        )
    asked = len(scores["start"])
    print(f"\n{asked} questions about things that no training saw, one answer each at temperature 0.7, averaged weights of PPO.")
    print("rule: the written rule's score, 0 to 6; KL in nats per answer against SFT; text loss in nats per token of Python's manual")
    print(format_table(("model", "win rate against the first [95 %]", "rule", "reward", "KL", "text loss", "tokens", "ended"), rows))


if __name__ == "__main__":
    main()
