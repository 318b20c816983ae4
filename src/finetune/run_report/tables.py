"""A table as the page and the card both draw it: headings, and cells with a text, a note and a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """`text`; `note`: a smaller line below, such as an interval; `kept`: whether within its budget, if it has one."""

    text: str
    note: str = ""
    kept: bool | None = None


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are headings; the first cell names the row."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def table(headings: Iterable[str], rows: Iterable[Iterable[Cell | str]]) -> Table:
    """A Table from cells, or from texts that need neither note nor verdict."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Table(tuple(headings), cells)
