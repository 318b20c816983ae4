"""What a parser yields: a record with its place, a row that is left out, or a Fault with its original bytes."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from finetune.data.record import ROLES, Message, Record, Role, make_record
from finetune.source_sections import Source

# How JSON spells a NUL, in tools and calls; an even number of backslashes before it spells backslashes.
SPELLED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

MAX_LEVELS = 200
# A string that never ends goes to the end of the text: else each quote in it would be tried as the start of one.
BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class Place:
    """Where a row starts: file relative to data/raw, line counted from 1, offset in bytes from 0.

    Of a .gz file, lines and bytes are those of its decompressed content. In a Parquet file the line is the number of
    the row, and the offset that of its row group.
    """

    file: str
    line: int
    byte_offset: int


@dataclass(frozen=True)
class RawRow:
    """A row of any container as columns; `original` is its bytes, None for Parquet, whose rows have none."""

    place: Place
    values: dict[str, Any]
    original: bytes | None

    def original_bytes(self) -> bytes:
        """The bytes of the row in its file; of a Parquet row, the columns that were read as JSON."""
        if self.original is not None:
            return self.original
        return json.dumps(self.values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Parsed:
    """A row that became a record."""

    record: Record
    place: Place


@dataclass(frozen=True)
class Skipped:
    """A row that can be read and that the recipe, or its format, leaves out; `reason` is a code to count by."""

    place: Place
    reason: str


@dataclass(frozen=True)
class Fault:
    """A row that cannot be read; `reason` is a code to count by, `detail` says what was seen."""

    place: Place
    reason: str
    detail: str
    original: bytes

    def to_row(self) -> dict[str, Any]:
        """The line of quarantine.jsonl; the original bytes are base64, as they need not be text.

        A lone surrogate in the detail, which quotes the row, is spelled `\\ud800`: UTF-8 cannot hold it.
        """
        return {
            "file": self.place.file,
            "line": self.place.line,
            "byte_offset": self.place.byte_offset,
            "reason": self.reason,
            "detail": self.detail.encode("utf-8", "backslashreplace").decode("utf-8"),
            "original_base64": base64.b64encode(self.original).decode("ascii"),
        }


Row = Parsed | Skipped | Fault


class UnreadableRowError(Exception):
    """One row cannot be read; caught by the parser that makes it a Fault, never seen outside data/."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class UnwantedRowError(Exception):
    """One row is left out; caught by the parser that makes it a Skipped, never seen outside data/."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_utf8(content: bytes) -> str:
    """Text of UTF-8 bytes; raises UnreadableRowError naming the first bad byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        bad = content[fault.start]
        raise UnreadableRowError("invalid_utf8", f"byte 0x{bad:02x} at {fault.start} of the row") from None


def load_json(text: str) -> Any:
    """One JSON value; raises UnreadableRowError.

    Refused too: NaN, Infinity and numbers beyond a double, as they are not JSON; more than 200 levels, as how deep
    Python itself can go depends on the caller; a key that stands twice in one object (`duplicate_key`), as readers
    differ in which value they take, and the other one would be lost.
    """
    if text.count("[") + text.count("{") > MAX_LEVELS and _levels(text) > MAX_LEVELS:
        raise UnreadableRowError("broken_json", f"more than {MAX_LEVELS} levels")
    try:
        return _DECODER.decode(text)
    except ValueError as fault:
        raise UnreadableRowError("broken_json", str(fault)) from None


def build(
    source: Source,
    *,
    messages: tuple[Message, ...] = (),
    text: str | None = None,
    tools: str | None = None,
    group: str | None = None,
    language: str | None = None,
) -> Record:
    """The record of one row; `language` is the row's own, which the source's replaces.

    Raises UnreadableRowError on an assistant turn with neither text nor call, on a NUL, which would end the text in
    every program in C, and on a lone surrogate, which UTF-8 cannot hold.
    """
    for message in messages:
        _check_text(message.content)
        if message.tool_calls is not None:
            _check_json(message.tool_calls)
        elif message.role == "assistant" and not message.content.strip():
            raise UnreadableRowError("empty_assistant", f"assistant turn is {message.content!r} and calls no tool")
    if tools is not None:
        _check_json(tools)
    for part in (text, group, language):
        if part is not None:
            _check_text(part)
    return make_record(
        source=source.name,
        messages=messages,
        text=text,
        tools=tools,
        group=group,
        language=source.language or language,
    )


def known_role(role: str) -> Role:
    """The role of that name; raises UnreadableRowError."""
    for known in ROLES:
        if role == known:
            return known
    raise UnreadableRowError("unknown_role", f"role {role!r}, known are {', '.join(ROLES)}")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise UnreadableRowError("nul_character", f"at character {text.index(chr(0))} of {text[:40]!r}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise UnreadableRowError("lone_surrogate", f"at character {fault.start} of {text[:40]!r}") from None


def _check_json(text: str) -> None:
    _check_text(text)
    if SPELLED_NUL.search(text):
        raise UnreadableRowError("nul_character", f"\\u0000 in the tools or the calls {text[:40]!r}")


def _levels(text: str) -> int:
    """How many brackets of a JSON text are open at most, as far as is allowed; those in strings do not count."""
    levels = deepest = 0
    for token in BRACKETS.finditer(text):
        levels += (token[0] in "[{") - (token[0] in "]}")
        deepest = max(deepest, levels)
        if deepest > MAX_LEVELS:
            break
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise UnreadableRowError("duplicate_key", f"key {twice!r} stands twice in one object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(spelling: str) -> float:
    number = float(spelling)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{spelling[:40]} is beyond a double")
    return number


# The standard decoder: at over 250 MB/s it is not what takes the time, and it keeps integers of any size, which
# faster ones turn into doubles.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)
