"""The columns of a raw row under the names of its format, with their types checked.

A field that `columns` names must be there; another one may be absent, and then reads as null.
"""

from __future__ import annotations

import datetime
from typing import Any

from finetune.data.record import Message
from finetune.data.rows import UnreadableRowError, load_json
from finetune.source_sections import Source

Values = dict[str, Any]


def value_of(values: Values, source: Source, field: str) -> Any:
    """The value of a field, or None where it is absent; raises UnreadableRowError when `columns` names it."""
    column = source.columns.get(field)
    if column is None:
        return values.get(field)
    if column not in values:
        raise UnreadableRowError("missing_field", f"no {column}; the row has {', '.join(sorted(values)) or 'nothing'}")
    return values[column]


def text_of(values: Values, source: Source, field: str) -> str:
    """A text that must be there; raises UnreadableRowError."""
    value = value_of(values, source, field)
    if isinstance(value, str):
        return value
    raise _refused(value, source.column(field), "a text", values)


def optional_text(values: Values, source: Source, field: str) -> str:
    """A text, empty where it is absent or null; raises UnreadableRowError on another type."""
    value = value_of(values, source, field)
    if value is None or isinstance(value, str):
        return value or ""
    raise _refused(value, source.column(field), "a text", values)


def list_of(values: Values, source: Source, field: str, item: type, items: str) -> list[Any]:
    """A list of one type with at least one item, or a text that holds it as JSON; raises UnreadableRowError.

    Turns may stand in lists of their own, as evaluation sets have them, one list for each time that the user is asked.
    """
    value = value_of(values, source, field)
    if isinstance(value, str):
        value = load_json(value)
    if item is dict and isinstance(value, list) and all(isinstance(entry, list) for entry in value):
        value = [turn for part in value for turn in part]
    if not isinstance(value, list) or not all(isinstance(entry, item) for entry in value):
        raise _refused(value, source.column(field), f"a list of {items}", values)
    if not value:
        raise UnreadableRowError("empty_conversation", f"{source.column(field)} is an empty list")
    return value


def turn_text(turn: Values, key: str, number: int) -> str:
    """A text inside a turn, the turn counted from 1; raises UnreadableRowError."""
    value = turn.get(key)
    if isinstance(value, str):
        return value
    raise _refused(value, f"{key} of turn {number}", "a text", turn)


def system_turn(values: Values, source: Source) -> list[Message]:
    """The system turn that a column of its own holds, or none where that is absent or empty."""
    system = optional_text(values, source, "system")
    return [Message("system", system)] if system.strip() else []


def group_of(values: Values, source: Source) -> str | None:
    """The name of the group, cut to `group_characters`; None where there is none; raises UnreadableRowError."""
    group = value_of(values, source, "group")
    if group is None or group == "":
        return None
    if isinstance(group, datetime.date):
        group = group.isoformat()
    if isinstance(group, bool) or not isinstance(group, str | int):
        raise UnreadableRowError("broken_group", f"group must be a text, number or date, got {type(group).__name__}")
    return str(group)[: source.group_characters]


def _refused(value: Any, name: str, wanted: str, values: Values) -> UnreadableRowError:
    if value is None:
        found = ", ".join(sorted(values)) or "nothing"
        return UnreadableRowError("missing_field", f"{name} must be {wanted} and is absent or null; there is {found}")
    return UnreadableRowError("wrong_type", f"{name} must be {wanted}, got {type(value).__name__}: {str(value)[:60]!r}")
