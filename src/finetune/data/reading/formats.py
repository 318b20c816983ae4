"""Files below data/raw -> rows, by container and by the format that params.yaml declares.

A container gives raw rows, dictionaries of columns; a format makes a record of one. Any format reads any container,
but for chatml, which is both. A bad row never stops the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.data.reading.chatml import conversation_row
from finetune.data.reading.containers import (
    TEXT_COLUMN,
    chatml_conversations,
    chunks,
    container_of,
    header_of,
    is_utf16,
    raw_rows,
    utf16_faults,
)
from finetune.data.reading.conversations import (
    read_alpaca,
    read_messages,
    read_prompt_completion,
    read_sharegpt,
    read_text,
    read_transcript,
    read_turns,
)
from finetune.data.reading.fields import Values
from finetune.data.reading.filtering import unwanted
from finetune.data.reading.functions import read_glaive, read_tool_query
from finetune.data.reading.json_items import is_spread_object
from finetune.data.reading.lines import BLOCK_BYTES, BOM, Chunk, opened
from finetune.data.reading.parquet_rows import parquet_columns
from finetune.data.reading.signatures import read_signatures
from finetune.data.reading.table import check_columns
from finetune.data.reading.trees import read_trees
from finetune.data.record import Record
from finetune.data.rows import Fault, Parsed, RawRow, Row, Skipped, UnreadableRowError, UnwantedRowError
from finetune.errors import DataError
from finetune.source_sections import FIELDS, Format, Source

__all__ = ["Chunk", "check_file", "chunks", "parse_chunk"]

READERS: dict[Format, Callable[[Values, Source], Record]] = {
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "alpaca": read_alpaca,
    "prompt_completion": read_prompt_completion,
    "transcript": read_transcript,
    "tool_query": read_tool_query,
    "glaive": read_glaive,
    "signatures": read_signatures,
    "turns": read_turns,
    "text": read_text,
}
# The fields that a row cannot do without.
REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "transcript": ("transcript",),
    "message_tree": ("message_id", "parent_id", "role", "text"),
    "tool_query": ("query", "tools", "answers"),
    "glaive": ("system", "chat"),
    "signatures": ("functions", "query", "call"),
    "turns": ("turns",),
    "text": ("text",),
}
# These are inside the turns of a row: no column of a table has their names.
INSIDE_TURNS: dict[Format, tuple[str, ...]] = {
    "messages": ("role", "content", "tool_calls"),
    "sharegpt": ("from", "value"),
}


def parse_chunk(raw: Path, chunk: Chunk, source: Source) -> Iterator[Row]:
    """Yield the Parsed, Skipped and Fault rows of a chunk, in the order of the file.

    Raises DataError when a compressed or Parquet file is damaged, or a table has no header.
    """
    path = raw / chunk.file
    container = container_of(chunk.file, source)
    if container == "chatml":
        if is_utf16(path):
            yield from utf16_faults(path, chunk)
        else:
            for conversation in chatml_conversations(path, chunk):
                yield conversation_row(conversation, chunk.file, source)
    elif source.format == "message_tree":
        yield from read_trees(raw_rows(path, chunk, container, _columns(source)), source)
    else:
        read = READERS[source.format]
        for row in raw_rows(path, chunk, container, _columns(source)):
            yield row if isinstance(row, Fault) else _read(row, read, source)


def check_file(raw: Path, file: str, source: Source) -> None:
    """Raise DataError when a file is empty, one JSON object over several lines, or a table without a needed column."""
    path, container = raw / file, container_of(file, source)
    if container == "parquet":
        header = parquet_columns(path)
    else:
        with opened(path) as handle:
            content = handle.read(BLOCK_BYTES).removeprefix(BOM)
            while content.isspace() and (block := handle.read(BLOCK_BYTES)):
                content = block
        if not content.strip():
            raise DataError("file is empty", file, f"give source {source.name} a file with rows, then run `dvc repro`")
        if container == "json" and is_spread_object(content, file):
            raise DataError(
                "one JSON object stands over several lines, and no line of it is a row",
                file,
                "write the rows as JSON lines (one object a line) or as one array of objects, then run `dvc repro`",
            )
        if container in ("json", "chatml"):
            return
        header = [TEXT_COLUMN] if container == "txt" else header_of(path, file, container)
    inside = INSIDE_TURNS.get(source.format, ())
    needed = [source.column(field) for field in REQUIRED[source.format]]
    needed += [column for field, column in source.columns.items() if field not in inside]
    check_columns(header, [*needed, *(rule.column for rule in source.filters)], file)


def _columns(source: Source) -> list[str]:
    """The columns that a source can read: those of its format and of its filters."""
    inside = INSIDE_TURNS.get(source.format, ())
    fields = [source.column(field) for field in FIELDS[source.format] if field not in inside]
    return [*fields, *(rule.column for rule in source.filters)]


def _read(row: RawRow, read: Callable[[Values, Source], Record], source: Source) -> Row:
    if source.filters and (reason := unwanted(row.values, source.filters)):
        return Skipped(row.place, reason)
    try:
        return Parsed(read(row.values, source), row.place)
    except UnwantedRowError as unwanted_row:
        return Skipped(row.place, unwanted_row.reason)
    except UnreadableRowError as fault:
        return Fault(row.place, fault.reason, fault.detail, row.original_bytes())
