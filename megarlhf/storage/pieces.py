"""Pieces of parameters: which elements of the whole a flat range of one rank's part holds, and what two pieces share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A flat range of one rank's part of a parameter of one or two dimensions."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int
    """The dimension along which the part was cut; 0 where it is all of the parameter."""
    slices: tuple[tuple[int, int], ...]
    """(start, size) along `dim` of the whole of each slice that the part holds, one after another."""
    start: int
    """Where the range starts in the part, flattened."""
    stop: int

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Piece:
        """All elements of a parameter, in order."""
        return Piece(tuple(shape), 0, ((0, shape[0]),), 0, torch.Size(shape).numel())

    @property
    def num_elements(self) -> int:
        """Elements of the range."""
        return self.stop - self.start

    @property
    def width(self) -> int:
        """Columns of the part, seen as a matrix of which a vector is one column."""
        if len(self.shape) == 1:
            return 1
        return sum(size for _, size in self.slices) if self.dim == 1 else self.shape[1]

    def to_json(self) -> list:
        """Plain values; `from_json` reads them back."""
        return [list(self.shape), self.dim, [list(part) for part in self.slices], self.start, self.stop]

    @staticmethod
    def from_json(values: list) -> Piece:
        """The piece that `to_json` wrote."""
        shape, dim, slices, start, stop = values
        return Piece(tuple(shape), dim, tuple((first, size) for first, size in slices), start, stop)


@dataclass(frozen=True)
class _Box:
    """A rectangle of the whole parameter that a piece holds."""

    row: int
    column: int
    rows: int
    columns: int
    offset: int
    """Of its first element in the piece's flat values; its rows are `width` elements apart there."""


@dataclass(frozen=True)
class Overlap:
    """A rectangle that two pieces share: [rows, columns], with its place in the flat values of either."""

    rows: int
    columns: int
    source_offset: int
    source_width: int
    target_offset: int
    target_width: int

    def source(self, values: Tensor, first: int = 0) -> Tensor:
        """The rectangle [rows, columns] in the source's flat values, of which `values` starts at element `first`."""
        return values.as_strided((self.rows, self.columns), (self.source_width, 1), values.storage_offset() + self.source_offset - first)

    def target(self, values: Tensor) -> Tensor:
        """The rectangle [rows, columns] in the target's flat values."""
        return values.as_strided((self.rows, self.columns), (self.target_width, 1), values.storage_offset() + self.target_offset)

    @property
    def source_span(self) -> tuple[int, int]:
        """(first, one past the last) of its elements in the source's flat values."""
        return self.source_offset, self.source_offset + (self.rows - 1) * self.source_width + self.columns


def overlaps(source: Piece, target: Piece) -> list[Overlap]:
    """Every rectangle of the whole parameter that both pieces hold."""
    assert source.shape == target.shape
    found = []
    wanted = list(_boxes(target))
    for held in _boxes(source):
        for box in wanted:
            row, column = max(held.row, box.row), max(held.column, box.column)
            rows = min(held.row + held.rows, box.row + box.rows) - row
            columns = min(held.column + held.columns, box.column + box.columns) - column
            if rows > 0 and columns > 0:
                offsets = [b.offset + (row - b.row) * p.width + column - b.column for b, p in ((held, source), (box, target))]
                found.append(Overlap(rows, columns, offsets[0], source.width, offsets[1], target.width))
    return found


def _boxes(piece: Piece) -> Iterator[_Box]:
    for row, column, rows, columns in _rectangles(piece.start, piece.stop, piece.width):
        first, last = (row, row + rows) if piece.dim == 0 else (column, column + columns)
        held = 0
        for start, size in piece.slices:
            begin, end = max(first, held), min(last, held + size)
            if begin < end:
                place = start + begin - held
                if piece.dim == 0:
                    yield _Box(place, column, end - begin, columns, begin * piece.width + column - piece.start)
                else:
                    yield _Box(row, place, rows, end - begin, row * piece.width + begin - piece.start)
            held += size


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of the flat range of a matrix with `width` columns: at most three."""
    if start >= stop:
        return
    row, column = divmod(start, width)
    if column:
        columns = min(width - column, stop - start)
        yield row, column, 1, columns
        start += columns
        row += 1
    if rows := (stop - start) // width:
        yield row, 0, rows, width
        start += rows * width
        row += rows
    if start < stop:
        yield row, 0, 1, stop - start
