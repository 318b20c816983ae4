"""Rows with Python function definitions and a call in Python -> records; both are parsed, never run."""

from __future__ import annotations

import ast
import math
import re
import textwrap
import warnings
from itertools import pairwise
from typing import Any

from finetune.data.reading.fields import Values, group_of, text_of, value_of
from finetune.data.reading.tool_calls import calls_json, tools_json
from finetune.data.record import Message, Record
from finetune.data.rows import UnreadableRowError, build
from finetune.source_sections import Source

DEFINITION = re.compile(r"^(?:async )?def ", re.MULTILINE)
# What NexusRaven's prompts put between definitions and after them, at the start of a line.
NOT_A_DEFINITION = re.compile(r"^(?:Function|OPTION|User Query|Question)\b", re.MULTILINE)
# A definition without a body, or without even its colon, is completed before it is parsed.
COMPLETIONS = ("", "\n    pass", ":\n    pass")
# The longest code that is parsed, some 50 times a long list of functions: each character may take a kilobyte of tree.
MAX_CODE_CHARACTERS = 200_000
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "None": "null"}
ARRAYS = ("list", "tuple", "set", "frozenset", "sequence", "iterable")
OBJECTS = ("dict", "mapping")


def read_signatures(values: Values, source: Source) -> Record:
    """`functions`: definitions in a text or a list of texts; `query`; `call`: one call or several."""
    functions = value_of(values, source, "functions")
    texts = functions if isinstance(functions, list) else [text_of(values, source, "functions")]
    if not all(isinstance(text, str) for text in texts):
        raise UnreadableRowError("wrong_type", f"{source.column('functions')} must be texts")
    if sum(map(len, texts)) > MAX_CODE_CHARACTERS:
        raise UnreadableRowError("broken_tools", f"more than {MAX_CODE_CHARACTERS} characters")
    definitions = [_definition(block) for text in texts for block in _blocks(text)]
    if not definitions:
        raise UnreadableRowError("broken_tools", f"no `def` at the start of a line in {texts[:1]!r:.80}")
    names = {node.name: [argument.arg for argument in _positional(node)] for node in definitions}
    calls = calls_json([_call(node, names) for node in _call_nodes(text_of(values, source, "call"))])
    messages = (Message("user", text_of(values, source, "query")), Message("assistant", "", calls))
    try:
        tools = tools_json([_tool(node) for node in definitions])
    except RecursionError:
        raise UnreadableRowError("broken_tools", "a type is nested too deeply") from None
    return build(source, messages=messages, tools=tools, group=group_of(values, source))


def _blocks(text: str) -> list[str]:
    text = textwrap.dedent(text)
    starts = [found.start() for found in DEFINITION.finditer(text)]
    blocks = [text[start:end] for start, end in pairwise([*starts, len(text)])]
    return [NOT_A_DEFINITION.split(block)[0] for block in blocks]


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a docstring is the data's business
        return ast.parse(code)


def _definition(block: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    first = ""
    for completion in COMPLETIONS:
        try:
            body = _parse(block.rstrip() + completion).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
            first = first or str(fault)
            continue
        if len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef):
            return body[0]
    raise UnreadableRowError("broken_tools", f"{first or 'more than a definition'} in {block[:60]!r}")


def _positional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args]


def _tool(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """The definition as {name, description, parameters}, parameters as JSON schema; the docstring stays whole."""
    plain, keyword = _positional(node), node.args.kwonlyargs
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(node.args.defaults)), *node.args.defaults]
    properties, required = {}, []
    for argument, default in zip([*plain, *keyword], [*defaults, *node.args.kw_defaults], strict=True):
        schema = _schema(argument.annotation)
        if default is None:
            required.append(argument.arg)
        else:
            value = _known_literal(default)
            schema |= {"description": f"default: {_shown(default)}"} if value is None else {"default": value[0]}
        properties[argument.arg] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": node.name, "description": ast.get_docstring(node) or "", "parameters": parameters}


def _schema(annotation: ast.expr | None) -> dict[str, Any]:
    """JSON schema of a type; {} where there is none, or none that JSON knows."""
    match annotation:
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Constant(value=str(name)):
            return _named(name, None)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _named(name, None)
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            return _named(name, inner)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _any_of([_schema(left), _schema(right)])
    return {}


def _named(name: str, inner: ast.expr | None) -> dict[str, Any]:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [] if inner is None else [inner]
    if name in TYPES:
        return {"type": TYPES[name]}
    if name.lower() in ARRAYS:
        items = _schema(parts[0]) if len(parts) == 1 else {}
        return {"type": "array", "items": items} if items else {"type": "array"}
    if name.lower() in OBJECTS:
        return {"type": "object"}
    if name == "Literal":
        values = [_known_literal(part) for part in parts]
        return {"enum": [value[0] for value in values if value]} if all(values) else {}
    if name in ("Optional", "Union"):
        return _any_of([_schema(part) for part in parts])
    return {}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema where the other is null, as a default says that an argument may be left out."""
    known = [schema for schema in schemas if schema != {"type": "null"}]
    return known[0] if len(known) == 1 else {"anyOf": known} if all(known) and known else {}


def _call_nodes(text: str) -> list[ast.Call]:
    """The calls of a text: one a line or after a semicolon, or in a list; NexusRaven's `Call:` and thoughts go."""
    if len(text) > MAX_CODE_CHARACTERS:
        raise UnreadableRowError("broken_tool_call", f"more than {MAX_CODE_CHARACTERS} characters")
    code = text.strip().removeprefix("Call:").split("\nThought:")[0].split("<bot_end>")[0].strip()
    try:
        statements = _parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
        raise UnreadableRowError("broken_tool_call", f"{fault} in {code[:60]!r}") from None
    values = [statement.value if isinstance(statement, ast.Expr) else statement for statement in statements]
    flat = [item for value in values for item in (value.elts if isinstance(value, ast.List | ast.Tuple) else [value])]
    calls = [node for node in flat if isinstance(node, ast.Call)]
    if not calls or len(calls) < len(flat):
        raise UnreadableRowError("broken_tool_call", f"no call, or more than calls, in {code[:60]!r}")
    return calls


def _call(node: ast.Call, positional: dict[str, list[str]]) -> dict[str, Any]:
    name = _shown(node.func)
    if name not in positional:
        raise UnreadableRowError("broken_tool_call", f"{name} is not defined, only {', '.join(positional)}")
    if len(node.args) > len(positional[name]):
        raise UnreadableRowError("broken_tool_call", f"{len(node.args)} arguments, {name} takes {positional[name]}")
    pairs: list[tuple[str | None, ast.expr]] = [*zip(positional[name], node.args, strict=False)]
    pairs += [(keyword.arg, keyword.value) for keyword in node.keywords]
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        if key is None or key in arguments:
            raise UnreadableRowError("broken_tool_call", f"{name} takes {key or '**'} twice, or by unpacking")
        arguments[key] = _literal(value)
    return {"name": name, "arguments": arguments}


def _literal(node: ast.expr) -> Any:
    """The JSON value of a literal; raises UnreadableRowError, with a reason of its own for a call within a call."""
    if any(isinstance(part, ast.Call) for part in ast.walk(node)):
        raise UnreadableRowError("nested_call", f"the argument {_shown(node)[:60]} is itself a call")
    try:
        return _plain(ast.literal_eval(node))
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise UnreadableRowError("broken_tool_call", f"{_shown(node)[:60]} has no spelling in JSON") from None


def _known_literal(node: ast.expr) -> tuple[Any] | None:
    """The JSON value of a literal in a definition, None where it has none: a tool can be described without it."""
    try:
        return (_literal(node),)
    except UnreadableRowError:
        return None


def _shown(node: ast.expr) -> str:
    """The code of an expression."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return "a very long expression"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise ValueError(type(value).__name__)
