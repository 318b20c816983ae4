"""The text that a scratch base is pre-trained on: as much as its steps need, whatever the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.record import Record, make_record
from finetune.data.splits import assign
from finetune.errors import DataError
from finetune.io import read_json, write_json, write_jsonl
from finetune.sections import Base, ScratchModel
from finetune.stages import base
from finetune.training.pretrain import BYTES_PER_TOKEN, choose_texts, to_rows

SHAPE = ScratchModel(
    hidden_size=256,
    intermediate_size=256,
    layers=1,
    attention_heads=2,
    key_value_heads=1,
    max_position_tokens=64,
    tie_embeddings=True,
    pretrain_steps=1,
    batch_rows=100,
    row_tokens=4,
    learning_rate=1e-3,
)
SHARES = {"validation_share": 0.3, "test_share": 0.3}


def records(count: int) -> list[Record]:
    return [make_record(source="chat", text=f"texte {number} " + "é" * 40) for number in range(count)]


def test_texts_are_joined_between_bos_and_eos_and_the_tail_is_left_out(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = to_rows(["a b", "c", "d e f g"], tiny_tokenizer, 4, tmp_path)
    assert rows.tolist() == [[1, 3, 4, 2], [1, 5, 2, 1], [6, 7, 8, 9]]
    assert rows.dtype == torch.int32
    assert not list(tmp_path.iterdir())


def test_many_texts_give_the_rows_that_each_alone_gives(tiny_tokenizer: Any, tmp_path: Path) -> None:
    texts = ["abc"[: 1 + number % 3].replace("", " ") for number in range(700)]
    alone = [token for text in texts for token in (1, *tiny_tokenizer(text)["input_ids"], 2)]
    assert to_rows(iter(texts), tiny_tokenizer, 1, tmp_path).flatten().tolist() == alone


def test_too_little_text_is_an_error(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 tokens of text do not fill one row of 4"):
        to_rows(["a"], tiny_tokenizer, 4, tmp_path)


def test_a_small_text_is_used_whole_and_in_its_order() -> None:
    some = records(50)
    assert list(choose_texts(lambda: some, 10**6)) == [record.all_text() for record in some]


def test_of_a_large_text_as_much_is_chosen_as_the_steps_need() -> None:
    some = records(5000)
    chosen = list(choose_texts(lambda: some, 1000))
    sizes_bytes = [len(text.encode("utf-8")) for text in chosen]
    assert 1000 * BYTES_PER_TOKEN <= sum(sizes_bytes) < 1000 * BYTES_PER_TOKEN + 3 * max(sizes_bytes)
    # Chosen by the hash of the id: another order chooses the same, less is the beginning of more.
    assert sorted(choose_texts(lambda: reversed(some), 1000)) == sorted(chosen)
    assert set(choose_texts(lambda: some, 500)) < set(chosen)
    position = {record.all_text(): number for number, record in enumerate(some)}
    assert [position[text] for text in chosen] == sorted(position[text] for text in chosen)


def test_the_stage_reads_the_training_share_and_the_corpus_of_the_tokenizer(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    some = [make_record(source="chat", text=f"a {letter}") for letter in "bcdefghijklmnopqrstuvwxyz"]
    corpus = [make_record(source="web", text="z z z z z z z z z z")]
    write_jsonl(tmp_path / "clean/records.jsonl", (record.to_row() for record in some))
    write_json(tmp_path / "manifest.json", {"kind": "scratch"})
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    learned = [record for record in some if assign(record.group, 0.3, 0.3) == "train"]
    assert 0 < len(learned) < len(some)

    def text_tokens() -> int:
        paths = (tmp_path / "clean", tmp_path / "manifest.json", tmp_path / "tokenizer")
        out = (tmp_path / "base", tmp_path / "base.json")
        base.run(*paths, *out, seed=1, cpu_threads=1, base=Base(scratch=SHAPE), **SHARES)
        tokens: int = read_json(tmp_path / "base.json")["text_tokens"]
        return tokens

    # "a b" makes four tokens with BOS and EOS, the corpus twelve.
    assert text_tokens() == 4 * len(learned)
    write_jsonl(tmp_path / "clean/corpus.jsonl", [])
    assert text_tokens() == 4 * len(learned)
    write_jsonl(tmp_path / "clean/corpus.jsonl", (record.to_row() for record in corpus))
    assert text_tokens() == 4 * len(learned) + 12
