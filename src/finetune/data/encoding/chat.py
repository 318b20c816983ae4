"""A record -> token ids and which of them are trained: one rendering, one encoding, one mask."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from finetune.chat_template import ChatTemplate, Rendered, Turn, turn_end, writes_tool_calls, writes_tools
from finetune.data.encoding.encoder import Encoder, Ids, Offsets, encode_text
from finetune.data.record import Message, Record
from finetune.errors import DataError
from finetune.tool_forms import canonical_calls, canonical_tools

Loss = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, and the number of ids that the vocabulary has. `bos` is None where there is none.

    `needs_bos`: a document must begin with BOS.
    """

    bos: int | None
    eos: int
    pad: int
    vocab_size: int
    needs_bos: bool


@dataclass(frozen=True)
class Chat:
    """All that turns a record into ids."""

    tokenizer: Tokenizer
    template: ChatTemplate
    ids: SpecialIds
    special_texts: tuple[str, ...]

    @cached_property
    def stop(self) -> tuple[str, int]:
        """Text and id of the special token that ends an assistant's turn; eos where the turn's end begins with none.

        Not always eos: a base model may end documents with one token and turns with another (Llama 3's <|eot_id|>).
        BOS and padding end nothing. A template that does not show its turn's end is held to eos.
        """
        try:
            end = turn_end(self.template)
        except DataError:
            end = ""
        named = (self.template.tokens.get(name) for name in ("bos_token", "pad_token"))
        usable = set(self.special_texts) - {text for text in named if text}
        found = max((text for text in usable if end.startswith(text)), key=len, default=None)
        stop = None if found is None else self.tokenizer.token_to_id(found)
        if found is None or stop is None:
            return self.template.tokens["eos_token"], self.ids.eos
        return found, stop


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, and for each whether it is trained; both of the same length.

    `straddling`: tokens that lie only partly in a trained span, and are therefore not trained.
    """

    input_ids: Ids
    trained: npt.NDArray[np.bool_]
    straddling: int

    def trained_tokens(self) -> int:
        """Tokens that add to the loss: the trained ones, but never the first, which nothing predicts."""
        return int(np.count_nonzero(self.trained[1:]))


def flatten(record: Record) -> list[Turn]:
    """Turns of role and content only: tool definitions go into the system turn, calls into the assistant's text."""
    return _with_tools(_with_calls_as_text(record.messages), record)


def conversation(record: Record, template: ChatTemplate) -> tuple[list[Turn], list[dict[str, Any]] | None]:
    """The turns and the function definitions of a record, as `template` takes them.

    Definitions and calls that the template writes by itself are in the canonical form of finetune.tool_forms, and a
    tool's result then has the name of the function that was called; those that it does not write are in the texts, as
    `flatten` puts them there.
    """
    calls_apart = writes_tool_calls(template)
    turns = _with_calls_apart(record.messages) if calls_apart else _with_calls_as_text(record.messages)
    if record.tools is None or not writes_tools(template):
        return _with_tools(turns, record), None
    return turns, canonical_tools(json.loads(record.tools))


def special_text_in(record: Record, chat: Chat) -> str | None:
    """The first special token that the record's own text spells: it would become that token, and close a turn."""
    found = _any_of(chat.special_texts).search(record.all_text())
    return None if found is None else found.group()


@cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, as in the tokenizer. Without any text nothing matches.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def encode_record(record: Record, chat: Chat, encoder: Encoder, loss: Loss) -> Encoded:
    """Ids and mask of a conversation or a plain text; raises DataError when the template breaks a promise."""
    tokens = chat.template.tokens
    if record.text is not None:
        rendered = Rendered(tokens.get("bos_token", "") + record.text + tokens["eos_token"], ())
        encoded = encode(rendered, encoder, "all")
    else:
        rendered = render_record(chat.template, record)
        answers = sum(message.role == "assistant" for message in record.messages)
        if len(rendered.spans) != answers:
            raise DataError(
                f"the template marks {len(rendered.spans)} generation blocks for {answers} assistant turns",
                f"record {record.id}",
                "put {% generation %} and {% endgeneration %} around each assistant turn of the template",
            )
        encoded = encode(rendered, encoder, loss)
        check_stop_token(rendered, encoded, chat, record.id, loss)
    bos = tokens.get("bos_token")
    check_ids(encoded.input_ids, chat.ids, record.id, rendered.text.count(bos) if bos else 0)
    return encoded


def render_record(template: ChatTemplate, record: Record, *, add_generation_prompt: bool = False) -> Rendered:
    """Render a conversation as training does, its functions included; raises DataError when the template refuses it."""
    turns, tools = conversation(record, template)
    return render(template, turns, f"record {record.id}", add_generation_prompt=add_generation_prompt, tools=tools)


def render(
    template: ChatTemplate,
    turns: Sequence[Turn],
    where: object,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Render turns and function definitions; raises DataError when the template refuses them."""
    try:
        return template.render(turns, add_generation_prompt=add_generation_prompt, tools=tools)
    except TemplateError as fault:
        raise DataError(
            f"the chat template refuses a conversation of {', '.join(turn['role'] for turn in turns)}: {fault}",
            where,
            "mend the template, or drop such conversations in the section clean of params.yaml",
        ) from None


def encode(rendered: Rendered, encoder: Encoder, loss: Loss) -> Encoded:
    """Encode once, without adding special tokens, and mask by the places of the tokens in the text.

    A token is trained when it lies whole in a trained span. One that straddles a span's start holds the end of the
    prompt: when serving, the prompt is encoded alone and ends in other ids, so the model is never asked for that
    token. One that straddles the end holds text that follows the stop, which nobody asks for either.
    """
    tokens = encode_text(encoder, rendered.text)
    if loss == "all":
        return Encoded(tokens.ids, np.ones(len(tokens.ids), np.bool_), 0)
    spans = rendered.spans if loss == "assistant" else rendered.spans[-1:]
    edges = _edges(rendered.text, spans, in_bytes=tokens.in_bytes)
    # For each token the first span that ends after the token starts; a token after the last span belongs to none.
    at = np.searchsorted(edges[:, 1], tokens.starts, side="right")
    after_all = np.iinfo(np.int64).max
    start, end = np.vstack([edges, [(after_all, after_all)]])[at].T
    inside = (start <= tokens.starts) & (tokens.ends <= end)
    touches = tokens.ends > start
    return Encoded(tokens.ids, inside, int(np.count_nonzero(touches & ~inside)))


def _edges(text: str, spans: Sequence[tuple[int, int]], *, in_bytes: bool) -> Offsets:
    """The spans as an array (spans, 2), in characters or in bytes of UTF-8."""
    edges = [edge for span in spans for edge in span]
    if in_bytes and not text.isascii():
        steps = [len(text[start:end].encode()) for start, end in zip([0, *edges], edges, strict=False)]
        edges = list(accumulate(steps))
    return np.array(edges, np.int64).reshape(-1, 2)


def check_stop_token(rendered: Rendered, encoded: Encoded, chat: Chat, record_id: str, loss: Loss) -> None:
    """Raise DataError unless each trained turn ends in its trained stop: without it the model never learns to stop."""
    turns = 1 if loss == "last_assistant" else len(rendered.spans)
    text, token = chat.stop
    stops = int(np.count_nonzero(encoded.input_ids[encoded.trained] == token))
    spans = rendered.spans[-turns:]
    if stops < turns or not all(rendered.text[start:end].rstrip("\r\n").endswith(text) for start, end in spans):
        raise DataError(
            f"{turns} turns are trained and {stops} of them end in the stop token {text}",
            f"record {record_id}",
            "put the eos token, or another special token that ends a turn, inside {% generation %}, at the end of the "
            "assistant's turn",
        )


def check_ids(input_ids: Ids, ids: SpecialIds, record_id: str, written_bos: int) -> None:
    """Raise DataError unless all ids are in the vocabulary, and BOS is where the template wrote it.

    `written_bos`: how often the rendered text spells BOS. A template may open every turn with it, but a document
    begins with one BOS: with none the model sees a start that no prompt has, and a second comes of two programs
    that each write one. A tokenizer that names a BOS and by its own rule adds none, as Phi's, may do without.
    """
    outside = input_ids[(input_ids < 0) | (input_ids >= ids.vocab_size)]
    if len(outside):
        raise DataError(
            f"token id {outside[0]} is beyond the vocabulary of {ids.vocab_size}",
            f"record {record_id}",
            "the tokenizer does not fit: run `dvc repro --force tokenizer`",
        )
    if ids.bos is None:
        return
    starts = np.flatnonzero(input_ids == ids.bos).tolist()
    if not (ids.needs_bos or written_bos or starts):
        return
    if starts[:1] != [0] or starts[1:2] == [1] or len(starts) != written_bos:
        raise DataError(
            f"a document begins with one BOS (id {ids.bos}) and has as many as its text spells ({written_bos}); "
            f"here they are at positions {starts[:20]}",
            f"record {record_id}",
            "write {{ bos_token }} once at the start of the chat template (and where later turns open, if they do)",
        )


def _with_calls_as_text(messages: Sequence[Message]) -> list[Turn]:
    return [{"role": message.role, "content": _with_calls(message)} for message in messages]


def _with_calls(message: Message) -> str:
    if message.tool_calls is None:
        return message.content
    calls = [
        f"<tool_call>{json.dumps(call, ensure_ascii=False, sort_keys=True)}</tool_call>"
        for call in json.loads(message.tool_calls)
    ]
    return "\n".join([message.content, *calls] if message.content else calls)


def _with_tools(turns: list[Turn], record: Record) -> list[Turn]:
    """The turns with the definitions, if there are any, at the end of the system turn that opens them."""
    if not record.tools:
        return turns
    opening, rest = (turns[0]["content"], turns[1:]) if turns[0]["role"] == "system" else ("", turns)
    return [{"role": "system", "content": f"{opening}\n\nTools: {record.tools}".lstrip("\n")}, *rest]


def _with_calls_apart(messages: Sequence[Message]) -> list[Turn]:
    """Turns with `tool_calls`; results are taken to come in the order of the calls before them, and get their names."""
    turns: list[Turn] = []
    awaited: list[str] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls is not None:
            turn["tool_calls"] = canonical_calls(json.loads(message.tool_calls))
            awaited = [call["function"]["name"] for call in turn["tool_calls"]]
        elif message.role == "tool" and awaited:
            turn["name"] = awaited.pop(0)
        turns.append(turn)
    return turns
