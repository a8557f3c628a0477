"""The quickstart's closing table: every policy against the SFT baseline, and samples before and after PPO-ptx."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from labelling import preference, read_pairs, score

from megarlhf.evaluation.intervals import win_rate
from megarlhf.telemetry.tables import format_table

MODELS = {"SFT baseline": "sft", "PPO start": "ppo_init", "PPO": "ppo", "PPO-ptx": "ppo_ptx"}


def main() -> None:
    """Read every policy's evaluation and print the table and the samples."""
    parser = argparse.ArgumentParser(description="Compare the quickstart's policies.")
    parser.add_argument("--runs", type=Path, required=True, help="the quickstart's folder of runs")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.txt, written by make_data.py")
    default = [f"{name}={folder}" for name, folder in MODELS.items()]
    parser.add_argument("--models", nargs="+", default=default, help="rows of the table, NAME=FOLDER; given, the table has the seconds too")
    args = parser.parse_args()
    models = dict(model.split("=") for model in args.models)
    pairs = read_pairs(args.pairs)
    responses, metrics = {}, {}
    for folder in models.values():
        path = args.runs / "evaluation" / folder
        responses[folder] = [json.loads(line) for line in (path / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
        metrics[folder] = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))

    rows = []
    for name, folder in models.items():
        against = zip(responses[folder], responses["sft"], strict=True)
        judged = [preference(a["prompt"], a["response"], b["response"], pairs) for a, b in against]
        rate, low, high = win_rate(judged)
        label = sum(score(r["prompt"], r["response"], pairs) for r in responses[folder]) / len(responses[folder])
        m = metrics[folder]
        rows.append(
            (
                name,
                "-" if folder == "sft" else f"{rate:.3f} [{low:.3f}, {high:.3f}]",
                f"{label:.2f}",
                f"{m['valid/reward_mean']:+.3f}",
                f"{m['valid/kl']:.2f}",
                f"{m['valid/text_loss']:.3f}",
                f"{m['valid/response_len']:.1f}",
                f"{m['valid/finished_fraction']:.2f}",
                f"{seconds(args.runs / folder):.0f}",
            )
        )
    header = ("model", "win rate against SFT [95 %]", "rule", "reward", "KL", "text loss", "tokens", "ended", "seconds")
    count = len(responses["sft"])
    print(f"\n{count} validation prompts, one response each at temperature 1, PPO and PPO-ptx with averaged weights.")
    print("rule: the labelling rule's score, 0 to 6; KL in nats per response against the PPO start; text loss in nats per token")
    if args.models == default:
        header, rows = header[:-1], [row[:-1] for row in rows]
    print(format_table(header, rows))
    if args.models != default:
        return
    print("\nThree prompts, before (SFT baseline) and after (PPO-ptx):")
    for before, after in list(zip(responses["sft"], responses["ppo_ptx"], strict=True))[: 3 * 40 : 40]:
        print(f"\n  {before['prompt'].strip()}")
        print(f"    SFT      {before['response'].strip()!r}  reward {before['reward']:+.2f}")
        print(f"    PPO-ptx  {after['response'].strip()!r}  reward {after['reward']:+.2f}")


def seconds(run: Path) -> float:
    """Wall clock of a run's steps, those of all its phases."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return sum(value for line in lines for name, value in line.items() if name.startswith("time/"))


if __name__ == "__main__":
    main()
