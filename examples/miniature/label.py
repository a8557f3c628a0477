"""Labellers rank a model's answers: a round of comparisons (Ouyang et al. 2022, sections 3.4 and 3.5)."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from labelling import GROUPS, judge, labellers, measured_agreement, ranks
from make_data import SEED, read_lines, write_lines
from world import World, request_of


def pairs_of(row: dict) -> Iterator[dict]:
    """Every comparison of a ranking by itself; ties are none."""
    for (text, rank), (other, other_rank) in itertools.permutations(zip(row["responses"], row["ranks"], strict=True), 2):
        if rank < other_rank:
            yield {"prompt": row["prompt"], "chosen": text, "rejected": other}


def label(answers: Path, folder: Path, *, before: Path | None = None) -> None:
    """Rank what `answers`/responses.jsonl holds into `folder`; a prompt is ranked by one labeller (section 3.4).

    rankings.jsonl, by training labellers, of training users' prompts, after those of an earlier round, `before`; without_N.jsonl, all of
    them but what group N ranked; pairs.jsonl, the same comparisons one by one, shuffled; valid.jsonl, of held-out users' prompts, by
    training labellers and those held out; agreement.json.
    """
    world, people = World(SEED), labellers(SEED)
    rows: dict[str, list[dict]] = {"train": [], "valid": []}
    answered = []
    for number, items in itertools.groupby(read_lines(answers / "responses.jsonl"), lambda row: row["number"]):
        found = [row for row in items if row["response"].strip()]  # an empty answer is nothing to read
        if not found:
            continue
        request, texts, split = request_of(found[0]), [row["response"] for row in found], found[0]["split"]
        rng = random.Random(f"{SEED}:{folder.parent.name}:{number}")
        person = rng.choice(people["training"] if split == "train" or rng.random() < 0.5 else people["held-out"])
        grades = person.grades([judge(world, request, text) for text in texts], texts, rng)
        row = {"prompt": found[0]["prompt"], "responses": texts, "ranks": ranks(grades), "labeler": person.name, "group": str(person.group)}
        if len(set(grades)) > 1:  # a ranking of ties only has no comparison
            rows[split].append(row)
        if split == "valid":
            answered.append((request, texts))
    agreed = measured_agreement(world, people, answered)
    print(*(f"agreement {name}: {mean:.3f} [{low:.3f}, {high:.3f}]" for name, (mean, low, high) in agreed.items()), sep="\n")

    train = (read_lines(before / "rankings.jsonl") if before else []) + rows["train"]
    pairs = [pair for row in train for pair in pairs_of(row)]
    random.Random(f"{SEED}:pairs").shuffle(pairs)
    written = {"rankings": train, "valid": rows["valid"], "pairs": pairs}
    written |= {f"without_{group}": [row for row in train if row["group"] != str(group)] for group in range(GROUPS)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in written.items():
        write_lines(folder / f"{name}.jsonl", items)
    (folder / "agreement.json").write_text(json.dumps(agreed, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {len(train)} rankings, {len(pairs)} comparisons; {len(rows['valid'])} rankings of held-out users' prompts")
