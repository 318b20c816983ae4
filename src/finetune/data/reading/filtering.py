"""The filters of a source: which rows of it are taken, by the value of a column."""

from __future__ import annotations

from typing import Any

from finetune.source_sections import Filter


def unwanted(values: dict[str, Any], filters: list[Filter]) -> str | None:
    """The reason of the first filter that the row fails, or None; an absent column reads as null."""
    for rule in filters:
        value = values.get(rule.column)
        if not any(_equal(value, wanted) for wanted in rule.any_of):
            return f"filtered_{rule.column}"
    return None


def _equal(value: Any, wanted: str | int | bool | None) -> bool:
    """Equal in type too, as 1 is not true; a text, as a table has no other cells, also equals what it spells."""
    if isinstance(value, str) and not isinstance(wanted, str):
        return value.lower() == ("" if wanted is None else str(wanted).lower())
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted)
