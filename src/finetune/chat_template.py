"""A chat template in Jinja and messages -> the prompt's text, and the spans of it that the model is trained to write.

Training and the export's gate both render here, so that what the gate proves is what was trained. The environment and
the variables are those of transformers 5.23 (apply_chat_template: messages, tools, documents, add_generation_prompt
and the special tokens map), sandboxed. Form and names: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import DataError
from finetune.io import read_json

# The files of models/tokenizer: its serving template has no generation tags, its training template has them.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SERVING_TEMPLATE, TRAINING_TEMPLATE = "chat_template.jinja", "training_template.jinja"
# transformers' SPECIAL_TOKENS_ATTRIBUTES: the names that its special tokens map may hold.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
# Unicode noncharacters: reserved for use inside a program, never for text that programs exchange.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
START, END = "generation_start_mark", "generation_end_mark"
QUESTION: dict[str, Any] = {"role": "user", "content": "zquserqz"}

# {role, content}, with "tool_calls" as transformers has them ([{"type": "function", "function": {name, arguments}}],
# arguments an object) and, for a tool's result, the function's name where it is known.
Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `spans` are (start, end) in characters of `text`, one for each generation block."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the special tokens map {bos_token, eos_token, ...}, without those there are none of."""

    compiled: Template
    tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """Render messages and function definitions as they are; raises TemplateError where the template refuses them.

        What is trained and served has its definitions and calls in the form of finetune.tool_forms.
        """
        start, end = _free_marks(messages, tools)
        try:
            marked = self.compiled.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{START: start, END: end},
                **self.tokens,
            )
        except (TypeError, OverflowError) as fault:
            # Such as a loop over `tools` that no `if` guards, or over a range too long for the sandbox.
            raise TemplateRuntimeError(str(fault)) from None
        return _without_marks(marked, start, end)

    @cached_property
    def written(self) -> frozenset[str]:
        """Which of "tools" and "tool_calls" the template writes by itself; see writes_tools and writes_tool_calls."""
        return frozenset(
            name for name, writes in (("tools", _writes_tools), ("tool_calls", _writes_calls)) if writes(self)
        )


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


def compile_template(source: str, tokens: Mapping[str, str], where: object) -> ChatTemplate:
    """The template of a Jinja text; raises DataError with the line of a syntax error."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _refuse_clock
    try:
        return ChatTemplate(environment.from_string(source), tokens)
    except TemplateSyntaxError as fault:
        raise DataError(
            f"the chat template is not valid Jinja: {fault.message}", f"{where}:{fault.lineno}", "mend that line"
        ) from None


def read_template(folder: Path, name: str) -> ChatTemplate:
    """The template `name` of models/tokenizer with the tokenizer's special tokens; raises DataError without it."""
    path = folder / name
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro tokenizer`")
    return compile_template(path.read_bytes().decode(), special_tokens(folder), path)


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens map of tokenizer_config.json, without those that are null."""
    config = read_json(folder / TOKENIZER_CONFIG)
    found = {name: token_text(config.get(name)) for name in SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def token_text(token: Any) -> str | None:
    """A special token is spelled as a text, or as {"content": text, ...}."""
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else str(text)


def serving_form(source: str) -> str:
    """The template without generation tags: each becomes an empty comment, which trims white space as the tag did."""
    return GENERATION_TAG.sub(r"{#\1 \2#}", source)


def has_generation_tags(source: str) -> bool:
    """Whether the template says what is trained."""
    return GENERATION_TAG.search(source) is not None


def writes_tools(template: ChatTemplate) -> bool:
    """Whether the template writes function definitions: probed with one, not looked for in its source."""
    return "tools" in template.written


def writes_tool_calls(template: ChatTemplate) -> bool:
    """Whether the template writes an assistant's calls: probed with one, not looked for in its source.

    Raises DataError for a template that says what is trained and leaves the calls out of it.
    """
    return "tool_calls" in template.written


def turn_end(template: ChatTemplate) -> str:
    """The text that follows an assistant's content, such as "</s>\\n"; the special token at its start is the stop.

    Probed: a chat of user and assistant is rendered, and what stands behind the answer is the turn's end. Raises
    DataError for a template that refuses such a chat, or that does not write the answer once.
    """
    answer = "zqassistantqz"
    try:
        text = template.render([QUESTION, {"role": "assistant", "content": answer}], add_generation_prompt=False).text
    except TemplateError as fault:
        raise _no_turn_end(f"refuses a chat of user and assistant: {fault}") from None
    _, found, end = text.partition(answer)
    if not found or answer in end:
        raise _no_turn_end("does not write the assistant's content once")
    return end


def _no_turn_end(what: str) -> DataError:
    return DataError(
        f"the chat template {what}", "tokenizer.chat_template", "mend the template: every turn's content once, as it is"
    )


def _writes_tools(template: ChatTemplate) -> bool:
    parameters = {"type": "object", "properties": {"zqparameterqz": {"type": "string"}}}
    function = {"name": "zqnameqz", "description": "zqdescriptionqz", "parameters": parameters}
    try:
        text = template.render(
            [QUESTION], add_generation_prompt=True, tools=[{"type": "function", "function": function}]
        ).text
    except TemplateError:
        return False
    return "zqnameqz" in text and "zqparameterqz" in text


def _writes_calls(template: ChatTemplate) -> bool:
    call = {"type": "function", "function": {"name": "zqnameqz", "arguments": {"zqkeyqz": "zqvalueqz"}}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        rendered = template.render(messages, add_generation_prompt=False)
    except TemplateError:
        return False
    signs = ("zqnameqz", "zqkeyqz", "zqvalueqz")
    if not all(sign in rendered.text for sign in signs):
        return False
    trained = "".join(rendered.text[start:end] for start, end in rendered.spans)
    if rendered.spans and not all(sign in trained for sign in signs):
        raise DataError(
            "the chat template writes an assistant's calls outside of its generation block: they would not be trained",
            "tokenizer.chat_template",
            "put {% generation %} before the calls and {% endgeneration %} behind the stop token that follows them",
        )
    return True


def _free_marks(messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, str]:
    """Two noncharacters that no text of the chat holds."""
    content = "".join(message["content"] for message in messages)
    if tools or any(message.get("tool_calls") for message in messages):
        content += json.dumps([tools, [message.get("tool_calls") for message in messages]], ensure_ascii=False)
    free = [mark for mark in MARKS if mark not in content]
    if len(free) < 2:
        raise DataError("the text holds all 32 noncharacters U+FDD0 to U+FDEF", content[:80], "remove that record")
    return free[0], free[1]


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


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _refuse_clock(form: str) -> NoReturn:
    raise DataError(
        f"the chat template writes today's date (strftime_now({form!r})): the prompt changes after training",
        "tokenizer.chat_template",
        "write a fixed date in the template, or none",
    )
