"""A record and the rules of params.yaml -> None to keep it, or the name of the reason to drop it.

The reasons, in the order that they are looked for: empty, no_assistant, roles_do_not_alternate, empty_question,
record_too_long, answer_too_short, retweet, link_only, automatic_reply, record_too_short, repeated_characters.
"""

from __future__ import annotations

import re
import unicodedata

from finetune.data.cleaning.repetition import repeats
from finetune.data.record import Message, Record
from finetune.data_sections import Clean

LINK = re.compile(r"https?://\S+|\bwww\.\S+|\bpic\.twitter\.com/\S+", re.IGNORECASE)
RETWEET = "RT @"
WORD = re.compile(r"[^\W_]")
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
    if _is_empty(record):
        return "empty"
    shape = _shape_fault(record.messages) if record.text is None else None
    return shape or _content_fault(record, rules)


def _is_empty(record: Record) -> bool:
    if record.text is not None:
        return not record.text or record.text.isspace()
    return all(
        message.tool_calls is None and (not message.content or message.content.isspace()) for message in record.messages
    )


def _shape_fault(messages: tuple[Message, ...]) -> str | None:
    if not any(message.role == "assistant" for message in messages):
        return "no_assistant"
    before: str | None = None
    for message in messages:
        if message.role not in FOLLOWERS[before]:
            return "roles_do_not_alternate"
        before = "assistant with calls" if message.role == "assistant" and message.tool_calls else message.role
    if any(message.role == "user" and not message.content.strip() for message in messages):
        return "empty_question"
    return None


def _content_fault(record: Record, rules: Clean) -> str | None:
    answers = _answers(record)
    length = _characters(record)
    if length > rules.max_record_characters:
        return "record_too_long"
    if any(len(answer.strip()) < rules.min_answer_characters or _says_nothing(answer) for answer in answers):
        return "answer_too_short"
    if rules.drop_retweets and any(answer.lstrip().startswith(RETWEET) for answer in answers):
        return "retweet"
    if rules.drop_link_only and any(_is_link_only(answer) for answer in answers):
        return "link_only"
    if any(re.search(pattern, answer) for pattern in rules.automatic_reply_patterns for answer in answers):
        return "automatic_reply"
    if length < rules.min_record_characters:
        return "record_too_short"
    if any(repeats(answer, rules.max_repeated_characters) for answer in answers):
        return "repeated_characters"
    return None


def _answers(record: Record) -> list[str]:
    """What the model would learn to say: a plain text whole, or the assistant's turns that hold text."""
    if record.text is not None:
        return [record.text]
    return [message.content for message in record.messages if message.role == "assistant" and not message.tool_calls]


def _characters(record: Record) -> int:
    """The length of `record.all_text()`, without making it."""
    if record.text is not None:
        return len(record.text)
    parts = [len(record.tools)] if record.tools else []
    for message in record.messages:
        parts.append(len(message.content))
        if message.tool_calls:
            parts.append(len(message.tool_calls))
    return sum(parts) + len(parts) - 1


def _says_nothing(answer: str) -> bool:
    """Only punctuation and white space. An emoji or a formula says something."""
    if WORD.search(answer):
        return False
    return all(character.isspace() or unicodedata.category(character)[0] in "PC" for character in answer)


def _is_link_only(answer: str) -> bool:
    # Most answers begin with no link: that is told without reading them whole.
    return LINK.match(answer.lstrip()) is not None and not LINK.sub("", answer).strip()
