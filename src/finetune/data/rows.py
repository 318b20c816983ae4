"""What a parser yields: a Record with its place, or a Fault with its place, reason and original bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.data.record import ROLES, Message, Record, Role, make_record


@dataclass(frozen=True)
class Place:
    """Where a row starts: file relative to data/raw, line counted from 1, offset in bytes from 0."""

    file: str
    line: int
    byte_offset: int


@dataclass(frozen=True)
class Parsed:
    """A row that became a record."""

    record: Record
    place: Place


@dataclass(frozen=True)
class Fault:
    """A row that did not; `reason` is a code to count by, `detail` says what was seen."""

    place: Place
    reason: str
    detail: str
    original: bytes

    def to_row(self) -> dict[str, Any]:
        """The line of quarantine.jsonl; the original bytes are base64, as they need not be text."""
        return {
            "file": self.place.file,
            "line": self.place.line,
            "byte_offset": self.place.byte_offset,
            "reason": self.reason,
            "detail": self.detail,
            "original_base64": base64.b64encode(self.original).decode("ascii"),
        }


Row = Parsed | Fault


@dataclass(frozen=True)
class Origin:
    """Which source and file is being parsed; `skipped_bytes` (a byte order mark) are counted into every offset."""

    source: str
    file: str
    language: str | None
    skipped_bytes: int = 0

    def place(self, line: int, byte_offset: int) -> Place:
        """A place in this file."""
        return Place(self.file, line, byte_offset + self.skipped_bytes)


class UnreadableRowError(Exception):
    """One row cannot be read; caught by the parser that makes it a Fault, never seen outside data/."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def lines_with_offsets(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset, line with its ending); only LF ends a line, as in `wc` and `sed`."""
    offset = 0
    for number, line in enumerate(content.split(b"\n"), 1):
        ended = line + b"\n" if offset + len(line) < len(content) else line
        if ended:
            yield number, offset, ended
        offset += len(ended)


def decode_utf8(content: bytes) -> str:
    """Text of UTF-8 bytes; raises UnreadableRowError naming the first bad byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        bad = content[fault.start]
        raise UnreadableRowError("invalid_utf8", f"byte 0x{bad:02x} at {fault.start} of the row") from None


def load_json(text: str) -> Any:
    """One JSON value; NaN and Infinity are refused, as they are not JSON; raises UnreadableRowError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as fault:
        raise UnreadableRowError("broken_json", str(fault)) from None


def build(
    origin: Origin,
    *,
    messages: tuple[Message, ...] = (),
    text: str | None = None,
    tools: str | None = None,
    group: str | None = None,
) -> Record:
    """The record of one row; raises UnreadableRowError on an assistant turn with neither text nor call."""
    for message in messages:
        if message.role == "assistant" and not message.content.strip() and message.tool_calls is None:
            raise UnreadableRowError("empty_assistant", f"assistant turn is {message.content!r} and calls no tool")
    _encodable(text, tools, group, *(part for message in messages for part in (message.content, message.tool_calls)))
    return make_record(
        source=origin.source, messages=messages, text=text, tools=tools, group=group, language=origin.language
    )


def known_role(role: str) -> Role:
    """The role of that name; raises UnreadableRowError."""
    for known in ROLES:
        if role == known:
            return known
    raise UnreadableRowError("unknown_role", f"role {role!r}, known are {', '.join(ROLES)}")


def _encodable(*texts: str | None) -> None:
    """Refuse lone surrogates: JSON can spell them (\\ud800), UTF-8 cannot hold them."""
    for text in texts:
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as fault:
            raise UnreadableRowError("lone_surrogate", f"at character {fault.start}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
