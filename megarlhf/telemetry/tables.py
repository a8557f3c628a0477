"""Plain text tables for the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None


def format_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """An aligned table: columns that hold only numbers to the right, others to the left, None as "-"."""
    assert all(len(row) == len(header) for row in rows), f"every row must have the header's {len(header)} cells"
    columns = [[name, *(_text(row[i]) for row in rows)] for i, name in enumerate(header)]
    widths = [max(map(len, column)) for column in columns]
    right = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)).rstrip()

    lines = [line(cells) for cells in zip(*columns, strict=True)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
