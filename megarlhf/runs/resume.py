"""What may change between a run's beginning and its resume: every key is applied and said, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

KEPT = {
    "run.seed": "order, noise and samples would be another run's",
    "batch_size": "the number of steps and the place in an epoch follow from it",
    "ppo.advantages": "which models are trained follows from it",
    "select_by": "the best checkpoint so far was chosen by it",
}
"""Keys that a run keeps from its first step to its last, and why; so do those of an architecture."""
PLACES = ("run.dir",)
"""Keys that say where things lie and nothing else."""
SOURCES = ("load", "load_model", "load_average")
"""Where weights come from: compared by what they hold, see runs/models.py."""
ABSENT = object()


def config_changes(before: Mapping, now: Mapping) -> tuple[list[str], list[str]]:
    """(what is refused, what is said) of the differences between two configurations as plain values; keys of either count."""
    refused, said = [], []
    for path, old, new in _differences(before, now):
        key = path.rpartition(".")[2]
        if path in PLACES or key in SOURCES:
            continue
        change = f"{path} {_show(old)} -> {_show(new)}"
        if "architecture" in path.split("."):
            refused.append(f"{change}: the weights of this run have the shapes that it began with")
        elif path in KEPT:
            refused.append(f"{path} is {_show(new)}, but the run began with {_show(old)}: {KEPT[path]}")
        elif path == "ppo.kl_coef" and before["ppo"]["adaptive_kl"] and now["ppo"]["adaptive_kl"]:
            refused.append(f"{change}: it has been adapted since, and goes on from where it is")
        else:
            said.append(change)
    return refused, said


def _differences(before: Mapping, now: Mapping, path: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, old value, new value) of every leaf or section that differs; ABSENT where one side has no such key."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}", old, new


def _show(value: object) -> str:
    if value is ABSENT:
        return "(not there)"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
