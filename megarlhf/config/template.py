"""A YAML file to fill in, for `megarlhf init`: the keys that must be given, and others with their defaults behind "#"."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Any

from megarlhf.config.documentation import keys_of
from megarlhf.config.fields import show, type_name, without_none, without_rules
from megarlhf.config.stages import COMMANDS

FILLED = {
    "pretrain": ("model.architecture.preset", "data.prefix"),
    "sft": ("model.load",),
    "reward": ("model.load",),
    "ppo": ("policy.load", "value.load", "value.adam.learning_rate", "reward.load", "reference.load", "data.pretraining.prefix"),
    "dpo": ("model.load", "reference.load"),
    "generate": ("model.load",),
    "evaluate": ("model.load", "prompts"),
}
"""Command -> keys that may be left out by themselves, but whose absence some rule or default of the command does not allow."""
COMMON = (
    "run.seed", "run.save_every", "run.eval_every", "run.sinks", "tokenizer.eos_token", "parallel.tp", "parallel.pp",
    "precision", "micro_batch_size", "recompute",
    "valid", "prompts_valid", "valid_prefix", "seq_len", "data.pretraining.prefix",
    "max_prompt_len", "max_response_len", "on_bad_record",
    "epochs", "batch_size", "minibatch_size", "dropout", "pretraining_mix", "warmup_steps",
    "iterations", "samples_per_prompt", "advantages", "kl_coef", "ptx_coef", "ptx_ratio", "loss", "beta",
    "temperature", "top_p", "max_new_tokens",
    "rankings", "tasks", "win_rate.against",
)  # fmt: skip
"""What is shown of the rest, by name or by dotted key."""
WIDTH = 116


@dataclass(frozen=True)
class _Key:
    path: str
    annotation: Any
    default: Any
    doc: str

    @property
    def depth(self) -> int:
        return self.path.count(".")

    @property
    def section(self) -> type | None:
        inner = without_rules(without_none(self.annotation)[0])[0]
        return inner if is_dataclass(inner) else None


def template(command: str, *, every: bool) -> str:
    """The YAML of a command: with `every` all keys, else the commonest; each under what --help-config says of it."""
    keys = [_Key(*key) for key in keys_of(COMMANDS[command]) if "[]" not in key[0]]
    filled = _filled(keys, command)
    shown = {key.path for key in keys if not key.section and (every or key.path in filled or _is_common(key.path))}
    lines = [
        f"# {' '.join((COMMANDS[command].__doc__ or '').split())}",
        f"# Fill in what says so. Keys behind # have the value that they have by default; `megarlhf {command} --help-config` has all.",
        "# In a path, ~ and ${NAME} of the environment are put in, and ${HERE} is the folder of this file.",
    ]
    for key in keys:
        if key.path == "stage":
            lines += ["", f"stage: {command}"]
        elif key.section and any(path.startswith(f"{key.path}.") for path in shown):
            lines += [""] * (key.depth == 0) + list(_section(key, filled))
        elif key.path in shown:
            lines += [""] * (key.depth == 0) + list(_leaf(key, key.path in filled))
    return "\n".join(lines) + "\n"


def _filled(keys: list[_Key], command: str) -> set[str]:
    """The keys that ask for a value: required ones of sections that are there, and those that a rule asks for."""
    filled = set(FILLED[command])
    present = {path.rpartition(".")[0] for path in filled} | {""}
    for key in keys:
        parent = key.path.rpartition(".")[0]
        if key.section and parent in present and key.default is MISSING:
            present.add(key.path)
        if not key.section and parent in present and key.default is MISSING and key.path != "stage":
            filled.add(key.path)
    return filled


def _is_common(path: str) -> bool:
    return path in COMMON or path.rpartition(".")[2] in COMMON


def _section(key: _Key, filled: set[str]) -> Iterator[str]:
    open_section = any(path.startswith(f"{key.path}.") for path in filled)
    absent = "" if open_section or key.default is not None else "  # absent by default"
    yield f"{'  ' * key.depth}{'' if open_section else '#'}{key.path.rpartition('.')[2]}:{absent}"


def _leaf(key: _Key, fill: bool) -> Iterator[str]:
    margin, name = "  " * key.depth, key.path.rpartition(".")[2]
    yield from textwrap.wrap(key.doc, WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
    inner, rules = without_rules(without_none(key.annotation)[0])
    if fill:
        kind = ", ".join(map(str, rules)) if inner is str and rules else ", ".join([type_name(inner), *map(str, rules)])
        yield f"{margin}{name}:  # fill in: {kind}"
    else:
        value = "" if key.default is MISSING else f" {show(key.default)}"
        yield f"{margin}#{name}:{value}" + ("  # required in this section" if key.default is MISSING else "")
