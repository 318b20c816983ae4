"""A chat template in Jinja -> the rendered text and the character spans that the model is trained to write.

The environment is the one that model repositories write their templates for (trim_blocks, lstrip_blocks, loop
controls, `tojson`, `raise_exception`), sandboxed. `strftime_now` is absent on purpose: a prompt with today's date in
it cannot be reproduced. Form and names: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import DataError

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
# Unicode noncharacters: reserved for use inside a program, never for text that programs exchange.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
START, END = "generation_start_mark", "generation_end_mark"

Turn = Mapping[str, str]


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `spans` are (start, end) in characters of `text`, one for each generation block."""

    text: str
    spans: tuple[tuple[int, int], ...]


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: prints its body between two marks.

    The body stays in the template's own scope, so that taking the tags away changes nothing that it prints.
    """

    tags = {"generation"}  # noqa: RUF012 (the attribute that jinja2 asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the tag by: mark, body, mark."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start = nodes.Output([nodes.Name(START, "load")], lineno=line)
        end = nodes.Output([nodes.Name(END, "load")], lineno=line)
        return [start, *body, end]


def compile_template(source: str, where: object) -> Template:
    """The template of a Jinja text; raises DataError with the line of a syntax error."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as fault:
        raise DataError(
            f"the chat template is not valid Jinja: {fault.message}", f"{where}:{fault.lineno}", "mend that line"
        ) from None


def render(
    template: Template, turns: Sequence[Turn], tokens: Mapping[str, str], *, add_generation_prompt: bool
) -> Rendered:
    """Render turns ({role, content}) with the special tokens ({bos_token, eos_token, ...}).

    Raises DataError when the template itself refuses the conversation.
    """
    content = "".join(turn["content"] for turn in turns)
    free = [mark for mark in MARKS if mark not in content]
    if len(free) < 2:
        raise DataError("the text holds all 32 noncharacters U+FDD0 to U+FDEF", content[:80], "remove that record")
    start, end = free[:2]
    try:
        marked = template.render(
            messages=list(turns),
            add_generation_prompt=add_generation_prompt,
            **{START: start, END: end},
            **tokens,
        )
    except TemplateError as fault:
        raise DataError(
            f"the chat template refuses a conversation: {fault}",
            [turn["role"] for turn in turns],
            "mend the template, or drop such conversations in the section clean of params.yaml",
        ) from None
    return _without_marks(marked, start, end)


def serving_form(source: str) -> str:
    """The template without generation tags: each becomes an empty comment, which trims white space as the tag did."""
    return GENERATION_TAG.sub(r"{#\1 \2#}", source)


def has_generation_tags(source: str) -> bool:
    """Whether the template says what is trained."""
    return GENERATION_TAG.search(source) is not None


def _without_marks(marked: str, start: str, end: str) -> Rendered:
    parts, spans, length = [], [], 0
    for index, piece in enumerate(marked.split(start)):
        if index == 0:
            inside, outside = "", piece
        else:
            inside, _, outside = piece.partition(end)
            spans.append((length, length + len(inside)))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return Rendered("".join(parts), tuple(spans))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML characters, which would change the text."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
