"""A parsed record and the rules of params.yaml -> the record repaired, with its language, and why it is dropped.

The reasons: those of `filters`, then wrong_language and personal_data_<kind>. One record, one reason: the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from finetune.data.cleaning.filters import reason_to_drop
from finetune.data.cleaning.language import settle_language
from finetune.data.cleaning.personal_data import personal_data_in
from finetune.data.cleaning.repair import repair_record
from finetune.data.record import Record
from finetune.data_sections import Clean


@dataclass(frozen=True)
class Examined:
    """`reason` is None for a record to keep; `texts_by_repair`: how many of its texts took each repair."""

    record: Record
    reason: str | None
    texts_by_repair: Counter[str]


def examine(record: Record, rules: Clean) -> Examined:
    """Repair a record, set its language where its source gave none, and name the first rule that it breaks."""
    repaired = repair_record(record, rules)
    record, reason = repaired.record, reason_to_drop(repaired.record, rules)
    if reason is None and rules.languages is not None:
        record, is_wrong = settle_language(record, rules.languages)
        reason = "wrong_language" if is_wrong else None
    if reason is None and rules.drop_personal_data:
        kind = personal_data_in(record.all_text(), rules.drop_personal_data)
        reason = None if kind is None else f"personal_data_{kind}"
    return Examined(record, reason, repaired.texts_by_repair)
