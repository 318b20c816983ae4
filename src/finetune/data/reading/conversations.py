"""Rows that hold turns -> records: lists of messages, flat lists, dialogues in one text, question and answer."""

from __future__ import annotations

import re

from finetune.data.reading.fields import (
    Values,
    group_of,
    list_of,
    optional_text,
    system_turn,
    text_of,
    turn_text,
    value_of,
)
from finetune.data.reading.tool_calls import calls_in_text, calls_json, tools_json
from finetune.data.record import Message, Record, Role
from finetune.data.rows import UnreadableRowError, UnwantedRowError, build, known_role
from finetune.source_sections import Source

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
# A speaker's name opens a turn after a blank line; a text that only mentions "Human:" does not stand there.
SPEAKER = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|\Z)")
SPEAKER_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def read_messages(values: Values, source: Source) -> Record:
    """`messages: [{role, content, tool_calls}]`; a text in `system` becomes the first turn."""
    role_key, content_key, calls_key = source.column("role"), source.column("content"), source.column("tool_calls")
    messages = system_turn(values, source)
    for number, turn in enumerate(list_of(values, source, "messages", dict, "turns"), 1):
        role = known_role(turn_text(turn, role_key, number))
        calls = calls_json(turn.get(calls_key))
        content = "" if calls and turn.get(content_key) is None else turn_text(turn, content_key, number)
        messages.append(Message(role, content, calls))
    tools = tools_json(value_of(values, source, "tools"))
    return build(source, messages=tuple(messages), tools=tools, group=group_of(values, source))


def read_sharegpt(values: Values, source: Source) -> Record:
    """`conversations: [{from, value}]`; what a `function_call` says is one call or a list of calls."""
    from_key, value_key = source.column("from"), source.column("value")
    messages = system_turn(values, source)
    for number, turn in enumerate(list_of(values, source, "conversations", dict, "turns"), 1):
        speaker, text = turn_text(turn, from_key, number), turn_text(turn, value_key, number)
        if speaker not in SHAREGPT_ROLES:
            raise UnreadableRowError("unknown_role", f"from {speaker!r}, known are {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            messages.append(Message("assistant", "", calls_in_text(text)))
        else:
            messages.append(Message(SHAREGPT_ROLES[speaker], text))
    tools = tools_json(value_of(values, source, "tools"))
    return build(source, messages=tuple(messages), tools=tools, group=group_of(values, source))


def read_alpaca(values: Values, source: Source) -> Record:
    """`instruction`, then a blank line and `input` where there is one; `output` answers."""
    instruction, context = text_of(values, source, "instruction"), optional_text(values, source, "input")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return _answered(values, source, question, text_of(values, source, "output"))


def read_prompt_completion(values: Values, source: Source) -> Record:
    """`prompt` is the question, `completion` the answer."""
    return _answered(values, source, text_of(values, source, "prompt"), text_of(values, source, "completion"))


def read_transcript(values: Values, source: Source) -> Record:
    """`transcript`: a dialogue in one text, whose turns begin with a blank line and `Human:` or `Assistant:`.

    Blanks around a turn are dropped. Raises UnwantedRowError on an empty turn, and on a dialogue that only one side
    speaks in; UnreadableRowError where text comes before the first turn.
    """
    before, *parts = SPEAKER.split(text_of(values, source, "transcript"))
    if before.strip() or not parts:
        raise UnreadableRowError("text_before_marker", f"no turn is open at {before.strip()[:60]!r}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = tuple(Message(SPEAKER_ROLES[speaker], text.strip()) for speaker, text in turns)
    if not all(message.content for message in messages):
        raise UnwantedRowError("empty_turn")
    if len({message.role for message in messages}) == 1:
        raise UnwantedRowError("one_sided_dialogue")
    return build(source, messages=messages, group=group_of(values, source))


def read_turns(values: Values, source: Source) -> Record:
    """`turns`: a flat list of texts, the user's and the assistant's in turn."""
    messages = system_turn(values, source)
    for index, text in enumerate(list_of(values, source, "turns", str, "texts")):
        messages.append(Message("assistant" if index % 2 else "user", text))
    return build(source, messages=tuple(messages), group=group_of(values, source))


def read_text(values: Values, source: Source) -> Record:
    """`text`: a plain text, or the answer to the source's `prompt`."""
    text, group = text_of(values, source, "text"), group_of(values, source)
    if source.prompt is not None:
        return build(source, messages=(Message("user", source.prompt), Message("assistant", text)), group=group)
    if not text.strip():
        raise UnreadableRowError("empty_text", f"{source.column('text')} is {text[:20]!r}")
    return build(source, text=text, group=group)


def _answered(values: Values, source: Source, question: str, answer: str) -> Record:
    messages = (*system_turn(values, source), Message("user", question), Message("assistant", answer))
    return build(source, messages=messages, group=group_of(values, source))
