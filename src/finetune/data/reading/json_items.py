"""JSON lines and JSON arrays -> raw rows: one object each, or a Fault with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from finetune.data.reading.lines import BLOCK_BYTES, KEPT_BYTES, MAX_ROW_BYTES, Chunk, Line, too_long
from finetune.data.rows import Fault, Place, RawRow, UnreadableRowError, decode_utf8, load_json

BLANK = b" \t\r\n"
# A string whole, so that a bracket inside one is not counted, else what opens, closes and separates. A line break ends
# a string: JSON has none inside, and without it one lost quote would turn every later string inside out.
STRUCTURE = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+["\n]|["\[\]{},]', re.DOTALL)
STRING_REST = re.compile(rb'[^"\\\n]*+(?:\\.[^"\\\n]*+)*+(["\n]|\\?\Z)', re.DOTALL)


def json_rows(items: Iterable[Line], file: str) -> Iterator[RawRow | Fault]:
    """Yield one row per line or item that is not blank; every value of it is kept as JSON gives it."""
    for item in items:
        if item.size_bytes > len(item.content):
            yield too_long(item, file, "line_too_long")
            continue
        if item.content.isspace():
            continue
        place = Place(file, item.number, item.offset)
        try:
            value = load_json(decode_utf8(item.content))
            if not isinstance(value, dict):
                raise UnreadableRowError("not_an_object", f"expected an object, got {type(value).__name__}")
            yield RawRow(place, value, item.content)
        except UnreadableRowError as fault:
            yield Fault(place, fault.reason, fault.detail, item.content)


def is_spread_object(content: bytes, file: str) -> bool:
    """True where the start of a file is that of one object over several lines.

    So it is where the first line is a lone `{`, and in a .json file where the first line leaves a bracket open outside
    strings and the next line is no row either: a row that was cut off is alone.
    """
    lines = [line for line in content.lstrip(BLANK).split(b"\n", 64) if line.strip(BLANK)]
    if lines[0].strip(BLANK) == b"{":
        return True
    if len(lines) < 2 or not lines[0].startswith(b"{") or not file.removesuffix(".gz").endswith(".json"):
        return False
    tokens = [token[0] for token in STRUCTURE.finditer(lines[0])]
    opened = sum((token in (b"{", b"[")) - (token in (b"}", b"]")) for token in tokens)
    return opened > 0 and b'"' not in tokens and not (lines[1].startswith(b"{") and _is_row(lines[1]))


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(load_json(decode_utf8(line)), dict)
    except UnreadableRowError:
        return False


@dataclass
class _Scanner:
    """Where in the array the reading stands: open brackets, and whether a string goes on into the next block."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def separators(self, block: bytes) -> Iterator[int]:
        """Yield the positions in the block of what ends an item: a comma or a closing bracket outside items."""
        at = self._end_of_string(block) if self.in_string else 0
        for token in STRUCTURE.finditer(block, at):
            symbol = token[0]
            if symbol == b'"':
                self.in_string = True
                self._end_of_string(block, token.end())
                return
            if self.depth == 0 and symbol in (b",", b"]"):
                yield token.start()
            elif symbol in (b"{", b"["):
                self.depth += 1
            elif symbol in (b"}", b"]"):
                self.depth = max(self.depth - 1, 0)

    def _end_of_string(self, block: bytes, at: int = 0) -> int:
        """The position after the string, which may go on to the end of the block."""
        end = STRING_REST.match(block, at + self.escaped)
        if end is None:
            return len(block)
        self.in_string, self.escaped = end[1] in (b"", b"\\"), end[1] == b"\\"
        return end.end()


@dataclass
class _Item:
    """The item being read: its place, its first bytes, and its size with the blanks after it."""

    line: int
    offset: int
    content: bytearray
    size_bytes: int = 0

    def extend(self, piece: bytes) -> None:
        """Take more bytes; beyond the longest row they are only counted."""
        self.size_bytes += len(piece)
        if len(self.content) <= MAX_ROW_BYTES:
            self.content += piece

    def whole(self) -> Line:
        """The item as a line without the blanks around it."""
        if self.size_bytes > MAX_ROW_BYTES:
            return Line(self.line, self.offset, bytes(self.content[:KEPT_BYTES]), self.size_bytes)
        content = bytes(self.content).rstrip(BLANK)
        return Line(self.line, self.offset, content, len(content))


def array_start(handle: BinaryIO, start: int) -> tuple[int, int] | None:
    """Offset after the bracket that opens an array and the line it is on; None where the first sign is another."""
    handle.seek(start)
    line, offset = 1, start
    while block := handle.read(BLOCK_BYTES):
        if text := block.lstrip(BLANK):
            blank_bytes = len(block) - len(text)
            line, offset = line + block.count(b"\n", 0, blank_bytes), offset + blank_bytes + 1
            return (offset, line) if text[:1] == b"[" else None
        line, offset = line + block.count(b"\n"), offset + len(block)
    return None


def array_items(handle: BinaryIO, chunk: Chunk) -> Iterator[Line]:
    """Cut the rest of an array into its items by counting brackets outside strings, so that a broken item stays alone.

    The chunk starts after the bracket that opens the array, or at an item. An item that never closes takes the rest of
    the file with it; what stands after the array is cut as if it were in it.
    """
    handle.seek(chunk.start)
    scanner, item, line, offset = _Scanner(), None, chunk.first_line, chunk.start
    while block := handle.read(BLOCK_BYTES if chunk.end is None else min(BLOCK_BYTES, chunk.end - offset)):
        begin = 0
        for end in (*scanner.separators(block), len(block)):
            piece = block[begin:end]
            if item is None and (text := piece.lstrip(BLANK)):
                blank_bytes = len(piece) - len(text)
                item = _Item(line + piece.count(b"\n", 0, blank_bytes), offset + begin + blank_bytes, bytearray())
                item.extend(text)
            elif item is not None:
                item.extend(piece)
            line += piece.count(b"\n")
            if item is not None and end < len(block):
                yield item.whole()
                item = None
            begin = end + 1
        offset += len(block)
    if item is not None:
        yield item.whole()
