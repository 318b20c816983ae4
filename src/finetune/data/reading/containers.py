"""The containers of raw rows, by the ending of the file's name, and how a file is cut into chunks.

A chunk parses to the same rows as that part of the whole file does: cuts are at line ends where a line is a row, else
at the starts of rows, for which the file is read through once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from finetune.data.reading.chatml import Conversation, conversations, is_openai
from finetune.data.reading.json_items import array_items, array_start, json_rows
from finetune.data.reading.lines import (
    UTF16_BOMS,
    Chunk,
    Line,
    body_start,
    chunks_at,
    head_of,
    line_chunks,
    opened,
    read_lines,
    too_long,
)
from finetune.data.reading.parquet_rows import parquet_chunks, parquet_rows
from finetune.data.reading.table import read_header, table_rows
from finetune.data.rows import Fault, Place, RawRow, UnreadableRowError, decode_utf8
from finetune.errors import DataError
from finetune.source_sections import Source

Container = Literal["json", "csv", "tsv", "parquet", "txt", "chatml"]
ENDINGS: dict[str, Container] = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
    ".ndjson": "json",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
TEXT_COLUMN = "text"


def container_of(file: str, source: Source) -> Container:
    """The container of a file; raises DataError on an ending that is none. A chatml file may have any name."""
    if source.format == "chatml":
        return "chatml"
    ending = PurePosixPath(file.removesuffix(".gz")).suffix
    if ending not in ENDINGS or (ending == ".parquet" and file.endswith(".gz")):
        known = ", ".join(ENDINGS)
        raise DataError(
            f"{ending or 'no ending'} is no known container", file, f"name it {known}, all but .parquet also with .gz"
        )
    return ENDINGS[ending]


def chunks(raw: Path, file: str, source: Source) -> list[Chunk]:
    """Cut a file into parts of about 16 MiB that `parse_chunk` takes, in order.

    One chunk is a message_tree file, and a .gz file, which can only be read from its start. Raises DataError on an
    unknown container, or a damaged Parquet file.
    """
    path = raw / file
    container = container_of(file, source)
    if container == "parquet":
        return parquet_chunks(path, file, whole=source.format == "message_tree")
    whole = Chunk(file, 0, None, 1)
    if source.format == "message_tree" or path.suffix == ".gz":
        return [whole]
    if is_utf16(path) or container == "txt":
        return line_chunks(path, file)
    if container == "json":
        with opened(path) as handle:
            if array_start(handle, body_start(path)) is None:
                return line_chunks(path, file)
    return chunks_at(_starts(path, whole, container), file)


def is_utf16(path: Path) -> bool:
    """True for a file that begins with a byte order mark of UTF-16."""
    return head_of(path)[:2] in UTF16_BOMS


def raw_rows(path: Path, chunk: Chunk, container: Container, columns: list[str]) -> Iterator[RawRow | Fault]:
    """Yield the rows of a chunk of any container but chatml; raises DataError on a damaged file.

    Of a Parquet file only `columns` are read; the rows of the other containers have all of theirs.
    """
    if container == "parquet":
        yield from parquet_rows(path, chunk, columns)
    elif is_utf16(path):
        yield from utf16_faults(path, chunk)
    else:
        with opened(path) as handle:
            yield from _text_rows(handle, path, chunk, container)


def utf16_faults(path: Path, chunk: Chunk) -> Iterator[Fault]:
    """Every line of a UTF-16 file as a Fault."""
    detail = "the file begins with a byte order mark of UTF-16: save it as UTF-8"
    with opened(path) as handle:
        for line in read_lines(handle, chunk, chunk.start):
            yield Fault(Place(chunk.file, line.number, line.offset), "utf16", detail, line.content)


def chatml_conversations(path: Path, chunk: Chunk) -> Iterator[Conversation]:
    """Yield the conversations of a chunk of a chatml file."""
    begin = body_start(path)
    with opened(path) as handle:
        openai = is_openai(read_lines(handle, Chunk(chunk.file, 0, None, 1), begin))
        yield from conversations(read_lines(handle, chunk, max(chunk.start, begin)), openai=openai)


def header_of(path: Path, file: str, container: Container) -> list[str]:
    """The columns of a .csv or .tsv file; raises DataError when it has no header."""
    begin = body_start(path)
    with opened(path) as handle:
        return read_header(handle, file, begin, DELIMITERS[container])[0]


def _text_rows(handle: BinaryIO, path: Path, chunk: Chunk, container: Container) -> Iterator[RawRow | Fault]:
    begin = body_start(path)
    if container in DELIMITERS:
        header, rest = read_header(handle, chunk.file, begin, DELIMITERS[container])
        if chunk.start == 0:
            chunk = Chunk(chunk.file, rest.start, chunk.end, rest.first_line)
        yield from table_rows(handle, chunk, header, DELIMITERS[container])
    elif container == "txt":
        yield from _lines_as_rows(read_lines(handle, chunk, max(chunk.start, begin)), chunk.file)
    else:
        yield from json_rows(_json_items(handle, chunk, begin), chunk.file)


def _json_items(handle: BinaryIO, chunk: Chunk, begin: int) -> Iterator[Line]:
    """The lines or the items of a chunk of JSON."""
    after_bracket = array_start(handle, begin)
    if after_bracket is None:
        return read_lines(handle, chunk, max(chunk.start, begin))
    if chunk.start == 0:
        chunk = Chunk(chunk.file, after_bracket[0], chunk.end, after_bracket[1])
    return array_items(handle, chunk)


def _lines_as_rows(lines: Iterable[Line], file: str) -> Iterator[RawRow | Fault]:
    for line in lines:
        place = Place(file, line.number, line.offset)
        if line.size_bytes > len(line.content):
            yield too_long(line, file, "line_too_long")
        elif line.content.strip():
            try:
                text = decode_utf8(line.content).removesuffix("\n").removesuffix("\r")
                yield RawRow(place, {TEXT_COLUMN: text}, line.content)
            except UnreadableRowError as fault:
                yield Fault(place, fault.reason, fault.detail, line.content)


def _starts(path: Path, whole: Chunk, container: Container) -> Iterator[tuple[int, int]]:
    """Offset and line of every row that a chunk can start with, without reading what is in it."""
    if container == "chatml":
        for conversation in chatml_conversations(path, whole):
            yield conversation.byte_offset, conversation.line
        return
    with opened(path) as handle:
        if container == "json":
            for item in _json_items(handle, whole, body_start(path)):
                yield item.offset, item.number
        else:
            for row in _text_rows(handle, path, whole, container):
                if isinstance(row, Fault) and row.reason == "open_quote":
                    continue  # between these lines a quote is open
                yield row.place.byte_offset, row.place.line
