"""Bytes of a ChatML text file -> one row per conversation.

Two spellings, told apart by what the file holds: lines `<|system|>`, `<|user|>`, `<|assistant|>`, `<|tool|>` that
open a turn, or OpenAI's `<|im_start|>role` ... `<|im_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.data.record import ROLES, Message
from finetune.data.rows import (
    Fault,
    Origin,
    Parsed,
    Row,
    UnreadableRowError,
    build,
    decode_utf8,
    known_role,
    lines_with_offsets,
)

MARKER = re.compile(rb"<\|(\w+)\|>[ \t\r]*\n?")
IM_START = re.compile(rb"<\|im_start\|>[ \t]*(\w*)[ \t\r]*\n?")
IM_END = b"<|im_end|>"
KNOWN_MARKER = re.compile(rb"<\|(?:system|user|assistant|tool)\|>")


@dataclass
class _Conversation:
    """The lines of one conversation while it is being read: turns as (role, content lines)."""

    line: int
    byte_offset: int
    original: list[bytes] = field(default_factory=list)
    turns: list[tuple[str, list[bytes]]] = field(default_factory=list)
    fault: tuple[str, str] | None = None
    closed: bool = True

    def blame(self, reason: str, detail: str) -> None:
        """Keep the first fault: the later ones often follow from it."""
        self.fault = self.fault or (reason, detail)


def parse_chatml(content: bytes, origin: Origin) -> Iterator[Row]:
    """Yield one Parsed or Fault per conversation; a conversation with one bad byte is quarantined as a whole."""
    openai = re.search(rb"^<\|im_start\|>", content, re.MULTILINE) is not None
    current: _Conversation | None = None
    blank_before = True
    for number, offset, line in lines_with_offsets(content):
        opening = (IM_START if openai else MARKER).fullmatch(line)
        role = opening[1].decode("ascii", "replace") if opening else None
        blank = not line.strip()
        if role is not None and (current is None or _opens_conversation(current, role, blank_before)):
            if current:
                yield _finish(current, origin)
            current = _Conversation(number, offset)
        elif current is None and not blank:
            current = _Conversation(number, offset)
            current.blame("text_before_marker", f"no turn is open at {line[:60]!r}")
        if current is not None:
            current.original.append(line)
            _take(current, role, line, number, openai=openai)
        blank_before = blank
    if current:
        yield _finish(current, origin)


def _opens_conversation(current: _Conversation, role: str, blank_before: bool) -> bool:
    if role == "system" or not current.turns:
        return True
    return role == "user" and blank_before and current.turns[-1][0] == "assistant"


def _take(current: _Conversation, role: str | None, line: bytes, number: int, *, openai: bool) -> None:
    if role is not None:
        if role not in ROLES:
            current.blame("unknown_role", f"role {role!r} at line {number}")
        if not current.closed:
            current.blame("unclosed_turn", f"a turn opens at line {number} before <|im_end|>")
        current.turns.append((role, []))
        current.closed = not openai
    elif openai:
        _take_openai_text(current, line, number)
    elif KNOWN_MARKER.match(line):
        current.blame("text_after_marker", f"line {number} holds a marker and text: {line[:60]!r}")
    elif current.turns:
        current.turns[-1][1].append(line)


def _take_openai_text(current: _Conversation, line: bytes, number: int) -> None:
    text, end, rest = line.partition(IM_END)
    if current.closed:
        if line.strip():
            current.blame("text_outside_turn", f"line {number}: {line[:60]!r}")
        return
    current.turns[-1][1].append(text)
    if end:
        current.closed = True
        if rest.strip():
            current.blame("text_outside_turn", f"line {number}, after <|im_end|>: {rest[:60]!r}")


def _finish(current: _Conversation, origin: Origin) -> Row:
    place = origin.place(current.line, current.byte_offset)
    original = b"".join(current.original)
    try:
        decode_utf8(original)
        if not current.closed:
            current.blame("unclosed_turn", "the conversation ends before <|im_end|>")
        if current.fault:
            raise UnreadableRowError(*current.fault)
        messages = tuple(Message(known_role(role), _turn_text(lines)) for role, lines in current.turns)
        return Parsed(build(origin, messages=messages), place)
    except UnreadableRowError as fault:
        return Fault(place, fault.reason, fault.detail, original)


def _turn_text(lines: list[bytes]) -> str:
    """The lines without the blank ones that separate this turn from the next; inner text stays as it is."""
    kept = list(lines)
    while kept and not kept[-1].strip():
        kept.pop()
    return b"".join(kept).decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
