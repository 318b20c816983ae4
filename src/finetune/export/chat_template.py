"""A Jinja chat template and messages -> the prompt's text, as transformers renders it; no torch, no tokenizer.

The environment is that of transformers.utils.chat_template_utils (5.23): sandboxed, blocks trimmed, loop controls,
`{% generation %}` marks, `tojson` without escapes, `raise_exception`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import ExportError

Message = Mapping[str, str]


class _GenerationMarks(Extension):
    """`{% generation %}` marks the trained text; rendering shows what it holds."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the two special tokens that it may write (empty where the tokenizer has none)."""

    text: str
    bos_token: str
    eos_token: str

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The prompt's text; raises jinja2.TemplateError where the template refuses the chat."""
        try:
            return _compiled(self.text).render(
                messages=messages,
                tools=None,
                documents=None,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                add_generation_prompt=add_generation_prompt,
            )
        except TypeError as fault:
            # Such as a loop over `tools` that no `if` guards: the template's fault, not ours.
            raise jinja2.TemplateRuntimeError(str(fault)) from None


def _refuse_chat(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _refuse_clock(form: str) -> NoReturn:
    raise ExportError(
        f"the chat template writes today's date (strftime_now({form!r})): the prompt changes after training",
        "chat_template.jinja",
        "write a fixed date in the template, or none",
    )


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse_chat
    environment.globals["strftime_now"] = _refuse_clock
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as fault:
        raise ExportError(
            f"the chat template is not valid Jinja: {fault.message}", f"line {fault.lineno}", "mend the template"
        ) from None
