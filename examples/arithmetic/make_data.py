"""Sums for the arithmetic example: a tokenizer of single characters, worked sums most of which are wrong, and sums to solve."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from megarlhf.data.tokenizer_training import train_sentencepiece

LARGEST = 19
NUM_DEMONSTRATIONS, NUM_VALID = 12000, 80
ERRORS = (0, 1, -1, 2, -2, 10)
WEIGHTS = (0.2, 0.4, 0.1, 0.1, 0.1, 0.1)
"""How often the answers of the demonstrations are off by how much: right in one of five, one too many in two of five."""
VOCABULARY = 273
"""Each character a piece of its own: 12 of them, a newline, 256 bytes, and 4 control pieces."""


def main() -> None:
    """Write everything into one folder."""
    parser = argparse.ArgumentParser(description="Make the arithmetic example's data.")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(1)
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    noise.shuffle(sums)
    train_sentencepiece([f"{a}+{b}={a + b}" for a, b in sums], folder / "tokenizer", vocab_size=VOCABULARY, character_coverage=1.0)

    shown = noise.choices(sums, k=NUM_DEMONSTRATIONS)
    answers = [max(0, a + b + error) for (a, b), error in zip(shown, noise.choices(ERRORS, WEIGHTS, k=len(shown)), strict=True)]
    write(folder / "demonstrations.jsonl", [{"prompt": f"{a}+{b}=", "response": str(c)} for (a, b), c in zip(shown, answers, strict=True)])
    to_solve = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    write(folder / "prompts.jsonl", to_solve[NUM_VALID:])
    write(folder / "prompts_valid.jsonl", to_solve[:NUM_VALID])


def write(path: Path, records: list[dict[str, str]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
