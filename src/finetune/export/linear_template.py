"""The linear form of a chat template: fixed texts around the contents, the function definitions and the calls.

It is what a Go TEMPLATE can write: which text stands where depends on the role, on whether a chat has functions or an
answer has calls, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat_template import Turn
from finetune.tool_forms import canonical_calls, canonical_tools, ollama_json


@dataclass(frozen=True)
class RoleForm:
    """What a message of `role` is written as: prefix, content, suffix."""

    role: str
    prefix: str
    suffix: str


@dataclass(frozen=True)
class Item:
    """What one of several things is written as: `slots` with `between` in their gaps, so one text fewer than slots.

    `separator` stands between two items. Slots are names of DEFINITION_SLOTS or CALL_SLOTS.
    """

    slots: tuple[str, ...]
    between: tuple[str, ...]
    separator: str

    def write(self, items: Sequence[Mapping[str, str]]) -> str:
        """The items' text, of the texts of their slots."""
        return self.separator.join(self._write(values) for values in items)

    def _write(self, values: Mapping[str, str]) -> str:
        parts = [values[self.slots[0]]]
        for text, slot in zip(self.between, self.slots[1:], strict=True):
            parts += [text, values[slot]]
        return "".join(parts)


@dataclass(frozen=True)
class DefinitionForm:
    """Where the list of function definitions stands: at the start of a chat, in or beside its system message.

    `opening`: the texts before and after the list in a chat that does not begin with a system message, in place of
    LinearTemplate.default_system. `before_system`, `after_system`: the texts around the content of one that does; the
    one with two parts has the list between them. Both are empty where the template has no system role.
    """

    item: Item
    opening: tuple[str, str]
    before_system: tuple[str, ...]
    after_system: tuple[str, ...]


@dataclass(frozen=True)
class CallForm:
    """An answer with calls: `prefix` content `middle` calls `suffix`, or `bare` calls `suffix` without content."""

    item: Item
    prefix: str
    middle: str
    bare: str
    suffix: str


@dataclass(frozen=True)
class LinearTemplate:
    """A chat as BOS, preamble, one RoleForm per message, generation prompt.

    `bos` is empty when the Jinja writes none; `default_system` is the text in place of a missing first system message;
    `roles` are the roles that the Jinja writes. `definitions` and `calls` are None where it does not write them.
    """

    bos: str
    preamble: str
    default_system: str
    roles: tuple[RoleForm, ...]
    generation_prompt: str
    definitions: DefinitionForm | None = None
    calls: CallForm | None = None

    def render(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt's text, generation prompt included."""
        forms = {form.role: form for form in self.roles}
        listed = self._list(tools)
        parts = [self.bos, self.preamble]
        if messages[0]["role"] != "system":
            parts.append(listed.join(self.definitions.opening) if self.definitions and tools else self.default_system)
        for number, message in enumerate(messages):
            form, content = forms[message["role"]], message["content"]
            if number == 0 and form.role == "system" and self.definitions and tools:
                around = self.definitions
                parts += [listed.join(around.before_system), content, listed.join(around.after_system)]
            elif message.get("tool_calls") and self.calls:
                parts.append(self._with_calls(self.calls, message))
            else:
                parts += [form.prefix, content, form.suffix]
        return "".join([*parts, self.generation_prompt])

    def role_names(self) -> list[str]:
        """The roles that the template writes."""
        return [form.role for form in self.roles]

    def _list(self, tools: Sequence[Mapping[str, Any]]) -> str:
        if self.definitions is None:
            return ""
        return self.definitions.item.write([definition_slots(tool) for tool in canonical_tools(tools)])

    def _with_calls(self, form: CallForm, message: Turn) -> str:
        content = message["content"]
        calls = form.item.write([call_slots(call) for call in canonical_calls(message["tool_calls"])])
        return (f"{form.prefix}{content}{form.middle}" if content else form.bare) + calls + form.suffix


def definition_slots(tool: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a canonical definition that a TEMPLATE can write, the longest first."""
    function = tool["function"]
    return {
        "tool": ollama_json(tool),
        "function": ollama_json(function),
        "parameters": ollama_json(function["parameters"]),
        "quoted_description": ollama_json(function["description"]),
        "description": function["description"],
        "name": function["name"],
    }


def call_slots(call: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a canonical call that a TEMPLATE can write, the longest first."""
    return {"arguments": ollama_json(call["function"]["arguments"]), "name": call["function"]["name"]}


# How each slot is written inside `range .Tools` and `range .ToolCalls`.
DEFINITION_SLOTS = {
    "tool": "json .",
    "function": "json .Function",
    "parameters": "json .Function.Parameters",
    "quoted_description": "json .Function.Description",
    "description": ".Function.Description",
    "name": ".Function.Name",
}
CALL_SLOTS = {"arguments": "json .Function.Arguments", "name": ".Function.Name"}
