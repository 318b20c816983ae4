"""a model's answer as text -> the function calls in it, or the reason why they are not valid.

The forms are those that chat templates write and that training data has: `<tool_call>{JSON}</tool_call>` (ChatML of
Hermes and Qwen, and this project's own), `<|tool_call|>[JSON]<|/tool_call|>` (Phi), `[TOOL_CALLS]` with a JSON list or
with `name[ARGS]{JSON}` (Mistral), `<functioncall> {JSON}` (Glaive), `<|python_tag|>` and bare JSON with `parameters`
(Llama 3), and a Python call, bare or in a list (the Berkeley leaderboard).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

CLOSED_MARKERS = (("<tool_call>", "</tool_call>"), ("<|tool_call|>", "<|/tool_call|>"))
OPEN_MARKERS = ("[TOOL_CALLS]", "<functioncall>", "<|python_tag|>")
# Mistral since version 11 of its tokenizer: name[CALL_ID]x[ARGS]{...}, of which the parts in brackets may be missing.
NAMED_ARGUMENTS = re.compile(r"([A-Za-z_][\w.-]*)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})", re.DOTALL)
# What an unmarked call begins with (Llama 3's JSON, Python): an answer with it and without a call was cut off, or is
# wrong.
ATTEMPT = re.compile(r"""\{\s*"(?:type|name|function)"\s*:|\A\[?\w+(?:\.\w+)*\(\w+\s*=(?!=)""")
NO_VALUE = object()


@dataclass(frozen=True)
class Call:
    """A function's name and the arguments, as JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """The calls of an answer; `fault`: why what looks like a call is none. An answer in words has neither."""

    calls: tuple[Call, ...]
    fault: str | None


class _NotACallError(Exception):
    """The reason why a call cannot be read."""


def parse_calls(text: str) -> Parsed:
    """The calls of an answer. Text around a marked call is no fault; one unreadable call makes the answer invalid."""
    text = text.strip()
    try:
        bodies = _marked(text)
        if bodies is None:
            calls = tuple(_bare_json(text) or _python_calls(text) or ())
            attempt = None if calls else ATTEMPT.search(text)
            return Parsed(calls, f"the start of a call, not one: {attempt[0]!r}" if attempt else None)
        return Parsed(tuple(call for read, body in bodies for call in _marked_calls(read(body), body)), None)
    except _NotACallError as reason:
        return Parsed((), str(reason))


Reader = Callable[[str], Any]


def _marked(text: str) -> list[tuple[Reader, str]] | None:
    """What stands behind each marker of one kind, with its reader; None where the answer has no marker."""
    for opening, closing in CLOSED_MARKERS:
        if opening in text:
            parts = [part.partition(closing) for part in text.split(opening)[1:]]
            if not all(closed for _, closed, _ in parts):
                raise _NotACallError(f"{opening} is not closed by {closing}")
            return [(_json_value, body.strip()) for body, _, _ in parts]
    for marker in OPEN_MARKERS:
        if marker in text:
            # Glaive writes the arguments as a JSON text in single quotes, which is a Python literal.
            read = _json_or_literal if marker == "<functioncall>" else _json_value
            return [(read, body.strip()) for body in text.split(marker)[1:]]
    return None


def _marked_calls(value: Any, body: str) -> list[Call]:
    """The calls of one body; it must hold one."""
    if value is NO_VALUE:
        if named := NAMED_ARGUMENTS.fullmatch(body):
            return [_call({"name": named[1], "arguments": _json_value(named[2])})]
        calls = _python_calls(body)
        if not calls:
            raise _NotACallError(f"neither JSON nor a call: {body[:60]!r}")
        return calls
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise _NotACallError("an empty list of calls")
    return [_call(entry) for entry in entries]


def _bare_json(text: str) -> list[Call] | None:
    """The calls of an answer that is JSON and nothing else; None where it is not JSON, or not about a function."""
    value = _json_value(text) if text[:1] in ("{", "[") else NO_VALUE
    entries = value if isinstance(value, list) else [value]
    if value is NO_VALUE or not any(
        isinstance(entry, dict) and entry.keys() & {"name", "function"} for entry in entries
    ):
        return None
    return [_call(entry) for entry in entries]


def _call(entry: Any) -> Call:
    """{name, arguments} or {name, parameters}, or the same as `function` of an object; arguments as JSON text too."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _NotACallError(f"no function name in {str(entry)[:60]!r}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json_value(arguments)
    if not isinstance(arguments, dict):
        raise _NotACallError(f"the arguments of {function['name']} are no object")
    try:
        return Call(function["name"], _checked(arguments))
    except ValueError:
        raise _NotACallError(f"the arguments of {function['name']} are beyond JSON or UTF-8") from None


def _json_value(text: str) -> Any:
    """The value of a JSON text, NO_VALUE where it is none; NaN and Infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return NO_VALUE


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json_or_literal(text: str) -> Any:
    value = _json_value(text)
    if value is not NO_VALUE:
        return value
    expression = _expression(text)
    return NO_VALUE if expression is None else _literal(expression, text)


def _expression(text: str) -> ast.expr | None:
    """The Python expression that a text is; None where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_calls(text: str) -> list[Call]:
    """The calls of `f(x=1)` or `[f(x=1), g()]`; nothing where the text is no such expression."""
    expression = _expression(text)
    nodes = expression.elts if isinstance(expression, ast.List) else [expression]
    if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
        return []
    return [_python_call(node) for node in nodes if isinstance(node, ast.Call)]


def _python_call(node: ast.Call) -> Call:
    try:
        name = ast.unparse(node.func)
    except RecursionError:
        raise _NotACallError("a name nested too deeply") from None
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise _NotACallError(f"{name[:60]!r} is no function's name")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise _NotACallError(f"{name} has an argument without a name")
    return Call(name, {str(keyword.arg): _literal(keyword.value, name) for keyword in node.keywords})


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a Python literal, tuples as lists, as JSON has no tuples."""
    try:
        return _checked(_without_tuples(ast.literal_eval(node)))
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise _NotACallError(f"{where[:60]!r} has a value that is no literal") from None


def _checked(value: Any) -> Any:
    """The value, which JSON and UTF-8 must hold: no set, no number beyond float64, no half of a surrogate pair."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _without_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_tuples(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_tuples(entry) for key, entry in value.items()}
    return value
