"""Write the miniature's data sets without its comparisons, which need a model's answers: label.py makes those of each round."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from world import ASKED, FACTS, PEOPLE, Prompt, World, draw_prompts, sum_of, sums_task

SEED = 0
"""Of the world, the users and the labellers."""
SHOWN = 3
"""Demonstrations that stand before a prompt of the prompted base model."""


def task_mix(world: World, seed: int, count: int) -> list[dict]:
    """Tasks of three kinds in fixed templates, each with a short answer: what FLAN and T0 are to the paper (Appendix C.5)."""
    rng = random.Random(f"{seed}:task mix")
    rows = []
    for _ in range(count):
        person, name = rng.choice(PEOPLE), rng.choice(list(FACTS))
        _, question, values = FACTS[name]
        truth = world.facts[person][name]
        claimed = rng.choice((truth, rng.choice(values)))
        text, total = sum_of(rng)
        rows.append(
            rng.choice(
                (
                    {"prompt": f"Answer with one word. {question.format(person)}\n", "response": truth},
                    {"prompt": f"True or false? {world.sentence(person, name, claimed)}\n", "response": str(claimed == truth).lower()},
                    {"prompt": f"Complete: {text.removesuffix(f'{total}.').rstrip()}\n", "response": str(total)},
                )
            )
        )
    return rows


def to_rank(prompts: dict[str, list[Prompt]], seed: int, heldout: int) -> list[dict]:
    """Each prompt as often as it gets answers: K = 4 to 9 (section 3.5), of training and of held-out users."""
    rows: list[dict] = []
    chosen = [*(("train", p) for p in prompts["rankings"]), *(("valid", p) for p in prompts["valid"][:heldout])]
    for number, (split, prompt) in enumerate(chosen):
        rows += [{**prompt.record(), "number": number, "split": split}] * random.Random(f"{seed}:ranking {number}").randint(4, 9)
    return rows


def make_all(seed: int, *, documents: int, users: int, per_user: int, demonstrations: int, heldout: int) -> dict[str, list[dict]]:
    """Records by file name, without ".jsonl"; `demonstrations` and `heldout` are the most that those and any held-out set have.

    prompts_tuning are of held-out users too, but none of those that systems are compared by: what settings were chosen on.
    """
    world = World(seed)
    prompts = draw_prompts(world, seed, users=users, per_user=per_user)
    prompts["demonstrations"] = prompts["demonstrations"][:demonstrations]
    texts = world.documents(seed, documents + documents // 20)
    shown = random.Random(f"{seed}:shown").sample([p for p in prompts["demonstrations"] if p.kind == "plain"], SHOWN)
    prefix = "".join(f"{p.text}{world.answer(p.request)}\n" for p in shown)
    rng = random.Random(f"{seed}:demonstrations")
    valid = [{**p.record(), "id": number} for number, p in enumerate(prompts["valid"][:heldout])]
    return {
        "corpus": [{"text": text} for text in texts[:documents]],
        "corpus_heldout": [{"text": text} for text in texts[documents:]],
        "demonstrations": [{"prompt": p.text, "response": world.demonstration(p.request, rng)} for p in prompts["demonstrations"]],
        "demonstrations_valid": [
            {"prompt": p.text, "response": world.demonstration(p.request, rng)} for p in prompts["valid"][: heldout // 2]
        ],
        "task_mix": task_mix(world, seed, len(prompts["demonstrations"])),
        "to_rank": to_rank(prompts, seed, heldout // 2),
        "prompts": [p.record() for p in prompts["prompts"]],
        "prompts_tuning": [p.record() for p in prompts["valid"][heldout : heldout + heldout // 2]],
        "prompts_valid": valid,
        "prompts_valid_prompted": [{**record, "prompt": prefix + str(record["prompt"])} for record in valid],
        "asked": world.task(seed, heldout, ASKED),
        "unasked": world.task(seed, heldout, tuple(name for name in FACTS if name not in ASKED)),
        "sums": sums_task(seed, heldout),
    }


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """Read one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path, *, documents: int, users: int, demonstrations: int, heldout: int) -> None:
    """Write every data set, a tokenizer, and the packed text."""
    from megarlhf.data.tokenizer_training import train_sentencepiece
    from megarlhf.preparation.preprocess import main as preprocess

    records = make_all(SEED, documents=documents, users=users, per_user=5, demonstrations=demonstrations, heldout=heldout)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in records.items():
        write_lines(folder / f"{name}.jsonl", items)
        print(f"{name:24} {len(items):6}")
    texts = [r["text"] for r in records["corpus"][:3000]] + [r["prompt"] + r["response"] for r in records["demonstrations"]]
    train_sentencepiece(texts, folder / "tokenizer", vocab_size=512)
    for name in ("corpus_heldout", "corpus"):
        words = ["--input", folder / f"{name}.jsonl", "--output-prefix", folder / name, "--tokenizer", folder / "tokenizer.model"]
        if preprocess([*map(str, words), "--workers", "1", "--overwrite"]):
            raise SystemExit(f"{folder / name}: no corpus was written")
