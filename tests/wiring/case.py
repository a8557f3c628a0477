"""A case: a key, what it is set to, and exactly what that may change."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.wiring.observation import differing, is_rounding

PROTECTED = (
    "exit", "refused", "files", "stdout", "said/*", "engine/*", "process/*", "models/*", "sources/*", "fingerprints/*", "inputs/*",
    "metrics/*/learning_rate", "steps/*/rate", "steps/*/objective", "steps/*/rows",
)  # fmt: skip
"""What no wildcard at the beginning or at the end of a pattern covers: it is named, or must not change."""
FREE = ("passes/*",)
"""What follows from the lengths of responses: it may change with whatever changes the weights."""


@dataclass(frozen=True)
class Case:
    """One key of one command and what is observed of it. Patterns are names of observations, with "*", apart by blanks."""

    change: str
    """Overrides; the key is the first one's."""
    changes: str
    """Patterns that must each match something that changes."""
    may: str = ""
    """Patterns of what may change besides. Nothing else does."""
    rounding: str = ""
    """Patterns of what may change as other orders of additions change it."""
    base: str = ""
    """Overrides of both runs."""
    says: str = ""
    """What the changed run must be refused with."""
    exact: dict[str, Any] = field(default_factory=dict)
    """Observation -> its value in the changed run."""
    prepare: str = ""
    """What is done with the run's folder before: see test_wiring.PREPARED."""

    @property
    def key(self) -> str:
        """The key that is changed."""
        return self.change.split("=", 1)[0]


def faults(case: Case, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of two observations, without the change and with it, is not as the case says."""
    changed = differing(before, after)
    rounded = {n for n in changed if _any(case.rounding, n) and is_rounding(before.get(n), after.get(n))}
    found = [f"{pattern} does not change" for pattern in case.changes.split() if not any(covers(pattern, name) for name in changed)]
    allowed = f"{case.changes} {case.may}"
    for name in sorted(changed - rounded):
        if not _any(allowed, name):
            found.append(f"{name} changes: {str(before.get(name))[:150]!r} -> {str(after.get(name))[:150]!r}")
    if case.says and case.says not in " ".join(str(after.get("refused")).split()):
        found.append(f"refused with {after.get('refused')!r}, not with {case.says!r}")
    for name, value in case.exact.items():
        if after.get(name) != value:
            found.append(f"{name} is {after.get(name)!r}, not {value!r}")
    return found


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern speaks of a name; of a protected one only with its first part, and of a step's with its last, spelled out."""
    if not fnmatchcase(name, pattern):
        return False
    if not any(fnmatchcase(name, protected) for protected in PROTECTED):
        return True
    first, last = pattern.split("/")[0], pattern.split("/")[-1]
    return first == name.split("/")[0] and (first not in ("metrics", "steps") or last == name.split("/")[-1])


def _any(patterns: str, name: str) -> bool:
    return any(covers(pattern, name) for pattern in patterns.split())
