"""Lines of a ChatML text file -> one row per conversation.

Two spellings, told apart by the first marker of the file: lines `<|system|>`, `<|user|>`, `<|assistant|>`, `<|tool|>`
that open a turn, or OpenAI's `<|im_start|>role` ... `<|im_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finetune.data.reading.lines import KEPT_BYTES, MAX_ROW_BYTES, Line, too_long
from finetune.data.record import ROLES, Message
from finetune.data.rows import Fault, Parsed, Place, Row, UnreadableRowError, build, decode_utf8, known_role
from finetune.source_sections import Source

MARKER = re.compile(rb"<\|(\w+)\|>[ \t\r]*\n?")
IM_START = re.compile(rb"<\|im_start\|>[ \t]*+(\w*+)[ \t\r]*+\n?")
IM_END = b"<|im_end|>"
KNOWN_MARKER = re.compile(rb"<\|(?:system|user|assistant|tool)\|>")


@dataclass
class Conversation:
    """The lines of one conversation while it is being read: turns as (role, content lines)."""

    line: int
    byte_offset: int
    size_bytes: int = 0
    original: list[bytes] = field(default_factory=list)
    turns: list[tuple[str, list[bytes]]] = field(default_factory=list)
    fault: tuple[str, str] | None = None
    closed: bool = True

    def blame(self, reason: str, detail: str) -> None:
        """Keep the first fault: the later ones often follow from it."""
        self.fault = self.fault or (reason, detail)


def is_openai(lines: Iterable[Line]) -> bool:
    """True where the first marker is OpenAI's; reads up to that marker."""
    for line in lines:
        if line.content.startswith(b"<|"):
            if line.content.startswith(b"<|im_start|>"):
                return True
            if KNOWN_MARKER.match(line.content):
                return False
    return False


def conversations(lines: Iterable[Line], *, openai: bool) -> Iterator[Conversation]:
    """Cut the lines into conversations; blank lines before the first belong to none."""
    current: Conversation | None = None
    blank_before = True
    for line in lines:
        opening = (IM_START if openai else MARKER).fullmatch(line.content)
        role = opening[1].decode("ascii", "replace") if opening else None
        blank = line.content.isspace()
        if role is not None and (current is None or _opens_conversation(current, role, blank_before)):
            if current:
                yield current
            current = Conversation(line.number, line.offset)
        elif current is None and not blank:
            current = Conversation(line.number, line.offset)
            current.blame("text_before_marker", f"no turn is open at {line.content[:60]!r}")
        if current is not None:
            _take(current, role, line, openai=openai)
        blank_before = blank
    if current:
        yield current


def conversation_row(current: Conversation, file: str, source: Source) -> Row:
    """The record of a conversation; one with a single bad byte is quarantined as a whole."""
    place = Place(file, current.line, current.byte_offset)
    original = b"".join(current.original)
    if current.size_bytes > MAX_ROW_BYTES:
        kept = Line(current.line, current.byte_offset, original[:KEPT_BYTES], current.size_bytes)
        return too_long(kept, file, "conversation_too_long")
    try:
        decode_utf8(original)
        if not current.closed:
            current.blame("unclosed_turn", "the conversation ends before <|im_end|>")
        if current.fault:
            raise UnreadableRowError(*current.fault)
        messages = tuple(Message(known_role(role), _turn_text(lines)) for role, lines in current.turns)
        return Parsed(build(source, messages=messages), place)
    except UnreadableRowError as fault:
        return Fault(place, fault.reason, fault.detail, original)


def _opens_conversation(current: Conversation, role: str, blank_before: bool) -> bool:
    if role == "system" or not current.turns:
        return True
    return role == "user" and blank_before and current.turns[-1][0] == "assistant"


def _take(current: Conversation, role: str | None, line: Line, *, openai: bool) -> None:
    current.size_bytes += line.size_bytes
    if current.size_bytes <= MAX_ROW_BYTES or not current.original:
        current.original.append(line.content)
    else:
        # Too long to be read: its turns are only followed to find where the next conversation starts.
        current.turns = [(name, []) for name, _ in current.turns[-1:]]
    if role is not None:
        if role not in ROLES:
            current.blame("unknown_role", f"role {role!r} at line {line.number}")
        if not current.closed:
            current.blame("unclosed_turn", f"a turn opens at line {line.number} before <|im_end|>")
        current.turns.append((role, []))
        current.closed = not openai
    elif openai:
        _take_openai_text(current, line)
    elif KNOWN_MARKER.match(line.content):
        current.blame("text_after_marker", f"line {line.number} holds a marker and text: {line.content[:60]!r}")
    elif current.turns:
        current.turns[-1][1].append(line.content)


def _take_openai_text(current: Conversation, line: Line) -> None:
    text, end, rest = line.content.partition(IM_END)
    if current.closed:
        if line.content.strip():
            current.blame("text_outside_turn", f"line {line.number}: {line.content[:60]!r}")
        return
    current.turns[-1][1].append(text)
    if end:
        current.closed = True
        if rest.strip():
            current.blame("text_outside_turn", f"line {line.number}, after <|im_end|>: {rest[:60]!r}")


def _turn_text(lines: list[bytes]) -> str:
    """The lines without the blank ones that separate this turn from the next; inner text stays as it is."""
    kept = list(lines)
    while kept and not kept[-1].strip():
        kept.pop()
    return b"".join(kept).decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
