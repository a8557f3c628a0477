"""The reward of the arithmetic example: whether an answer is right. No model judges."""

from __future__ import annotations

from typing import Any


def correct(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 for the right sum and nothing else, 0 for anything else; each prompt's record holds its "answer"."""
    return [float(response == record["answer"]) for response, record in zip(responses, records, strict=True)]
