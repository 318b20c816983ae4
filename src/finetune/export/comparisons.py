"""A chat template and its linear form on many chats -> a refusal with the construct that the linear form misses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from finetune.chat_template import ChatTemplate
from finetune.export.linear_template import LinearTemplate
from finetune.export.probes import EXCERPT_CHARACTERS, refusal, short
from finetune.export.tool_probes import probe_call, probe_tool
from finetune.tool_forms import canonical_tools

PLAIN = {"system": "Be brief.", "user": "Hello", "assistant": "Good day", "tool": "21 degrees"}
ON_PLACE = "the text around a message depends on its place"
ON_PLACE_WITH_TOOLS = "with functions, the text around a message depends on its place"
ON_CALLS = "the text around an assistant's calls depends on what stands beside them"
Comparison = tuple[str, list[dict[str, Any]], list[dict[str, Any]]]


def compare(chat: ChatTemplate, linear: LinearTemplate) -> None:
    """Raise ExportError at the first chat that the linear form writes otherwise than the Jinja."""
    for meaning, messages, tools in _comparisons(linear):
        try:
            truth = chat.render(messages, add_generation_prompt=True, tools=tools or None).text
        except jinja2.TemplateError:
            continue  # The Jinja forbids this order of roles; nothing was trained on it.
        form = linear.render(messages, tools)
        if truth != form:
            at = next(
                (i for i, (a, b) in enumerate(zip(truth, form, strict=False)) if a != b), min(len(truth), len(form))
            )
            start = max(0, at - EXCERPT_CHARACTERS // 2)
            shown = (
                f"the Jinja writes {short(truth[start:])}, one prefix and suffix per role gives {short(form[start:])}"
            )
            raise refusal(f"{meaning}: {shown}", messages)


def _comparisons(linear: LinearTemplate) -> Iterator[Comparison]:
    """Chats and their functions, each with the construct that it would reveal."""
    for meaning, messages in _plain_comparisons(linear.role_names()):
        yield meaning, messages, []
    if linear.definitions is not None:
        yield from _with_tools(linear.role_names())
    if linear.calls is not None:
        yield from _with_calls(linear)


def _plain_comparisons(roles: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    shapes = ["user", "user assistant user", "user assistant " * 4 + "user"]
    if "system" in roles:
        shapes += [f"system {shape}" for shape in shapes]
    for shape in shapes:
        yield ON_PLACE, _chat(shape)
    longest = shapes[-1] + (" assistant tool assistant user" if "tool" in roles else "")
    yield ON_PLACE, _chat(longest)
    for role in roles:
        yield f"the content of a {role} message is trimmed", _chat(longest, **{role: f" \n\t{PLAIN[role]} \n"})
        yield f"an empty {role} message is treated apart", _chat(longest, **{role: ""})
        yield f"a blank {role} message is treated apart", _chat(longest, **{role: "   "})
        yield (
            f"the content of a {role} message is escaped",
            _chat(longest, **{role: "<b>\"1\" & '2'</b> \\n {{ x }} é"}),
        )
    think = "<think>\nwhy\n</think>\n\nGood day"
    yield "<think> text of earlier answers is removed", _chat("user assistant user", assistant=think)
    for shape in ("user assistant", "assistant user", "user assistant user assistant"):
        yield "the generation prompt or a prefix depends on the first or last role", _chat(shape)
    if "system" in roles:
        yield "a chat of a system message alone is treated apart", _chat("system")
        yield "a later system message is moved, dropped or written otherwise", _chat("user assistant system user")
        yield "an answer right after the system message is treated apart", _chat("system assistant user")
    if "tool" in roles:
        yield "a tool result is treated apart when it comes last", _chat("user assistant tool")
        yield "neighbouring tool results are grouped", _chat("user assistant tool tool assistant user")


def _with_tools(roles: Sequence[str]) -> Iterator[Comparison]:
    tools = [probe_tool("A"), probe_tool("B"), probe_tool("C")]
    shapes = ["user", "user assistant user", "user assistant user assistant user", "assistant user"]
    if "system" in roles:
        shapes += [*(f"system {shape}" for shape in shapes), "system", "user assistant system user"]
    for shape in shapes:
        for count in (1, 3):
            yield ON_PLACE_WITH_TOOLS, _chat(shape), tools[:count]
    if "system" in roles:
        for content in ("", "   ", " \nBe brief. \n"):
            meaning = "with functions, the content of a system message is trimmed or treated apart"
            yield meaning, _chat("system user", system=content), tools[:1]
    yield (
        "a function without parameters or description is treated apart",
        _chat("user"),
        canonical_tools([{"name": "now"}]),
    )


def _with_calls(linear: LinearTemplate) -> Iterator[Comparison]:
    calls = [probe_call("A"), probe_call("B"), probe_call("C")]
    results = " tool tool tool" if "tool" in linear.role_names() else ""
    tools = [probe_tool("A")] if linear.definitions is not None else []
    for shape in ("user assistant", f"user assistant{results}", f"user assistant{results} assistant user"):
        for content in ("", "I look.", "   ", " \nI look. \n"):
            for count in (1, 3):
                messages = _chat(shape, assistant=content)
                messages[1]["tool_calls"] = calls[:count]
                yield ON_CALLS, messages, []
                yield ON_CALLS, messages, tools
    bare = {"type": "function", "function": {"name": "now", "arguments": {}}}
    yield "a call without arguments is treated apart", [*_chat("user"), _answer([bare])], []


def _answer(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _chat(names: str, **contents: str) -> list[dict[str, Any]]:
    return [{"role": name, "content": contents.get(name, PLAIN[name])} for name in names.split()]
