"""Function definitions and calls as the sources hold them -> the one form in which training writes and Ollama serves.

Ollama reads a client's definitions into Go structs and hands those to the TEMPLATE, so their JSON has the structs' key
order and nothing that the structs do not know; arguments of calls and the properties of a function are Go maps, whose
keys come out sorted, and every number there is a float64. Read in ollama/ollama 0.33 (api/types.go: Tool, ToolFunction,
ToolProperty; template/template.go: templateTool, templateArgs); before 0.14 the keys stood otherwise.

Not mirrored: numbers nearer to 0 than 0.0001, which Go writes as 0.00001 and Python as 1e-05.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

TOOL = ("type", "items", "function")
FUNCTION = ("name", "description", "parameters")
PARAMETERS = ("type", "$defs", "items", "required", "properties")
PROPERTY = ("anyOf", "type", "items", "description", "enum", "properties")
# What Go writes without `omitempty`, with its zero value where the source has none.
TOOL_ZEROS: dict[str, Any] = {"type": "", "function": {}}
FUNCTION_ZEROS: dict[str, Any] = {"name": "", "description": "", "parameters": {}}
PARAMETERS_ZEROS: dict[str, Any] = {"type": "", "properties": None}
# From here on Go writes an exponent; Python writes one for a float from 1e16 on, and for an int never.
GO_EXPONENT = 1e21
# What Go's json.Marshal escapes and Python's json.dumps does not.
GO_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def canonical_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The definitions {"type", "function"} in Ollama's key order; a bare {name, parameters} is wrapped as one.

    Keys that Ollama does not know (`default`, `additionalProperties`) are kept, behind the others in the source's
    order: Ollama drops them before it renders a prompt. `dropped_keys` names them.
    """
    return [_tool(tool) for tool in tools]


def canonical_calls(calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls {name, arguments} in the form of transformers' chat messages, keys of the arguments sorted."""
    functions = (call.get("function", call) for call in calls)
    return [
        {"type": "function", "function": {"name": function["name"], "arguments": _free(function["arguments"])}}
        for function in functions
    ]


def canonical_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a client, with `tool_calls` in the canonical form."""
    return [
        {**message, "tool_calls": canonical_calls(message["tool_calls"])} if message.get("tool_calls") else {**message}
        for message in messages
    ]


def dropped_keys(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the keys that Ollama would drop from the definitions, sorted: a served model never sees them."""
    found: set[str] = set()
    for tool in canonical_tools(tools):
        function = _mapping(tool["function"])
        parameters = _mapping(function.get("parameters"))
        found |= {*tool} - {*TOOL} | {*function} - {*FUNCTION} | {*parameters} - {*PARAMETERS}
        found |= _dropped_in(_mapping(parameters.get("properties")).values())
    return sorted(found)


def ollama_json(value: Any) -> str:
    """JSON as Ollama's `json` function writes a canonical value: compact, with <, >, & and two separators escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in GO_ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _tool(tool: Mapping[str, Any]) -> Any:
    wrapped = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
    return _struct(wrapped, TOOL, TOOL_ZEROS, items=_free, function=_function)


def _function(given: Any) -> Any:
    return _struct(given, FUNCTION, FUNCTION_ZEROS, parameters=_parameters)


def _parameters(given: Any) -> Any:
    forms = {"$defs": _free, "items": _free, "properties": _sorted_properties}
    return _struct(given, PARAMETERS, PARAMETERS_ZEROS, **forms)


def _sorted_properties(given: Any) -> Any:
    return {name: _property(given[name]) for name in sorted(given)} if isinstance(given, dict) else given


def _property(given: Any) -> Any:
    return _struct(given, PROPERTY, {}, anyOf=_properties, type=_kind, items=_free, enum=_free, properties=_properties)


def _properties(given: Any) -> Any:
    """Properties inside a property keep the source's order, which Ollama keeps there."""
    if isinstance(given, list):
        return [_property(value) for value in given]
    return {name: _property(value) for name, value in given.items()} if isinstance(given, dict) else given


def _kind(given: Any) -> Any:
    return given[0] if isinstance(given, list) and len(given) == 1 else given


def _struct(given: Any, known: tuple[str, ...], zeros: Mapping[str, Any], **forms: Callable[[Any], Any]) -> Any:
    """The known keys in their order, without those that are empty unless they have a zero value; then the others.

    A value that is no object is left as it is: Ollama answers a request that holds one with an error.
    """
    if not isinstance(given, dict):
        return given
    filled = {**zeros, **{key: value for key, value in given.items() if value not in (None, "", [])}}
    ordered = {key: forms[key](filled[key]) if key in forms else filled[key] for key in known if key in filled}
    return {**ordered, **{key: value for key, value in given.items() if key not in known}}


def _free(value: Any) -> Any:
    """A value without a struct of its own: keys sorted at every depth, numbers as Go writes a float64."""
    if isinstance(value, dict):
        return {key: _free(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_free(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    return value


def _number(value: float) -> float:
    """An integral number as an int of the digits that a float64 keeps; any other as it is."""
    try:
        rounded = float(value)
    except OverflowError:
        return value
    if rounded.is_integer() and abs(rounded) < GO_EXPONENT:
        return int(Decimal(repr(rounded)))
    return rounded


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _dropped_in(properties: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for given in map(_mapping, properties):
        choices, inner = given.get("anyOf"), _mapping(given.get("properties"))
        found |= {*given} - {*PROPERTY} | _dropped_in(inner.values())
        found |= _dropped_in(choices if isinstance(choices, list) else [])
    return found
