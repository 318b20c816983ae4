"""A record as a source gave it -> its texts as their authors wrote them, and which repairs that took."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from html.entities import html5

from finetune.data.cleaning.mojibake import repair_mojibake
from finetune.data.record import Message, Record, make_record
from finetune.data_sections import Clean

MOJIBAKE, MOJIBAKE_UNCERTAIN, HTML, NORMALIZATION = "mojibake", "mojibake_uncertain", "html_entities", "normalization"
# Fenced blocks and spans of Markdown: there `&lt;` is what the author shows, not what a program left behind.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
ENTITY = re.compile(r"&(#[0-9]+;|#[xX][0-9a-fA-F]+;|[A-Za-z][A-Za-z0-9]*;)")


@dataclass(frozen=True)
class Repaired:
    """A record after repair and how many of its texts took each repair; `mojibake_uncertain` still hold some."""

    record: Record
    texts_by_repair: Counter[str]


def repair_record(record: Record, rules: Clean) -> Repaired:
    """Repair every text of a record. Tool calls and definitions stay: they are code, and JSON has its own escapes."""
    counts: Counter[str] = Counter()
    if record.text is not None:
        text = _repair_text(record.text, rules, counts)
        return Repaired(record if text == record.text else _rebuilt(record, (), text), counts)
    contents = [message.content for message in record.messages]
    fixed = [_repair_text(content, rules, counts) for content in contents]
    if fixed == contents:
        return Repaired(record, counts)
    messages = tuple(replace(message, content=content) for message, content in zip(record.messages, fixed, strict=True))
    return Repaired(_rebuilt(record, messages, None), counts)


def _repair_text(text: str, rules: Clean, counts: Counter[str]) -> str:
    # Plain ASCII is most of English: nothing below can change it.
    if text.isascii() and "&" not in text:
        return text
    original, uncertain = text, False
    if rules.repair_mojibake:
        text, uncertain = repair_mojibake(original)
        counts[MOJIBAKE] += text != original
    if rules.unescape_html and "&" in text:
        parts = CODE.split(text)
        # Every second part is code.
        parts[::2] = [ENTITY.sub(_unescape, part) for part in parts[::2]]
        fixed = "".join(parts)
        counts[HTML] += fixed != text
        if rules.repair_mojibake and fixed != text:
            # `&Atilde;&copy;` hides its damage behind the entities.
            text, uncertain = repair_mojibake(fixed)
            counts[MOJIBAKE] += text != fixed
        else:
            text = fixed
    counts[MOJIBAKE_UNCERTAIN] += uncertain
    if unicodedata.is_normalized(rules.normalization, text):
        return text
    counts[NORMALIZATION] += 1
    return unicodedata.normalize(rules.normalization, text)


def _unescape(entity: re.Match[str]) -> str:
    """Known entities only: `html.unescape` alone takes `&sect` out of `?a=1&section=2`."""
    known = entity[1].startswith("#") or entity[1] in html5
    return html.unescape(entity[0]) if known else entity[0]


def _rebuilt(record: Record, messages: tuple[Message, ...], text: str | None) -> Record:
    group = record.group.removeprefix(f"{record.source}/")
    return make_record(
        source=record.source,
        messages=messages,
        text=text,
        tools=record.tools,
        # A group that was only the old id follows the content to its new id.
        group=None if group == record.id else group,
        language=record.language,
    )
