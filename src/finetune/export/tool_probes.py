"""A chat template -> how it writes function definitions and calls, where Ollama's JSON and a Go TEMPLATE can follow.

Definitions and calls of recognisable texts are rendered; where Ollama's JSON of them is found, that is a slot, and what
stands around and between the slots is fixed text. JSON in any other form is not found, and is refused by its construct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from finetune.chat_template import ChatTemplate
from finetune.errors import ExportError
from finetune.export.linear_template import CallForm, DefinitionForm, Item, call_slots, definition_slots
from finetune.export.probes import pieces, probe, refusal, rendered, without_end, without_start
from finetune.tool_forms import canonical_calls, canonical_tools

# Quotes, a line break and what Go escapes: a template that writes such a text in another way than Ollama shows here.
UNUSUAL = 'zq "é" <&>\n\\ 日本 qz'
COMPACT = (
    "write JSON as Ollama does: {{ tool | tojson(separators=(',', ':')) | replace('<', '\\\\u003c') | "
    "replace('>', '\\\\u003e') | replace('&', '\\\\u0026') }}, as recipes/smoke/chat_template.jinja, and `dvc repro`"
)
# What a template may do instead, the likeliest first, and the JSON that it then writes of a value.
FOREIGN_FORMS: dict[str, Callable[[Any], str]] = {
    "with <, > and & as they are, where Ollama writes \\u003c, \\u003e and \\u0026": partial(
        json.dumps, ensure_ascii=False, separators=(",", ":")
    ),
    "by tojson with spaces after commas and colons, where Ollama writes none": partial(json.dumps, ensure_ascii=False),
    "by tojson(indent=4)": partial(json.dumps, ensure_ascii=False, indent=4),
    "by tojson(indent=2)": partial(json.dumps, ensure_ascii=False, indent=2),
    "by tojson(ensure_ascii=True)": json.dumps,
    "as Python prints a dictionary": str,
}
# Private-use characters, one for each slot of a probe: no template of words and markers holds them.
FIRST_MARK = 0xE000


def probe_tool(label: str) -> dict[str, Any]:
    """A definition in the canonical form whose texts all hold `label`."""
    inner = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}}
    parameters = {
        "type": "object",
        "required": [f"zqkey{label}qz"],
        "properties": {f"zqkey{label}qz": {"type": "string", "description": f"{UNUSUAL} {label}"}, "zqotherqz": inner},
    }
    function = {"name": f"zqname{label}qz", "description": f"{UNUSUAL}{label}", "parameters": parameters}
    return canonical_tools([{"type": "function", "function": function}])[0]


def probe_call(label: str) -> dict[str, Any]:
    """A call in the canonical form whose texts all hold `label`."""
    arguments = {f"zqkey{label}qz": f"{UNUSUAL} {label}", "zqotherqz": {"b": [1, 2.5, True, None], "a": {}}}
    return canonical_calls([{"name": f"zqname{label}qz", "arguments": arguments}])[0]


def derive_definitions(chat: ChatTemplate, start: str, user_prefix: str, *, system: bool) -> DefinitionForm:
    """How definitions are written; `start` is what every chat begins with. Raises ExportError naming what is not so."""
    one, two = [probe_tool("A")], [probe_tool("A"), probe_tool("B")]
    _check_place(chat, one)
    head = without_start(pieces(chat, "user", tools=one)[0], start, "the text before the function definitions")
    item, around = _item(lambda tools: pieces(chat, "user", tools=tools)[0], two, definition_slots)
    if item.write([definition_slots(tool) for tool in one]).join(around) != start + head:
        raise refusal("the text around the function definitions depends on their number", probe("user"))
    what = "the function definitions stand inside the first user message: the text between them and its content"
    opening = (around[0].removeprefix(start), without_end(around[1], user_prefix, what))
    if not system:
        return DefinitionForm(item, opening, (), ())
    listed = item.write([definition_slots(tool) for tool in one])
    before, after, _ = pieces(chat, "system", "user", tools=one)
    before = without_start(before, start, "the text before the function definitions and a system message")
    after = without_end(after, user_prefix, "with functions, the text between system and user message")
    if (before + after).count(listed) != 1:
        raise refusal("the function definitions are written otherwise beside a system message", probe("system", "user"))
    return DefinitionForm(item, opening, tuple(before.split(listed)), tuple(after.split(listed)))


def derive_calls(chat: ChatTemplate, user_suffix: str) -> CallForm:
    """How an answer with calls is written; raises ExportError naming what Go cannot express."""

    def answer(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
        messages = [*probe("user"), {"role": "assistant", "content": content, "tool_calls": list(calls)}]
        text = rendered(chat, messages).partition(messages[0]["content"])[2]
        return without_start(text, user_suffix, "the text after a user message")

    one, two = [probe_call("A")], [probe_call("A"), probe_call("B")]
    item, (bare, suffix) = _item(lambda calls: answer("", calls), two, call_slots)
    listed = item.write([call_slots(call) for call in one])
    if answer("", one) != bare + listed + suffix:
        raise refusal("the text around an assistant's calls depends on their number", probe("user", "assistant"))
    content = "zqanswerqz"
    prefix, found, rest = answer(content, one).partition(content)
    middle, there, end = rest.partition(listed)
    if not found or not there or end != suffix or content in rest:
        raise refusal("the text beside an assistant's calls is dropped, moved or altered", probe("user", "assistant"))
    return CallForm(item, prefix, middle, bare, suffix)


def check_results(chat: ChatTemplate) -> None:
    """Raise ExportError where a tool's result is written with more than its content: a client may leave that out."""
    messages = probe("user", "assistant", "tool")
    named = [*messages[:2], {**messages[2], "name": "zqnameqz", "tool_call_id": "zqididqz"}]
    if rendered(chat, named) != rendered(chat, messages):
        raise refusal("a tool's result is written with its function's name or its call's id", messages)


def _check_place(chat: ChatTemplate, tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise ExportError where the definitions do not stand before the first user message."""
    roles = ("user", "assistant", "user")
    there = [tools[0]["function"]["name"] in piece for piece in pieces(chat, *roles, tools=tools)]
    if not there[0] and any(there):
        raise refusal(
            "the function definitions stand with the last user message, and move with every turn", probe(*roles)
        )


def _item(
    write: Callable[[Sequence[Mapping[str, Any]]], str],
    two: Sequence[Mapping[str, Any]],
    slots_of: Callable[[Mapping[str, Any]], dict[str, str]],
) -> tuple[Item, tuple[str, str]]:
    """The form of one item, and the texts before and after a list of them, of the text that two items give."""
    text = write(two)
    marked, order = text, []
    for number, thing in enumerate(two):
        found = {}
        for place, (slot, value) in enumerate(slots_of(thing).items()):
            mark = chr(FIRST_MARK + 16 * number + place)
            if value in marked:
                marked = marked.replace(value, mark)
                found[mark] = slot
        if not found or any(marked.count(mark) != 1 for mark in found):
            raise _foreign(text, two)
        order.append(sorted(found, key=marked.index))
    parts = re.split("|".join(order[0] + order[1]), marked)
    size = len(order[0])
    between, again = tuple(parts[1:size]), tuple(parts[size + 1 : -1])
    in_order = re.findall("|".join(order[0] + order[1]), marked) == order[0] + order[1]
    if not in_order or between != again or any("zq" in part for part in parts):
        raise _foreign(text, two)
    slots = tuple(list(slots_of(two[0]))[ord(mark) - FIRST_MARK] for mark in order[0])
    return Item(slots, between, parts[size]), (parts[0], parts[-1])


def _foreign(text: str, things: Sequence[Mapping[str, Any]]) -> ExportError:
    """The refusal of functions or calls in other JSON than Ollama's, with the construct that makes it other."""
    values = [value for thing in things for value in (thing, *_inner(thing))]
    found = [reason for reason, form in FOREIGN_FORMS.items() if any(form(value) in text for value in values)]
    reason = found[0] if found else "not as Ollama's JSON, or more than once"
    return refusal(f"functions or their calls are written {reason}", probe("user"), COMPACT)


def _inner(thing: Mapping[str, Any]) -> list[Any]:
    function = thing["function"]
    return [function, function["parameters"] if "parameters" in function else function["arguments"]]
