"""What a single value must be beyond its type, declared at the field: ``batch_size: Annotated[int, Range(1, ROWS)]``.

A rule has ``accept(value)``, which returns the value to use or raises ValueError with a sentence that goes on after the key's
name ("must be at least 1, got 0"), and ``str(rule)`` for the list of keys.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; with `above` or `below` the end itself is out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    why: str = ""
    """Why there is an upper end."""

    def accept(self, value: float) -> float:
        """The value. ValueError where it is outside, NaN or infinite."""
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        too_low = value <= self.low if self.above else value < self.low
        too_high = value >= self.high if self.below else value > self.high
        if too_low or too_high:
            raise ValueError(f"must be {self._side(too_low)}, got {_number(value)}{f': {self.why}' if self.why and too_high else ''}")
        return value

    def _side(self, too_low: bool) -> str:
        """The end that was passed; both, where the range is short enough to be one thought."""
        if self.high <= 1 and self.low > -math.inf:
            return str(self)
        if too_low:
            return f"above {_number(self.low)}" if self.above else f"at least {_number(self.low)}"
        return f"below {_number(self.high)}" if self.below else f"at most {_number(self.high)}"

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {'(' if self.above else '['}{_number(self.low)}, {_number(self.high)}{')' if self.below else ']'}"
        if self.low == -math.inf:
            return "finite"
        return f"above {_number(self.low)}" if self.above else f"at least {_number(self.low)}"


@dataclass(frozen=True)
class NotEmpty:
    """A text of which something is there."""

    def accept(self, value: str) -> str:
        """The text. ValueError where it is empty."""
        if not value.strip():
            raise ValueError("must not be empty; leave the key out where there is nothing to say")
        return value

    def __str__(self) -> str:
        return "not empty"


_FUNCTION = re.compile(r".+\.py:[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class PathTo:
    """A path, with ``~`` and ``${NAME}`` put in; a relative one is seen from where the command is started.

    ``${HERE}``, the folder of the YAML file, is put in by the loader, which knows the file.
    """

    what: Literal["file", "corpus", "run", "tokenizer", "output", "function"]
    """A file to read; the .bin and .idx files of a prefix; a run or checkpoint; a file or folder; a folder that is written; a file.py and
    a function in it, with a colon between."""

    def accept(self, value: str) -> str:
        """The path to use. ValueError where it is empty or names a variable that is not set."""
        if not value.strip():
            raise ValueError("must be a path, got an empty one")
        if "\0" in value:
            raise ValueError(f"must be a path, got {value!r}, which holds a null character")
        if self.what == "function" and not _FUNCTION.fullmatch(value):
            raise ValueError(f"must be a Python file and a function in it, such as my_rewards.py:score, got {value!r}")
        return os.path.expanduser(_VARIABLE.sub(_variable, value))

    def __str__(self) -> str:
        named = {"corpus": "path without .bin and .idx", "function": "file.py:function", "output": "path of a folder"}
        return named.get(self.what, f"path of a {self.what}")


def _variable(match: re.Match[str]) -> str:
    name = match.group(1)
    if name not in os.environ:
        raise ValueError(f"names ${{{name}}}, and no environment variable {name} is set")
    return os.environ[name]


def _number(value: float) -> str:
    """A number in full where it is short: 1 for the end of a range of floats, too."""
    text = f"{int(value)}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else str(value)
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text)} digits)"


ROWS = 2**20
TOKENS = 2**20
WHOLE_BATCH = "every rank holds the whole batch in memory"

Epochs = Annotated[int, Range(1, 100_000)]
Count = Annotated[int, Range(1, 10**9)]
"""How often something is done."""
CountOrNone = Annotated[int, Range(0, 10**9)]
"""How often something is done, 0 for never."""
Rows = Annotated[int, Range(1, ROWS, why=WHOLE_BATCH)]
"""Rows of a batch."""
Tokens = Annotated[int, Range(1, TOKENS, why="no model here has a longer context")]
"""Tokens of a row."""
Share = Annotated[float, Range(0, 1)]
"""A fraction, 0 and 1 included."""
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
"""A fraction that must leave something."""
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Text = Annotated[str, NotEmpty()]
InputFile = Annotated[str, PathTo("file")]
Corpus = Annotated[str, PathTo("corpus")]
RunOrCheckpoint = Annotated[str, PathTo("run")]
TokenizerPath = Annotated[str, PathTo("tokenizer")]
FunctionInFile = Annotated[str, PathTo("function")]
OutputFolder = Annotated[str, PathTo("output")]
