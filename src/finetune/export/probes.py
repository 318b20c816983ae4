"""A chat template -> the texts that stand around the contents of probe chats, and the refusals that these lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from finetune.chat_template import SERVING_TEMPLATE, ChatTemplate, Turn
from finetune.errors import ExportError

REMEDY = (
    "change the recipe's chat template to one fixed prefix and suffix per role, "
    "such as recipes/smoke/chat_template.jinja, and run `dvc repro`"
)
EXCERPT_CHARACTERS = 60


def probe(*roles: str) -> list[dict[str, Any]]:
    """A chat with these roles, of contents that no template holds."""
    return [{"role": role, "content": f"zq{role}{number}qz"} for number, role in enumerate(roles)]


def pieces(chat: ChatTemplate, *roles: str, tools: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
    """The texts around the contents of a chat with these roles, without generation prompt: one more than roles."""
    messages = probe(*roles)
    rest = rendered(chat, messages, tools=tools)
    found = []
    for message in messages:
        before, there, rest = rest.partition(message["content"])
        if not there:
            raise refusal(f"the content of the {message['role']} message is dropped, moved or altered", messages)
        found.append(before)
    for message in messages:
        if message["content"] in rest or any(message["content"] in piece for piece in found):
            raise refusal(f"the content of the {message['role']} message is written more than once", messages)
    return [*found, rest]


def rendered(chat: ChatTemplate, messages: Sequence[Turn], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The chat's text without generation prompt; raises ExportError where the template refuses it."""
    try:
        return chat.render(messages, add_generation_prompt=False, tools=tools).text
    except jinja2.TemplateError as fault:
        with_tools = " with functions" if tools else ""
        roles = ", ".join(message["role"] for message in messages)
        raise refusal(f"it refuses a chat of {roles}{with_tools}: {fault}", messages) from None


def writes(chat: ChatTemplate, *roles: str) -> bool:
    """Whether the template accepts a chat with these roles and writes all its contents somewhere."""
    messages = probe(*roles)
    try:
        text = chat.render(messages, add_generation_prompt=False).text
    except jinja2.TemplateError:
        return False
    return all(message["content"] in text for message in messages)


def without_start(text: str, start: str, what: str) -> str:
    """`text` without `start`; raises ExportError, naming `what`, where it does not begin so."""
    if not text.startswith(start):
        raise refusal(f"{what} depends on what follows: {short(text)} does not begin with {short(start)}")
    return text[len(start) :]


def without_end(text: str, end: str, what: str) -> str:
    """`text` without `end`; raises ExportError, naming `what`, where it does not end so."""
    if not text.endswith(end):
        raise refusal(f"{what} depends on what stands before: {short(text)} does not end with {short(end)}")
    return text[: len(text) - len(end)]


def short(text: str) -> str:
    """The text as a literal, cut where it is long."""
    return repr(text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "…")


def refusal(reason: str, messages: Sequence[Turn] = (), remedy: str = REMEDY) -> ExportError:
    """The error of a template that Go cannot express, with the construct and a chat that shows it."""
    roles = ", ".join(message["role"] for message in messages)
    where = f"{SERVING_TEMPLATE}, for a chat of {roles}" if roles else SERVING_TEMPLATE
    return ExportError(f"the chat template cannot be written as an Ollama TEMPLATE: {reason}", where, remedy)
