"""A text as a source gave it -> the text as its author wrote it, and which repairs that took.

Mojibake is undone line by line, as files mix good and bad lines, and only when the repair is certain: ftfy finds a
plan of plain encode and decode steps, and the same steps backwards give the damaged line again, byte for byte.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from html.entities import html5

import ftfy

from finetune.data.record import Message, Record, make_record
from finetune.data_sections import Clean

MOJIBAKE, MOJIBAKE_UNCERTAIN, HTML, NORMALIZATION = "mojibake", "mojibake_uncertain", "html_entities", "normalization"
ENTITY = re.compile(r"&(#[0-9]+;|#[xX][0-9a-fA-F]+;|[A-Za-z][A-Za-z0-9]*;)")


@dataclass(frozen=True)
class Repaired:
    """A record after repair and how many of its texts took each repair; `mojibake_uncertain` were left as they are."""

    record: Record
    texts_by_repair: Counter[str]


def repair_record(record: Record, rules: Clean) -> Repaired:
    """Repair every text of a record. Tool calls and definitions stay: they are code, and JSON has its own escapes."""
    counts: Counter[str] = Counter()
    messages = tuple(
        replace(message, content=_repair_text(message.content, rules, counts)) for message in record.messages
    )
    text = None if record.text is None else _repair_text(record.text, rules, counts)
    if (messages, text) == (record.messages, record.text):
        return Repaired(record, counts)
    return Repaired(_rebuilt(record, messages, text), counts)


def repair_mojibake(text: str) -> tuple[str, bool]:
    """The text with every certain line repaired, and whether a line looks damaged but cannot be repaired surely."""
    lines, uncertain = [], False
    for line in text.split("\n"):
        fixed, plan = ftfy.fix_encoding_and_explain(line)
        certain = fixed != line and _undo(fixed, plan) == line
        uncertain = uncertain or (fixed != line and not certain)
        lines.append(fixed if certain else line)
    return "\n".join(lines), uncertain


def _undo(fixed: str, plan: list[tuple[str, str]]) -> str | None:
    """Apply the plan backwards; None where a step cannot be undone, so that nothing rests on a guess."""
    value: str | bytes = fixed
    try:
        for action, codec in reversed(plan):
            if action == "decode" and isinstance(value, str):
                value = value.encode(codec)
            elif action == "encode" and isinstance(value, bytes):
                value = value.decode(codec)
            else:
                return None
    except UnicodeError:
        return None
    return value if isinstance(value, str) else None


def _repair_text(text: str, rules: Clean, counts: Counter[str]) -> str:
    if rules.repair_mojibake:
        fixed, uncertain = repair_mojibake(text)
        counts[MOJIBAKE] += fixed != text
        counts[MOJIBAKE_UNCERTAIN] += uncertain
        text = fixed
    if rules.unescape_html:
        fixed = ENTITY.sub(_unescape, text)
        counts[HTML] += fixed != text
        text = fixed
    fixed = unicodedata.normalize(rules.normalization, text)
    counts[NORMALIZATION] += fixed != text
    return fixed


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
