"""A template of the library, its tokenizer and its GGUF -> which engine gives which kind of chat the trained ids.

An engine is equal on a kind of chat when it is on every chat of that kind. The trained ids are those of the training
template and the tokenizers library; the engines are
- HF: transformers' own apply_chat_template on the serving template;
- GGUF: the GGUF's template in llama-cpp-python's formatter, tokenised by llama.cpp;
- Go: the derived TEMPLATE in the compiled Go program with Ollama's message rules, tokenised by llama.cpp, which adds
  BOS if the GGUF says so.

    python tests/unit/export/template_matrix.py

writes template_matrix.json anew, which docs/templates.md is held to.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from template_families import FAMILIES, NAMES, convert_all, library_text, train_base, write_family
from template_prompts import CALLED, HOURS, PRICE, SYSTEM, TALK
from transformers import PreTrainedTokenizerFast

from finetune.chat_template import SERVING_TEMPLATE, read_template, writes_tool_calls, writes_tools
from finetune.data.encoding.chat import conversation
from finetune.data.record import Message, make_record
from finetune.errors import ExportError
from finetune.export.gguf_vocab import GgufFacts, encode, open_vocab, read_facts
from finetune.export.gotemplate import GoRequest, render_go
from finetune.export.parity import Trained, read_trained
from finetune.export.parity_chats import CONTENTS
from finetune.export.renderer import serve_by_go, serve_by_jinja
from finetune.tools import GOTEMPLATE, tool_path

ENGINES = ("HF", "GGUF", "Go")
MATRIX = Path(__file__).with_name("template_matrix.json")
ANSWER = {"role": "assistant", "content": "Yes, from 9 to 18."}
THANKS = {"role": "user", "content": "Thanks"}


@dataclass(frozen=True)
class Asked:
    """A chat as a client sends it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


def unusual(content: str) -> list[Asked]:
    """The text as a question, and as an earlier answer."""
    question, answer = {"role": "user", "content": content}, {"role": "assistant", "content": content}
    return [Asked([question]), Asked([TALK[0], answer, TALK[2]])]


KINDS: dict[str, list[Asked]] = {
    "plain": [Asked(TALK[:1]), Asked([{"role": "user", "content": "Quels sont vos horaires ?"}])],
    "system": [Asked([SYSTEM, TALK[0]]), Asked([SYSTEM, *TALK])],
    "multi-turn": [Asked(TALK), Asked([*TALK, ANSWER, THANKS]), Asked([*TALK, ANSWER, *TALK, ANSWER, THANKS])],
    "tools": [Asked(TALK[:1], [HOURS]), Asked(TALK, [HOURS, PRICE])],
    "tool results": [Asked(CALLED, [HOURS]), Asked([*CALLED, ANSWER, THANKS], [HOURS])],
    "unusual text": [asked for _, content in CONTENTS for asked in unusual(content)],
}


@dataclass(frozen=True)
class Library:
    """A template in all its forms; `go_text` is None where renderer `go` refuses it for the reason `refusal`.

    `renderers`: the values of ollama_modelfile.renderer that serve it.
    """

    name: str
    folder: Path
    trained: Trained
    hf: PreTrainedTokenizerFast
    vocab: llama_cpp.Llama
    facts: GgufFacts
    go_text: str | None
    refusal: str
    renderers: tuple[str, ...]


def make_library(folder: Path) -> dict[str, Library]:
    """Every template of chat_templates/, with a tokenizer and a GGUF of its family made inside `folder`."""
    base, folders = train_base().to_str(), {name: folder / name for name in NAMES}
    for name, made in folders.items():
        write_family(made, base, FAMILIES[name], library_text(name))
    convert_all(folders.values())
    return {name: open_library(name, made) for name, made in folders.items()}


def open_library(name: str, folder: Path) -> Library:
    """Open what make_library wrote."""
    vocab, chat = open_vocab(folder / "model.gguf"), read_template(folder, SERVING_TEMPLATE)
    facts = read_facts(vocab, folder / "model.gguf")
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    texts: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for renderer, serve in (("go", serve_by_go), ("jinja", serve_by_jinja)):
        try:
            texts[renderer] = serve(chat, facts.chat_template, add_bos=facts.add_bos).text
        except ExportError as error:
            refusals[renderer] = str(error)
    go_text, refusal = texts.get("go"), refusals.get("go", "")
    return Library(name, folder, read_trained(folder), hf, vocab, facts, go_text, refusal, tuple(texts))


def as_trained(asked: Asked, library: Library) -> Asked:
    """The chat as training renders it: what the template does not write of functions is in the texts."""
    messages = [
        Message(turn["role"], turn["content"], tool_calls=_calls_of(turn) if turn.get("tool_calls") else None)
        for turn in asked.messages
    ]
    tools = None if asked.tools is None else json.dumps(list(asked.tools))
    return Asked(
        *conversation(make_record(source="s", messages=tuple(messages), tools=tools), library.trained.template)
    )


def _calls_of(turn: Mapping[str, Any]) -> str:
    return json.dumps([call["function"] for call in turn["tool_calls"]])


def trained_prompt(library: Library, asked: Asked) -> str:
    """The training template's text; raises jinja2.TemplateError where the family does not write such chats."""
    return library.trained.template.render(asked.messages, add_generation_prompt=True, tools=asked.tools).text


def engines(library: Library, chats: Sequence[Asked]) -> list[dict[str, list[int]]]:
    """The ids that each engine gives each chat; Go is left out where the template was refused."""
    facts = library.facts
    formatter = Jinja2ChatFormatter(facts.chat_template, eos_token=facts.eos_token, bos_token=facts.bos_token)
    given: list[dict[str, list[int]]] = []
    for asked in chats:
        messages, tools = list(asked.messages), asked.tools
        hf = library.hf.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        embedded = formatter(messages=messages, tools=tools).prompt
        given.append({"HF": list(hf), "GGUF": encode(library.vocab, embedded, add_bos=False)})
    if library.go_text is not None:
        requests = [GoRequest(system="", messages=list(asked.messages), tools=asked.tools or []) for asked in chats]
        prompts = render_go(tool_path(GOTEMPLATE), library.go_text, requests)
        for ids, prompt in zip(given, prompts, strict=True):
            ids["Go"] = encode(library.vocab, prompt, add_bos=True)
    return given


def equal_engines(library: Library, kind: str) -> list[str] | None:
    """The engines that are equal on every chat of the kind; None where the family does not write such chats."""
    chats, wanted = [], []
    for asked in KINDS[kind]:
        chat = as_trained(asked, library)
        try:
            text = trained_prompt(library, chat)
        except TemplateError:
            continue
        chats.append(chat)
        wanted.append(list(library.trained.tokenizer.encode(text, add_special_tokens=False).ids))
    # A kind that a family writes in part would make a cell of the matrix mean two things.
    assert len(chats) in (0, len(KINDS[kind])), f"{library.name} writes {len(chats)} chats of kind {kind}"
    if not chats:
        return None
    given = engines(library, chats)
    return [name for name in ENGINES if all(g.get(name) == w for g, w in zip(given, wanted, strict=True))]


def row_of(library: Library) -> dict[str, Any]:
    """What is recorded of a template: the equal engines of each kind, what is written as text, and the refusal."""
    template = library.trained.template
    by_itself = {"tools": writes_tools(template), "tool results": writes_tool_calls(template)}
    return {
        "kinds": {kind: equal_engines(library, kind) for kind in KINDS},
        "as text": [kind for kind, native in by_itself.items() if not native],
        "refusal": construct(library.refusal),
        "renderers": list(library.renderers),
    }


def construct(refusal: str) -> str:
    """The construct that a refusal names: its first line without the standing words and the example."""
    line = refusal.splitlines()[0] if refusal else ""
    return line.removeprefix("the chat template cannot be written as an Ollama TEMPLATE: ").split(": ")[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows = {name: row_of(library) for name, library in make_library(Path(place)).items()}
        MATRIX.write_text(json.dumps(rows, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
