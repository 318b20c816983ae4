"""chat_templates/: each template writes its family's format, and is served with the trained ids or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from template_families import FAMILIES, NAMES, Family, library_text
from template_matrix import MATRIX, Library, make_library, row_of
from template_prompts import (
    CALLED,
    HOURS,
    PADDED,
    SYSTEM,
    TALK,
    TRAINED,
    TRIMMED,
    TWO_CALLS,
    WITH_SYSTEM,
    WITH_TOOLS,
    WITHOUT_SYSTEM,
)

from finetune.chat_template import ChatTemplate, compile_template, serving_form, writes_tool_calls, writes_tools
from finetune.data.encoding.chat import check_stop_token, encode
from finetune.data.encoding.encoder import make_encoder
from finetune.data.vocabulary.tokenizer_files import install_templates, load_chat
from finetune.errors import ExportError
from finetune.export.parity import compare_prompts, require_parity
from finetune.export.parity_chats import parity_chats
from finetune.export.serving_checks import check_turn_end
from finetune.export.template import derive_template, go_template
from finetune.tools import GOTEMPLATE, tool_path

SURE = {"role": "assistant", "content": "Sure"}
WRITE_NO_SYSTEM = ["gemma_linear"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Library]:
    return make_library(tmp_path_factory.mktemp("library"))


def chat_of(name: str, source: str | None = None) -> ChatTemplate:
    return compile_template(source or library_text(name), FAMILIES[name].tokens(), f"chat_templates/{name}.jinja")


def prompt(name: str, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> str:
    return chat_of(name).render(messages, add_generation_prompt=True, tools=tools).text


def test_every_template_has_a_family_and_a_written_prompt() -> None:
    assert sorted(FAMILIES) == list(NAMES) == sorted(TRAINED)
    assert sorted({*WITH_SYSTEM, *WRITE_NO_SYSTEM}) == list(NAMES)


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_chat_is_written_in_the_familys_format(name: str) -> None:
    assert prompt(name, [SYSTEM, *TALK]) == WITH_SYSTEM[name]


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_chat_without_system_is_written_in_the_familys_format(name: str) -> None:
    assert prompt(name, TALK) == WITHOUT_SYSTEM[name]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_calls_and_results_are_written_in_the_familys_format(name: str) -> None:
    assert prompt(name, CALLED, [HOURS]) == WITH_TOOLS[name]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_neighbouring_calls_and_results_of_qwen_share_a_turn(name: str) -> None:
    call = '<tool_call>\n{"name": "hours", "arguments": {"day": "été"}}\n</tool_call>'
    result = "<tool_response>\n9 to 18\n</tool_response>"
    assert prompt(name, TWO_CALLS, [HOURS]).endswith(
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n<|im_start|>user\n{result}\n{result}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_white_space_around_a_message_is_kept_but_by_the_families_that_trim(name: str) -> None:
    text = prompt(name, PADDED)
    assert text == TRIMMED[name] if name in TRIMMED else "\n Hello  " in text


def test_qwen3_drops_earlier_thoughts_and_keeps_the_last() -> None:
    thought = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nGood day"}
    assert prompt("qwen3", [TALK[0], thought, TALK[2]]) == WITHOUT_SYSTEM["qwen3"]
    last = chat_of("qwen3").render([TALK[0], thought], add_generation_prompt=False).text
    assert last == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nGood day<|im_end|>\n"
    )


def test_phi3_writes_no_empty_system_message_and_ends_a_whole_chat_with_eos() -> None:
    empty = {"role": "system", "content": ""}
    assert prompt("phi3", [empty, TALK[0]]) == "<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert prompt("phi3_linear", [empty, TALK[0]]) == "<|system|>\n<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n"
    whole = chat_of("phi3").render(TALK[:2], add_generation_prompt=False).text
    assert whole == "<|user|>\nHello<|end|>\n<|assistant|>\nGood day<|end|>\n<|endoftext|>"


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_and_its_stop_are_trained_and_nothing_else(name: str) -> None:
    rendered = chat_of(name).render([*TALK, SURE], add_generation_prompt=False)
    assert [rendered.text[start:end] for start, end in rendered.spans] == TRAINED[name]
    # Phi-3's <|end|> takes the line break after it into its token: both are trained, or neither.
    assert all(text.removesuffix("\n").endswith(FAMILIES[name].turn_end) for text in TRAINED[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_stop_is_trained_as_one_token(made: dict[str, Library], name: str) -> None:
    chat = load_chat(made[name].folder)
    rendered = chat.template.render([*TALK, SURE], add_generation_prompt=False)
    encoded = encode(rendered, make_encoder(chat.tokenizer), "assistant")
    check_stop_token(rendered, encoded, chat, name, "assistant")
    assert chat.stop == (FAMILIES[name].turn_end, chat.tokenizer.token_to_id(FAMILIES[name].turn_end))
    assert encoded.input_ids[encoded.trained].tolist().count(chat.stop[1]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_stage_installs_it(made: dict[str, Library], name: str, tmp_path: Path) -> None:
    tokens = made[name].trained.template.tokens
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokens)), encoding="utf-8")
    install_templates(Path(f"chat_templates/{name}.jinja"), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == serving_form(library_text(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_is_what_is_computed(made: dict[str, Library], name: str) -> None:
    assert row_of(made[name]) == json.loads(MATRIX.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_of_transformers_is_ours(made: dict[str, Library], name: str) -> None:
    library = made[name]
    chats: list[tuple[Any, Any]] = [(TALK, None)]
    if name in WITH_SYSTEM:
        chats.append(([SYSTEM, *TALK], None))
    if name in WITH_TOOLS:
        chats.append((CALLED, [HOURS]))
    for messages, tools in chats:
        theirs = library.hf.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        assert theirs == prompt(name, messages, tools)


def passes(library: Library) -> bool:
    return library.go_text is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_passes_what_is_linear(made: dict[str, Library], name: str) -> None:
    library, served = made[name], passes(made[name])
    template = chat_of(name)
    roles = derive_template(template).role_names() if served else ["user", "assistant"]
    chats = parity_chats(
        roles, "", tools=served and writes_tools(template), tool_calls=served and writes_tool_calls(template)
    )
    text, program = library.go_text or NO_GO, tool_path(GOTEMPLATE)
    report = compare_prompts(chats, library.trained, library.vocab, library.facts, text, program)
    assert (report.equal_embedded, report.equal_ollama) == (len(chats), len(chats) if served else 0)
    if served:
        require_parity(report, Path(name))


# A TEMPLATE that is valid and writes nothing, where there is none to compare.
NO_GO = "{{ range .Messages }}{{ end }}"


@pytest.mark.parametrize("name", NAMES)
def test_generation_ends_where_the_template_ends_a_turn(made: dict[str, Library], name: str) -> None:
    library, family = made[name], FAMILIES[name]
    assert check_turn_end(library.vocab, library.facts, chat_of(name), Path(name)) == family.turn_end
    endless = chat_of(name, other_stop(library_text(name), replace(family, pad="<|done|>")))
    with pytest.raises(ExportError, match="answers would never stop"):
        check_turn_end(library.vocab, library.facts, endless, Path(name))


def newline(source: str, family: Family) -> str:
    """A newline before each end of a turn."""
    if family.turn_end in source:
        return source.replace(family.turn_end, "\\n" + family.turn_end)
    return source.replace("eos_token", "'\\n' + eos_token")


def without_bos(source: str, family: Family) -> str:
    return source.replace("{{- bos_token -}}\n", "")


def with_two_bos(source: str, family: Family) -> str:
    """One BOS more than the family writes."""
    return f"{{{{- '{family.bos or family.pad}' -}}}}\n{source}"


def other_stop(source: str, family: Family) -> str:
    return source.replace(family.turn_end, family.pad).replace("eos_token", f"'{family.pad}'")


def swapped_roles(source: str, family: Family) -> str:
    other = {"user": "assistant", "assistant": "user", "model": "user"}
    return re.sub(r"\b(user|assistant|model)\b", lambda found: other[found[1]], source)


MUTATIONS: dict[str, Callable[[str, Family], str]] = {
    "a newline more": newline,
    "BOS missing": without_bos,
    "BOS doubled": with_two_bos,
    "another stop": other_stop,
    "roles swapped": swapped_roles,
}
# Families whose prompts begin without BOS: there is none to leave out.
WRITE_NO_BOS = {"chatml", "chatml_tools", "phi3", "phi3_linear", "phi4", "qwen2", "qwen3"}


def caught_in_the_gguf(library: Library, source: str) -> bool:
    """Whether the gate fails when the GGUF holds this template instead of the trained one."""
    chats = parity_chats(["user", "assistant"], "")
    facts = replace(library.facts, chat_template=serving_form(source))
    go_text = library.go_text or NO_GO
    try:
        report = compare_prompts(chats, library.trained, library.vocab, facts, go_text, tool_path(GOTEMPLATE))
    except ExportError:
        return True  # It refuses a chat that training accepts.
    return report.equal_embedded < len(chats)


def caught_in_go(library: Library, source: str) -> bool:
    """Whether a TEMPLATE made from this template is refused, or fails the gate."""
    chats = parity_chats(["user", "assistant"], "")
    try:
        linear = derive_template(chat_of(library.name, source))
        text = go_template(linear, add_bos=library.facts.add_bos)
    except ExportError:
        return True
    report = compare_prompts(chats, library.trained, library.vocab, library.facts, text, tool_path(GOTEMPLATE))
    return report.equal_ollama < len(chats)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_template_is_caught(made: dict[str, Library], name: str, mutation: str) -> None:
    library, source = made[name], library_text(name)
    mutated = MUTATIONS[mutation](source, FAMILIES[name])
    if mutation == "BOS missing" and name in WRITE_NO_BOS:
        assert mutated == source
        return
    assert mutated != source
    assert caught_in_the_gguf(library, mutated)
    assert caught_in_go(library, mutated)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_itself_is_not_caught(made: dict[str, Library], name: str) -> None:
    assert not caught_in_the_gguf(made[name], library_text(name))
    assert caught_in_go(made[name], library_text(name)) == (not passes(made[name]))
