"""A record and the rules of params.yaml -> None to keep it, or the name of the reason to drop it."""

from __future__ import annotations

import json
import re

from finetune.data.record import Message, Record
from finetune.data_sections import Clean

LINK = re.compile(r"https?://\S+|\bwww\.\S+|\bpic\.twitter\.com/\S+", re.IGNORECASE)
RETWEET = "RT @"
# Which roles may follow which; None is the start. A tool answers an assistant's call, never anything else.
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with calls": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


def reason_to_drop(record: Record, rules: Clean) -> str | None:
    """The first rule that the record breaks, in a fixed order; each record is counted under one reason."""
    shape = _shape_fault(record.messages) if record.text is None else None
    return shape or _content_fault(record, rules)


def content_key(record: Record) -> str:
    """What makes two records the same: roles, texts, calls and tools, whatever their case and white space."""
    turns = [[message.role, _normal(message.content), _normal(message.tool_calls)] for message in record.messages]
    return json.dumps([turns, _normal(record.tools), _normal(record.text)])


def _normal(text: str | None) -> str | None:
    return None if text is None else " ".join(text.casefold().split())


def _shape_fault(messages: tuple[Message, ...]) -> str | None:
    if not any(message.role == "assistant" for message in messages):
        return "no_assistant"
    before: str | None = None
    for message in messages:
        if message.role not in FOLLOWERS[before]:
            return "roles_do_not_alternate"
        before = "assistant with calls" if message.role == "assistant" and message.tool_calls else message.role
    return None


def _content_fault(record: Record, rules: Clean) -> str | None:
    answers = _answers(record)
    if len(record.all_text()) > rules.max_record_characters:
        return "record_too_long"
    if any(len(answer.strip()) < rules.min_answer_characters for answer in answers):
        return "answer_too_short"
    if rules.drop_retweets and any(answer.lstrip().startswith(RETWEET) for answer in answers):
        return "retweet"
    if rules.drop_link_only and any(not LINK.sub("", answer).strip() for answer in answers):
        return "link_only"
    if any(re.search(pattern, answer) for pattern in rules.automatic_reply_patterns for answer in answers):
        return "automatic_reply"
    return None


def _answers(record: Record) -> list[str]:
    """What the model would learn to say: a plain text whole, or the assistant's turns that hold text."""
    if record.text is not None:
        return [record.text]
    return [message.content for message in record.messages if message.role == "assistant" and not message.tool_calls]
