"""How many sums a model gets right: the arithmetic example's closing table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from verifier import correct

from megarlhf.evaluation.intervals import mean_interval
from megarlhf.telemetry.tables import format_table


def main() -> None:
    """Read every folder's answers and print a row for each."""
    parser = argparse.ArgumentParser(description="Count right answers.")
    parser.add_argument("answers", type=Path, nargs="+", help="folders that `megarlhf generate` wrote, one for each row")
    rows = []
    for folder in parser.parse_args().answers:
        lines = (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        rewards = correct([r["prompt"] for r in records], [r["response"] for r in records], records)
        rate, low, high = mean_interval(rewards)
        shown = "  ".join(r["prompt"] + r["response"] for r in records[:5])
        rows.append((folder.name, f"{rate:.3f} [{low:.3f}, {high:.3f}]", shown))
    print(format_table(("model", "right answers [95 %]", "the first five"), rows))


if __name__ == "__main__":
    main()
