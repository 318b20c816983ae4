"""Files read a line at a time, plain or .gz: exact line numbers and offsets, and a bound on what one line may take."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from finetune.data.rows import Fault, Place
from finetune.errors import DataError

BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
# What a worker takes at a time.
CHUNK_BYTES = 16 << 20
# The longest line, item of an array or conversation that is read: 16 MiB, some 3 million words. Of a longer one the
# start is kept, and its place and size tell where the rest is.
MAX_ROW_BYTES = 16 << 20
KEPT_BYTES = 4096
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A part of a file that can be parsed by itself: bytes from `start` to `end`, or row groups of a Parquet file.

    `first_line`: number of the line, or of the Parquet row, that it starts with. `end` is None at the end of the file.
    """

    file: str
    start: int
    end: int | None
    first_line: int


class Line(NamedTuple):
    """A line with its ending; `size_bytes` exceeds the length of `content` where only its start was kept."""

    number: int
    offset: int
    content: bytes
    size_bytes: int


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, or the content of a .gz file; raises DataError when that cannot be decompressed."""
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as handle:
            yield handle
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise DataError(f"the compressed file is damaged: {fault}", path, "fetch or make the file again") from None


def head_of(path: Path) -> bytes:
    """The first bytes of the content."""
    with opened(path) as handle:
        return handle.read(len(BOM))


def body_start(path: Path) -> int:
    """Bytes of a UTF-8 byte order mark: the offset at which the text begins."""
    return len(BOM) if head_of(path) == BOM else 0


def read_lines(handle: BinaryIO, chunk: Chunk, start: int) -> Iterator[Line]:
    """Yield the lines of a chunk from the offset `start`; only LF ends a line, as in `wc` and `sed`."""
    handle.seek(start)
    number, offset = chunk.first_line, start
    while (chunk.end is None or offset < chunk.end) and (content := handle.readline(MAX_ROW_BYTES)):
        size_bytes = len(content)
        if size_bytes == MAX_ROW_BYTES and not content.endswith(b"\n"):
            rest_bytes = _skip_line(handle)
            size_bytes += rest_bytes
            content = content[:KEPT_BYTES] if rest_bytes else content
        yield Line(number, offset, content, size_bytes)
        number, offset = number + 1, offset + size_bytes


def too_long(line: Line, file: str, reason: str) -> Fault:
    """The Fault of a line, an item or a conversation of which only the start was kept."""
    detail = f"{line.size_bytes} bytes, more than {MAX_ROW_BYTES}; the first {len(line.content)} are kept here"
    return Fault(Place(file, line.number, line.offset), reason, detail, line.content)


def line_chunks(path: Path, file: str) -> list[Chunk]:
    """Cut a file at line ends. Of each chunk one block is in memory at a time."""
    chunks: list[Chunk] = []
    start, line = 0, 1
    with opened(path) as handle:
        while block := handle.read(CHUNK_BYTES):
            end, lines, ended = start + len(block), block.count(b"\n"), block.endswith(b"\n")
            if not ended:
                end, lines = end + _skip_line(handle), lines + 1
            chunks.append(Chunk(file, start, end, line))
            start, line = end, line + lines
    return chunks


def chunks_at(starts: Iterable[tuple[int, int]], file: str) -> list[Chunk]:
    """Cut a file at some of the (offset, line) where its rows start; the last chunk is open."""
    cuts = [(0, 1)]
    for offset, line in starts:
        if offset - cuts[-1][0] >= CHUNK_BYTES:
            cuts.append((offset, line))
    ends: list[int | None] = [*(offset for offset, _ in cuts[1:]), None]
    return [Chunk(file, offset, end, line) for (offset, line), end in zip(cuts, ends, strict=True)]


def _skip_line(handle: BinaryIO) -> int:
    """Read to the end of the line; returns the number of bytes."""
    skipped_bytes = 0
    while block := handle.readline(BLOCK_BYTES):
        skipped_bytes += len(block)
        if block.endswith(b"\n"):
            break
    return skipped_bytes
