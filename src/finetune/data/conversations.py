"""Bytes of a JSON or JSON-lines file -> one row per conversation, in OpenAI's `messages` or in ShareGPT's shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from finetune.data.record import Message, Record, Role
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
    load_json,
)
from finetune.data.tool_calls import calls_json, tools_json

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# Strings whole, so that a bracket inside one is not counted, then what opens, closes and separates.
JSON_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)


def parse_messages(content: bytes, origin: Origin) -> Iterator[Row]:
    """Yield one row per line `{"messages": [{role, content, tool_calls?}], "tools"?, "group"?}`."""
    yield from _each(_json_lines(content), origin, _from_messages)


def parse_sharegpt(content: bytes, origin: Origin) -> Iterator[Row]:
    """Yield one row per item `{"conversations": [{from, value}], "system"?, "tools"?, "group"?}`, array or lines."""
    items = _json_array(content) if content.lstrip()[:1] == b"[" else _json_lines(content)
    yield from _each(items, origin, _from_sharegpt)


def _each(
    items: Iterator[tuple[int, int, bytes]], origin: Origin, read: Callable[[dict[str, Any], Origin], Record]
) -> Iterator[Row]:
    for line, offset, original in items:
        place = origin.place(line, offset)
        try:
            value = load_json(decode_utf8(original))
            if not isinstance(value, dict):
                raise UnreadableRowError("broken_json", f"expected an object, got {type(value).__name__}")
            yield Parsed(read(value, origin), place)
        except UnreadableRowError as fault:
            yield Fault(place, fault.reason, fault.detail, original)


def _json_lines(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    return ((line, offset, original) for line, offset, original in lines_with_offsets(content) if original.strip())


def _json_array(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Cut an array into its items by counting brackets outside strings, so that one broken item stays alone.

    An item that never closes takes the rest of the file with it, as one piece.
    """
    start = content.index(b"[") + 1
    depth, line, counted = 0, 1, 0
    for token in JSON_STRUCTURE.finditer(content, start):
        symbol = token[0]
        ends = depth == 0 and symbol in (b",", b"]")
        if ends:
            piece = content[start : token.start()]
            if piece.strip():
                offset = start + len(piece) - len(piece.lstrip())
                line, counted = line + content.count(b"\n", counted, offset), offset
                yield line, offset, piece.strip()
            start = token.end()
        if ends and symbol == b"]":
            break
        depth += (symbol in (b"{", b"[")) - (symbol in (b"}", b"]") and depth > 0)
    if rest := content[start:].strip():
        offset = content.index(rest, start)
        yield line + content.count(b"\n", counted, offset), offset, rest


def _from_messages(value: dict[str, Any], origin: Origin) -> Record:
    messages = []
    for index, entry in enumerate(_turns(value, "messages")):
        role = known_role(_text_of(entry, "role", index))
        calls = calls_json(entry.get("tool_calls"))
        content = "" if calls and entry.get("content") is None else _text_of(entry, "content", index)
        messages.append(Message(role, content, calls))
    return _record(value, origin, messages)


def _from_sharegpt(value: dict[str, Any], origin: Origin) -> Record:
    messages = []
    if value.get("system"):
        messages.append(Message("system", _text_of(value, "system", 0)))
    for index, entry in enumerate(_turns(value, "conversations")):
        speaker, text = _text_of(entry, "from", index), _text_of(entry, "value", index)
        if speaker not in SHAREGPT_ROLES:
            raise UnreadableRowError("unknown_role", f"from {speaker!r}, known are {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            messages.append(Message("assistant", "", calls_json(load_json(text))))
        else:
            messages.append(Message(SHAREGPT_ROLES[speaker], text))
    return _record(value, origin, messages)


def _record(value: dict[str, Any], origin: Origin, messages: list[Message]) -> Record:
    group = value.get("group")
    if group is not None and not isinstance(group, str | int):
        raise UnreadableRowError("broken_group", f"group must be a text or a number, got {type(group).__name__}")
    name = None if group is None else str(group)
    return build(origin, messages=tuple(messages), tools=tools_json(value.get("tools")), group=name)


def _turns(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = value.get(key)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UnreadableRowError("missing_field", f"{key} must be a list of turns; the keys are {sorted(value)}")
    return turns


def _text_of(entry: dict[str, Any], key: str, index: int) -> str:
    text = entry.get(key)
    if not isinstance(text, str):
        raise UnreadableRowError("missing_field", f"turn {index + 1}: {key} must be a text, got {type(text).__name__}")
    return text
