"""Training template, GGUF and Go TEMPLATE -> proof that all three turn a chat into the same token ids.

Three ways to the prompt's ids are compared on every chat of parity_chats:
- trained: the training Jinja, tokenised by the tokenizer's own library without adding special tokens;
- embedded: the GGUF's chat template in llama-cpp-python's formatter, tokenised by llama.cpp (the template writes BOS);
- ollama: the Go TEMPLATE in Go, tokenised by llama.cpp, which adds BOS if the GGUF's metadata says so. Chats with
  functions are left out where the TEMPLATE has none: Ollama then renders them by the GGUF's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2.exceptions import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers import Tokenizer

from finetune.chat_template import SERVING_TEMPLATE, TOKENIZER, TRAINING_TEMPLATE, ChatTemplate, read_template
from finetune.errors import DataError, ExportError
from finetune.export.gguf_vocab import GgufFacts, encode
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.parity_chats import ParityChat

AROUND_TOKENS = 8
AROUND_CHARACTERS = 200


@dataclass(frozen=True)
class Trained:
    """How training turned chats into ids: the template with its marks, and the tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer

    def prompt(self, chat: ParityChat) -> tuple[str, list[int]]:
        """The prompt's text and ids."""
        tools = chat.full_tools()
        text = self.template.render(chat.full_messages(), add_generation_prompt=True, tools=tools).text
        return text, list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class Difference:
    """The first chat that an engine prompts otherwise: both texts, and the ids around the first that differs."""

    engine: str
    chat: str
    trained_text: str
    served_text: str
    trained_ids: list[int]
    served_ids: list[int]
    first_token: int

    def describe(self) -> str:
        """The difference in a few lines, for an error."""
        at = next(
            (i for i, pair in enumerate(zip(self.trained_text, self.served_text, strict=False)) if pair[0] != pair[1]),
            min(len(self.trained_text), len(self.served_text)),
        )
        texts = slice(max(0, at - AROUND_CHARACTERS // 2), at + AROUND_CHARACTERS // 2)
        ids = slice(max(0, self.first_token - AROUND_TOKENS), self.first_token + AROUND_TOKENS)
        return (
            f"chat {self.chat!r}, {self.engine}, token {self.first_token} is the first that differs\n"
            f"    trained: {self.trained_text[texts]!r} {self.trained_ids[ids]}\n"
            f"    served:  {self.served_text[texts]!r} {self.served_ids[ids]}"
        )


@dataclass(frozen=True)
class ParityReport:
    """Number of chats compared, and how many each engine prompts with exactly the trained ids.

    `ollama_chats`: those of them that Ollama renders by its TEMPLATE.
    """

    chats: int
    ollama_chats: int
    equal_embedded: int
    equal_ollama: int
    first_difference: Difference | None

    def share(self) -> float:
        """Share of the comparisons, over both engines, that are equal; 1.0 is what the gate asks for."""
        return (self.equal_embedded + self.equal_ollama) / (self.chats + self.ollama_chats)


def read_trained(folder: Path) -> Trained:
    """The training template and the tokenizer of models/tokenizer."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro tokenizer`")
    return Trained(read_template(folder, TRAINING_TEMPLATE), Tokenizer.from_file(str(path)))


def compare_prompts(
    chats: Sequence[ParityChat],
    trained: Trained,
    vocab: llama_cpp.Llama,
    facts: GgufFacts,
    go_text: str,
    go_program: Path,
    *,
    functions_in_go: bool = True,
) -> ParityReport:
    """Compare the ids of every chat; `go_text` is the TEMPLATE, `go_program` the path of gotemplate.

    `functions_in_go`: whether chats with functions are rendered by the TEMPLATE too.
    """
    formatter = Jinja2ChatFormatter(facts.chat_template, eos_token=facts.eos_token, bos_token=facts.bos_token)
    in_go = [functions_in_go or not chat.has_functions() for chat in chats]
    requests = [
        GoRequest(system=chat.system, messages=chat.messages, tools=chat.tools)
        for chat, wanted in zip(chats, in_go, strict=True)
        if wanted
    ]
    go_prompts = iter(render_go(go_program, go_text, requests))
    equal = {"embedded": 0, "ollama": 0}
    first: Difference | None = None
    for chat, wanted in zip(chats, in_go, strict=True):
        text, ids = trained.prompt(chat)
        messages: list[Any] = chat.full_messages()
        tools: Any = chat.full_tools()
        embedded = _embedded_prompt(formatter, messages, tools, chat)
        served = {"embedded": (embedded, encode(vocab, embedded, add_bos=False))}
        if wanted:
            go_prompt = next(go_prompts)
            served["ollama"] = (go_prompt, encode(vocab, go_prompt, add_bos=True))
        for engine, (served_text, served_ids) in served.items():
            if served_ids == ids:
                equal[engine] += 1
            elif first is None:
                at = _first_difference(ids, served_ids)
                first = Difference(engine, chat.name, text, served_text, ids, served_ids, at)
    return ParityReport(len(chats), len(requests), equal["embedded"], equal["ollama"], first)


def _embedded_prompt(formatter: Jinja2ChatFormatter, messages: list[Any], tools: Any, chat: ParityChat) -> str:
    try:
        return str(formatter(messages=messages, tools=tools).prompt)
    except (TemplateError, ValueError) as fault:
        raise ExportError(
            f"the GGUF's chat template cannot render the chat {chat.name!r} in llama-cpp-python: {fault}",
            SERVING_TEMPLATE,
            "use nothing in the template but messages, tools, add_generation_prompt, bos_token and eos_token, and "
            "refuse no chat that training accepts",
        ) from None


def require_parity(report: ParityReport, where: Path) -> None:
    """Raise ExportError, showing the first difference, unless every chat has the trained ids in both engines."""
    if report.first_difference is not None:
        raise ExportError(
            f"served prompts differ from trained ones: of {report.chats} chats, {report.equal_embedded} are equal "
            f"in the GGUF's chat template and, of {report.ollama_chats}, {report.equal_ollama} in Ollama's TEMPLATE\n"
            f"  {report.first_difference.describe()}",
            where,
            "if `embedded` differs, run `dvc repro -f quantize_gguf`; if `ollama` does, change the chat template",
        )


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
