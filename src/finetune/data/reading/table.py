"""Bytes of a CSV or TSV file -> raw rows under its header; quoted cells may hold line breaks.

Rows are read one by one, each from its own bytes: a bad row is quarantined and reading resumes on the next line.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

from finetune.data.reading.lines import MAX_ROW_BYTES, Chunk, Line, read_lines, too_long
from finetune.data.rows import Fault, Place, RawRow, UnreadableRowError, decode_utf8
from finetune.errors import DataError

# The longest row taken for one. A post or an answer in a table has a few lines; a quote that is opened and not closed
# runs on to the next quote, however many rows away that is.
MAX_ROW_LINES = 20
# How far the quote that closes is looked for. Where there is none so far, only the line that opens it is at fault.
LOOKAHEAD_LINES = 10_000
# How many characters of identifiers, dates and the like show that a line between two quotes is a row: a date has 10.
EVIDENCE_CHARACTERS = 8
WORD = re.compile(r"\w+")


def read_header(handle: BinaryIO, file: str, start: int, delimiter: str) -> tuple[list[str], Chunk]:
    """The names of the columns, and the rest of the file; raises DataError when the first row is no header."""
    window: deque[Line] = deque()
    lines = read_lines(handle, Chunk(file, start, None, 1), start)
    cells: list[bytes] | None = []
    while cells == [] and _fill(window, lines):
        cells, taken = _read_row(window, lines, delimiter)
        last = [window.popleft() for _ in range(taken)][-1]
    if not cells:
        raise DataError("the first row is not a header of columns", file, "give the table a header as its first line")
    try:
        header = [decode_utf8(cell).strip() for cell in cells]
    except UnreadableRowError as fault:
        raise DataError(f"the header is not UTF-8: {fault.detail}", file, "save the file as UTF-8") from None
    return header, Chunk(file, last.offset + last.size_bytes, None, last.number + 1)


def table_rows(handle: BinaryIO, chunk: Chunk, header: list[str], delimiter: str) -> Iterator[RawRow | Fault]:
    """Yield the rows of a chunk that starts at a row; a short row has only its first columns."""
    window: deque[Line] = deque()
    lines = read_lines(handle, chunk, chunk.start)
    while first := _fill(window, lines):
        if first.size_bytes > len(first.content):
            yield too_long(window.popleft(), chunk.file, "line_too_long")
            continue
        cells, taken = _read_row(window, lines, delimiter)
        own = [window.popleft() for _ in range(taken)]
        if cells != []:
            yield from _rows_of(cells, own, header, chunk.file, delimiter)


def check_columns(header: list[str], needed: list[str], file: str) -> None:
    """Raise DataError when a needed column is not in the header, or is there twice."""
    if lacking := sorted({name for name in needed if name not in header}):
        raise DataError(
            f"column(s) {', '.join(lacking)} not in the header, which has: {', '.join(header)}",
            file,
            "mend `columns` and `filters` of the source in params.yaml (a .csv has commas, a .tsv tabs), "
            "then run `dvc repro`",
        )
    if doubles := sorted({name for name in needed if header.count(name) > 1}):
        raise DataError(
            f"column(s) {', '.join(doubles)} more than once in the header: {', '.join(header)}",
            file,
            "give each column that the source reads a name of its own, then run `dvc repro`",
        )


def _rows_of(
    cells: list[bytes] | None, own: list[Line], header: list[str], file: str, delimiter: str
) -> Iterator[RawRow | Fault]:
    place = Place(file, own[0].number, own[0].offset)
    original = b"".join(line.content for line in own)
    if cells is None:
        yield Fault(place, "broken_csv", "a quote is not closed or not doubled", original)
    elif len(own) > MAX_ROW_LINES or _swallows_a_row(cells, own, len(header), delimiter):
        # Each line is a row that went missing, or may be one: all are counted, and none is read as a row by guess.
        detail = f"{len(own)} lines from line {place.line} on would be one row: close the quote that opens there"
        for line in own:
            yield Fault(Place(file, line.number, line.offset), "open_quote", detail, line.content)
    elif len(cells) > len(header):
        yield Fault(place, "too_many_cells", f"{len(cells)} cells under {len(header)} columns", original)
    else:
        try:
            yield RawRow(place, dict(zip(header, map(decode_utf8, cells), strict=False)), original)
        except UnreadableRowError as fault:
            yield Fault(place, fault.reason, fault.detail, original)


def _swallows_a_row(cells: list[bytes], own: list[Line], columns: int, delimiter: str) -> bool:
    """True where a line between the quotes of a row is surely a row itself, and so one of the quotes is stray.

    It has as many cells as the header, and wherever the row has digits in a cell of one line, as identifiers and dates
    have, its cell is spelled alike: `2,Two,2024-05-07` in a row with 1 and 2024-05-06. Commas alone prove nothing, as
    texts have lists; so in a table without such columns no row is found out.
    """
    if len(own) == 1:
        return False
    first_long = next((index for index, cell in enumerate(cells) if b"\n" in cell), 0)
    # Beyond a cell of several lines, columns correspond only where no cell is lacking or too many.
    known = cells if len(cells) == columns else cells[:first_long]
    telling = {i: _spelling(cell) for i, cell in enumerate(known) if b"\n" not in cell and re.search(rb"[0-9]", cell)}
    for line in own[1:]:
        # The end of the last line is the end of the row itself, so only what comes before the long cell tells.
        wanted = telling if line is not own[-1] else {i: cell for i, cell in telling.items() if i < first_long}
        try:
            inner = next(csv.reader([line.content.decode("latin-1")], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if len(inner) == columns:
            found = {i: inner[i].encode("latin-1") for i in wanted}
            alike = all(_spelling(found[i]) == wanted[i] for i in wanted)
            if alike and sum(map(len, found.values())) >= EVIDENCE_CHARACTERS:
                return True
    return False


def _spelling(cell: bytes) -> str:
    """The cell with each word that has a digit as 0, and each other one as a: 6 May 2024 is 0 a 0."""
    return WORD.sub(lambda word: "0" if re.search("[0-9]", word[0]) else "a", cell.decode("utf-8", "replace"))


def _fill(window: deque[Line], lines: Iterator[Line]) -> Line | None:
    """The first line of the window, read if it is empty; None at the end."""
    if not window:
        window.extend(line for line in (next(lines, None),) if line)
    return window[0] if window else None


def _read_row(window: deque[Line], lines: Iterator[Line], delimiter: str) -> tuple[list[bytes] | None, int]:
    """The cells of the row that starts the window, and how many lines it has; None for one line that is not a row.

    Lines that are read in search of a closing quote stay in the window. Latin-1 maps each byte to one character and
    back, so a bad byte cannot stop the reader before its row is known.
    """
    taken = 0

    def feed() -> Iterator[str]:
        nonlocal taken
        seen_bytes = 0
        for index in range(LOOKAHEAD_LINES):
            if index == len(window):
                window.extend(line for line in (next(lines, None),) if line)
            if index == len(window) or window[index].size_bytes > len(window[index].content):
                return
            seen_bytes += window[index].size_bytes
            if index and seen_bytes > MAX_ROW_BYTES:
                return
            taken += 1
            yield window[index].content.decode("latin-1")

    csv.field_size_limit(sys.maxsize)
    try:
        cells = next(csv.reader(feed(), delimiter=delimiter, strict=True), None)
    except csv.Error:
        return None, 1
    return (None, 1) if cells is None else ([cell.encode("latin-1") for cell in cells], taken)
