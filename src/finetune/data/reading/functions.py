"""Rows about calling functions -> records: a query with its calls, and Glaive's conversations in two texts."""

from __future__ import annotations

import json
import re

from finetune.data.reading.fields import Values, group_of, text_of, value_of
from finetune.data.reading.tool_calls import calls_in_text, calls_json, tools_json
from finetune.data.record import Message, Record, Role
from finetune.data.rows import UnreadableRowError, build, load_json
from finetune.source_sections import Source

# After blanks with an empty line among them, or at the start. A run of blanks is looked at once, from its start.
GLAIVE_TURN = re.compile(r"(?:\A\s*+|(?=\s)(?<!\s)(?:[^\S\n]|\n(?!\n))*+\n\n\s*+)(USER|ASSISTANT|FUNCTION RESPONSE):")
NOT_BETWEEN_TOOLS = re.compile(r"[^ \t\r\n,]")
GLAIVE_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
END_OF_TURN = "<|endoftext|>"
CALL_TAG = "<functioncall>"
# {"name": "f", "arguments": '{"x": 1}'}: JSON but for the quotes around the arguments, which may hold apostrophes.
QUOTED_CALL = re.compile(r"""\{\s*"name":\s*("[^"\\]*+(?:\\.[^"\\]*+)*+"),\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)


def read_tool_query(values: Values, source: Source) -> Record:
    """`query`, `tools` (a list of definitions) and `answers` (a list of calls), each list also as a JSON text."""
    answers = value_of(values, source, "answers")
    calls = calls_in_text(answers) if isinstance(answers, str) else calls_json(answers)
    messages = (Message("user", text_of(values, source, "query")), Message("assistant", "", calls))
    tools = tools_json(value_of(values, source, "tools"))
    return build(source, messages=messages, tools=tools, group=group_of(values, source))


def read_glaive(values: Values, source: Source) -> Record:
    """`system` with the functions as JSON objects after its text, and `chat` with turns in one text."""
    prompt, tools = _system_and_tools(text_of(values, source, "system"))
    messages = [Message("system", prompt)] if prompt else []
    before, *parts = GLAIVE_TURN.split(text_of(values, source, "chat"))
    if before.strip() or not parts:
        raise UnreadableRowError("text_before_marker", f"no turn is open at {before.strip()[:60]!r}")
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        messages.append(_glaive_turn(GLAIVE_ROLES[speaker], text))
    return build(source, messages=tuple(messages), tools=tools, group=group_of(values, source))


def _system_and_tools(text: str) -> tuple[str, str | None]:
    """The prompt without `SYSTEM:` and without the dash before the functions; the functions as a JSON list."""
    text = text.strip().removeprefix("SYSTEM:")
    start = text.find("{")
    if start < 0:
        return text.strip(), None
    decoder, tools, at = json.JSONDecoder(), [], start
    while at < len(text) and text[at] == "{":
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as fault:
            raise UnreadableRowError("broken_tools", f"{fault} in {text[at : at + 60]!r}") from None
        tools.append(load_json(text[at:end]))
        following = NOT_BETWEEN_TOOLS.search(text, end)
        at = following.start() if following else len(text)
    if text[at:].strip():
        raise UnreadableRowError("broken_tools", f"no function but text at {text[at : at + 60]!r}")
    return text[:start].rstrip().removesuffix("-").strip(), tools_json(tools)


def _glaive_turn(role: Role, text: str) -> Message:
    text, _, rest = text.partition(END_OF_TURN)
    if rest.strip():
        raise UnreadableRowError("text_outside_turn", f"after {END_OF_TURN}: {rest.strip()[:60]!r}")
    if role != "assistant":
        return Message(role, text.strip())
    content, *calls = text.split(CALL_TAG)
    parsed = [call for part in calls for call in json.loads(_glaive_call(part.strip()))]
    return Message(role, content.strip(), calls_json(parsed))


def _glaive_call(text: str) -> str:
    """The JSON list of one call; apostrophes inside the quoted arguments stand as they are or after a backslash."""
    if not (quoted := QUOTED_CALL.fullmatch(text)):
        calls = calls_in_text(text)
    else:
        name = load_json(quoted[1])
        try:
            calls = calls_json({"name": name, "arguments": quoted[2]})
        except UnreadableRowError:
            calls = calls_json({"name": name, "arguments": quoted[2].replace("\\'", "'")})
    if calls is None:
        raise UnreadableRowError("broken_tool_call", f"no call after {CALL_TAG} in {text[:60]!r}")
    return calls
