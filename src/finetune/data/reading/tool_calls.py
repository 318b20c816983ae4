"""Tool calls and tool definitions as the sources spell them -> the JSON strings that a Record holds."""

from __future__ import annotations

import json
from typing import Any

from finetune.data.rows import UnreadableRowError, load_json


def calls_json(value: Any) -> str | None:
    """A JSON list of {arguments, name} with sorted keys, or None where there is no call.

    Accepts one call or a list; each `{"type": "function", "function": {name, arguments}}` (OpenAI) or
    `{name, arguments}`; arguments as an object or as a JSON string of one. Raises UnreadableRowError.
    """
    if value is None or value == []:
        return None
    calls = value if isinstance(value, list) else [value]
    return json.dumps([_call(call) for call in calls], ensure_ascii=False, sort_keys=True)


def calls_in_text(text: str) -> str | None:
    """`calls_json` of a JSON text; raises UnreadableRowError, also where the text is not JSON."""
    try:
        return calls_json(load_json(text))
    except UnreadableRowError as fault:
        raise UnreadableRowError("broken_tool_call", f"{fault.detail} in {text[:80]!r}") from None


def tools_json(value: Any) -> str | None:
    """The definitions as one JSON string, keys in the source's order; None where there is none.

    Accepts a list, or a JSON string of one. Raises UnreadableRowError.
    """
    if isinstance(value, str):
        try:
            value = load_json(value) if value.strip() else None
        except UnreadableRowError as fault:
            raise UnreadableRowError("broken_tools", fault.detail) from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnreadableRowError("broken_tools", f"tools must be a list of objects, got {str(value)[:80]!r}")
    return json.dumps(value, ensure_ascii=False)


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnreadableRowError("broken_tool_call", f"no function name in {str(call)[:80]!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except UnreadableRowError as fault:
            raise UnreadableRowError("broken_tool_call", f"arguments of {function['name']}: {fault.detail}") from None
    if not isinstance(arguments, dict):
        raise UnreadableRowError("broken_tool_call", f"arguments of {function['name']} are not an object")
    return {"name": function["name"], "arguments": arguments}
