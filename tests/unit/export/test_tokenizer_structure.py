"""What a tokenizer.json tells llama.cpp, and the tokenizers that it cannot follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import RULES, SPACES, TEMPLATE, write_byte_level, write_sentencepiece, write_vocabulary
from tokenizers import Tokenizer

from finetune.errors import DataError, ExportError
from finetune.export.converter import model_name, vocabulary_keys
from finetune.export.gguf_vocab import ends_generation, open_vocab
from finetune.export.tokenizer_structure import Structure, read_structure, splitting_rule
from finetune.export.vocabulary_proof import prove_vocabulary

Change = Callable[[dict[str, Any]], None]


def change(folder: Path, edit: Change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_each_splitting_rule_gives_the_ids_of_the_hostile_corpus(rule: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, rule)
    assert splitting_rule(tmp_path / "tokenizer.json") == rule
    write_vocabulary(tmp_path / "x.gguf", tmp_path, rule)
    assert prove_vocabulary(tmp_path, tmp_path / "x.gguf") > 200
    write_vocabulary(tmp_path / "x.gguf", tmp_path, "qwen35" if rule == "qwen2" else "qwen2")
    with pytest.raises(ExportError, match=r"has other token ids than in training:\n  tokenizer \[\d.*\n  GGUF      \["):
        prove_vocabulary(tmp_path, tmp_path / "x.gguf")


def test_a_gguf_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "one", "gpt-2")
    write_byte_level(tmp_path / "two", "qwen2")
    write_vocabulary(tmp_path / "x.gguf", tmp_path / "two", "qwen2")
    with pytest.raises(ExportError, match="has other token ids than in training") as caught:
        prove_vocabulary(tmp_path / "one", tmp_path / "x.gguf")
    assert "`dvc repro -f quantize_gguf`" in caught.value.remedy
    config = json.loads((tmp_path / "two/tokenizer_config.json").read_text())
    (tmp_path / "two/tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|done|>"}))
    with pytest.raises(ExportError, match=r"its eos_token is token 2, the tokenizer's is <\|done\|> \(5\)"):
        prove_vocabulary(tmp_path / "two", tmp_path / "x.gguf")


def test_two_tokens_that_changed_places_are_found(tmp_path: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["d"], vocabulary["l"] = vocabulary["l"], vocabulary["d"]

    write_byte_level(tmp_path, "gpt-2")
    write_vocabulary(tmp_path / "x.gguf", tmp_path, "gpt-2")
    change(tmp_path, swap)
    with pytest.raises(ExportError, match="has other token ids than in training"):
        prove_vocabulary(tmp_path, tmp_path / "x.gguf")


def test_what_the_tokenizer_adds_itself_is_compared(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2", add_bos=True)
    assert vocabulary_keys(tmp_path)["tokenizer.ggml.add_bos_token"] is True
    write_vocabulary(tmp_path / "x.gguf", tmp_path, "gpt-2")
    with pytest.raises(ExportError, match=r"the text '' has other token ids .*\n  tokenizer \[1\]\n  GGUF      \[\]"):
        prove_vocabulary(tmp_path, tmp_path / "x.gguf")


def test_llama_cpp_stops_at_the_end_of_a_turn_that_is_not_eos(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    keys = vocabulary_keys(tmp_path)
    assert keys["tokenizer.ggml.eot_token_id"] == 5
    write_vocabulary(tmp_path / "without.gguf", tmp_path, "gpt-2")
    write_vocabulary(tmp_path / "with.gguf", tmp_path, "gpt-2", tokenizer__ggml__eot_token_id=5)
    assert not ends_generation(open_vocab(tmp_path / "without.gguf"), "<|done|>")
    vocab = open_vocab(tmp_path / "with.gguf")
    assert [ends_generation(vocab, text) for text in ("<|done|>", "</s>", "<|user|>")] == [True, True, False]


def test_a_turn_that_ends_with_eos_needs_no_key_and_one_without_an_end_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    set_template(tmp_path, TEMPLATE.replace("'<|done|>'", "eos_token"))
    assert "tokenizer.ggml.eot_token_id" not in vocabulary_keys(tmp_path)
    set_template(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(DataError, match="does not write the assistant's content once"):
        vocabulary_keys(tmp_path)


@pytest.mark.parametrize("spaces", SPACES)
def test_where_sentencepiece_marks_a_space_is_read_from_the_structure(spaces: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, spaces)
    assert read_structure(tmp_path) == Structure("llama", spaces, strict_spaces=spaces != "beginning")
    keys = vocabulary_keys(tmp_path)
    assert keys["tokenizer.ggml.add_space_prefix"] is (spaces == "every piece")
    assert keys["tokenizer.ggml.add_bos_token"] is True
    # Without a special token before it, the prompt's own beginning gets the mark.
    set_template(tmp_path, TEMPLATE.replace("{{ bos_token }}", "Chat: "))
    assert vocabulary_keys(tmp_path)["tokenizer.ggml.add_space_prefix"] is (spaces != "nowhere")


def test_sentencepiece_without_its_model_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "every piece")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ExportError, match=r"a SentencePiece vocabulary without tokenizer\.model") as caught:
        read_structure(tmp_path)
    assert "a revision that has tokenizer.model" in caught.value.remedy


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def word_piece(content: dict[str, Any]) -> None:
    content["model"]["type"] = "WordPiece"


def two_splits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]}


def prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def skip_merges(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lowercase, "llama.cpp has no normalizer for a byte-level BPE: Lowercase"),
        (word_piece, "this is a WordPiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(edit: Change, what: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    change(tmp_path, edit)
    with pytest.raises(ExportError, match=what):
        read_structure(tmp_path)


@pytest.mark.parametrize("edit", [two_splits, prefix_space, skip_merges])
def test_a_splitting_rule_that_llama_cpp_does_not_have_is_refused(edit: Change, tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    change(tmp_path, edit)
    with pytest.raises(ExportError, match=r"llama\.cpp has no splitting rule like this tokenizer's"):
        splitting_rule(tmp_path / "tokenizer.json")


def test_other_marks_of_spaces_are_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "beginning")
    change(tmp_path, lowercase)
    with pytest.raises(ExportError, match=r"marks spaces otherwise than this tokenizer: normalizers \['Lowercase'\]"):
        read_structure(tmp_path)


def test_the_name_says_what_llama_cpp_strips_by_it(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "plain", "gpt-2")
    assert model_name("finetune-phi3_chat", tmp_path / "plain") == "finetune-phi 3_chat"
    assert model_name("finetune-Phi-3", tmp_path / "plain") == "finetune-Phi 3"
    assert model_name("smoke", tmp_path / "plain") == "smoke"
    write_sentencepiece(tmp_path / "phi", "every piece", rstrip=True)
    assert model_name("finetune-x", tmp_path / "phi") == "finetune-x phi-3"

    def strip_before(content: dict[str, Any]) -> None:
        content["added_tokens"][3]["lstrip"] = True

    change(tmp_path / "plain", strip_before)
    with pytest.raises(ExportError, match=r"cannot match these added tokens as the tokenizer does: <\|user\|>"):
        model_name("x", tmp_path / "plain")


def test_white_space_stripped_outside_phi_3_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")

    def strip_behind(content: dict[str, Any]) -> None:
        content["added_tokens"][5]["rstrip"] = True

    change(tmp_path, strip_behind)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("<|done|>  ").ids == [5]
    with pytest.raises(ExportError, match="rstrip outside the Phi-3 family"):
        model_name("x", tmp_path)
