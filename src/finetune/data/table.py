"""Bytes of a CSV file and its column map -> one row per record; quoted cells may hold line breaks.

Rows are read one by one, each from its own bytes: a bad row is quarantined and reading resumes on the next line.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence

from finetune.data.record import Message, Record
from finetune.data.rows import Fault, Origin, Parsed, Row, UnreadableRowError, build, decode_utf8, lines_with_offsets
from finetune.data_sections import Columns, CsvSource
from finetune.errors import DataError

# The longest row taken for one. A post or an answer in a table has a few lines; a quote that is opened and not closed
# runs on to the next quote, however many rows away that is.
MAX_ROW_LINES = 20


def parse_csv(content: bytes, origin: Origin, source: CsvSource) -> Iterator[Row]:
    """Yield one row per table row; raises DataError when the header lacks a column that the source names."""
    csv.field_size_limit(sys.maxsize)
    lines = list(lines_with_offsets(content))
    raw_lines = [line for _, _, line in lines]
    cells, at = _read_row(raw_lines, 0)
    header = [_header_cell(cell, origin) for cell in cells or []]
    _check_header(header, source.columns, origin)
    while at < len(lines):
        first, (number, offset, _) = at, lines[at]
        place = origin.place(number, offset)
        cells, at = _read_row(raw_lines, first)
        original = b"".join(raw_lines[first:at])
        if cells is None:
            yield Fault(place, "broken_csv", "a quote is not closed or not doubled", original)
        elif at - first > MAX_ROW_LINES:
            # Each line is a row that went missing, or may be one: all are counted, and none is read as a row by guess.
            detail = f"{at - first} lines from line {number} on would be one row: close the quote that opens there"
            for line_number, line_offset, line in lines[first:at]:
                yield Fault(origin.place(line_number, line_offset), "open_quote", detail, line)
        elif cells:
            try:
                yield Parsed(_record(header, [decode_utf8(cell) for cell in cells], origin, source), place)
            except UnreadableRowError as fault:
                yield Fault(place, fault.reason, fault.detail, original)


def _read_row(lines: Sequence[bytes], at: int) -> tuple[list[bytes] | None, int]:
    """The cells of the row that starts at line `at`, and the line after it; None for one line that is not a row.

    Latin-1 maps each byte to one character and back, so a bad byte cannot stop the reader before its row is known.
    """
    taken = 0

    def feed() -> Iterator[str]:
        nonlocal taken
        for index in range(at, len(lines)):
            taken += 1
            yield lines[index].decode("latin-1")

    try:
        cells = next(csv.reader(feed(), strict=True))
    except csv.Error:
        return None, at + 1
    return [cell.encode("latin-1") for cell in cells], at + taken


def _header_cell(cell: bytes, origin: Origin) -> str:
    try:
        return decode_utf8(cell).strip()
    except UnreadableRowError as fault:
        raise DataError(
            f"the header is not UTF-8: {fault.detail}", origin.file, "save the file as UTF-8 and run `dvc repro`"
        ) from None


def _check_header(header: list[str], columns: Columns, origin: Origin) -> None:
    lacking = sorted({name for name in columns.model_dump().values() if name is not None and name not in header})
    if lacking:
        raise DataError(
            f"column(s) {', '.join(lacking)} not in the header, which has: {', '.join(header)}",
            origin.file,
            "mend fetch.sources.columns in params.yaml (the separator must be a comma), then run `dvc repro`",
        )
    doubles = sorted({name for name in columns.model_dump().values() if name is not None and header.count(name) > 1})
    if doubles:
        raise DataError(
            f"column(s) {', '.join(doubles)} more than once in the header: {', '.join(header)}",
            origin.file,
            "give each column that fetch.sources.columns names a name of its own, then run `dvc repro`",
        )


def _record(header: list[str], cells: list[str], origin: Origin, source: CsvSource) -> Record:
    if len(cells) > len(header):
        raise UnreadableRowError("too_many_cells", f"{len(cells)} cells under {len(header)} columns")
    row = dict(zip(header, cells, strict=False))
    columns = source.columns
    group = None if columns.group is None else _cell(row, columns.group)[: source.group_characters]
    if columns.text is not None and source.prompt is None:
        text = _cell(row, columns.text)
        if not text.strip():
            raise UnreadableRowError("missing_field", f"column {columns.text} is empty")
        return build(origin, text=text, group=group)
    messages = []
    if columns.system is not None and (system := _cell(row, columns.system)):
        messages.append(Message("system", system))
    messages.append(Message("user", _cell(row, columns.user) if columns.user else source.prompt or ""))
    messages.append(Message("assistant", _cell(row, columns.assistant or columns.text or "")))
    return build(origin, messages=tuple(messages), group=group)


def _cell(row: dict[str, str], column: str) -> str:
    if column not in row:
        raise UnreadableRowError("missing_column", f"the row ends before column {column}")
    return row[column]
