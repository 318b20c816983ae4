"""Row groups of a Parquet file -> raw rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from finetune.data.reading.lines import CHUNK_BYTES, Chunk
from finetune.data.rows import Fault, Place, RawRow
from finetune.errors import DataError

BATCH_ROWS = 512


def parquet_chunks(path: Path, file: str, *, whole: bool) -> list[Chunk]:
    """Row groups together up to about 16 MiB of their uncompressed content; `start` and `end` count row groups."""
    metadata = _opened(path).metadata
    chunks: list[Chunk] = []
    start, size_bytes, first_row, row = 0, 0, 1, 1
    for index in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(index).total_byte_size
        row += metadata.row_group(index).num_rows
        if (size_bytes >= CHUNK_BYTES and not whole) or index + 1 == metadata.num_row_groups:
            chunks.append(Chunk(file, start, index + 1, first_row))
            start, size_bytes, first_row = index + 1, 0, row
    return chunks


def parquet_columns(path: Path) -> list[str]:
    """The names of the columns; raises DataError when the file is damaged, or has no row."""
    opened = _opened(path)
    if not opened.metadata.num_rows:
        raise DataError("file has no row", path, "give the source a file with rows, then run `dvc repro`")
    names: list[str] = opened.schema_arrow.names
    return names


def parquet_rows(path: Path, chunk: Chunk, columns: list[str]) -> Iterator[RawRow | Fault]:
    """Yield the rows of the row groups with those of the columns that are there; raises DataError on a damaged file.

    A value that Python cannot hold, as a date beyond the year 9999, is a Fault of its row.
    """
    file = _opened(path)
    read = [name for name in file.schema_arrow.names if name in columns]
    row = chunk.first_line
    end = file.metadata.num_row_groups if chunk.end is None else chunk.end
    for index in range(chunk.start, end):
        offset = _offset(file.metadata.row_group(index))
        batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[index], columns=read)
        while (batch := _next_batch(batches, path)) is not None:
            yield from _batch_rows(batch, chunk.file, row, offset)
            row += batch.num_rows


def _next_batch(batches: Iterator[Any], path: Path) -> Any:
    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as fault:
        raise DataError(f"the Parquet file is damaged: {fault}", path, "fetch or make the file again") from None


def _batch_rows(batch: Any, file: str, first_row: int, offset: int) -> Iterator[RawRow | Fault]:
    try:
        for index, values in enumerate(batch.to_pylist()):
            yield RawRow(Place(file, first_row + index, offset), values, None)
    except (ValueError, OverflowError, TypeError, KeyError, pyarrow.ArrowException) as fault:
        if batch.num_rows == 1:
            reason = "invalid_utf8" if isinstance(fault, UnicodeDecodeError) else "broken_value"
            yield Fault(Place(file, first_row, offset), reason, str(fault), _as_arrow(batch))
            return
        for index in range(batch.num_rows):
            yield from _batch_rows(batch.slice(index, 1), file, first_row + index, offset)


def _as_arrow(batch: Any) -> bytes:
    """A row as an Arrow stream: it holds a byte that no text can."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _opened(path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as fault:
        raise DataError(f"not a Parquet file: {fault}", path, "fetch or make the file again") from None


def _offset(row_group: Any) -> int:
    """Where the first page of the row group is in the file."""
    columns = (row_group.column(index) for index in range(row_group.num_columns))
    pages = [page for column in columns for page in (column.dictionary_page_offset, column.data_page_offset)]
    return min((page for page in pages if page is not None and page > 0), default=0)
