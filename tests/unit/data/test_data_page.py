"""The data page: bars, examples, and texts that must not become part of the page."""

import json

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from finetune.data.report import Bar, encoding_bars, first_rows, funnel_bars, histograms, share_bars, write_report
from finetune.data.report.masks import mask_examples, pieces
from finetune.data.tables import TOKENS, write_parquet
from finetune.data.vocabulary.bpe import train
from finetune.data_sections import TrainTokenizer
from finetune.io import write_csv, write_json, write_jsonl

SCRIPT = "<script>alert('é')</script>"
CLEAN = {
    "rows_in": 10,
    "kept": 4,
    "dropped": {"retweet": 2, "link_only": 0},
    "duplicates": 1,
    "near_duplicates": 1,
    "quarantined": {"broken_json": 2},
    "languages": {"fr": 3, "en": 1},
}
TOKENIZED = {"records_in": 4, "kept": 3, "dropped": {"over_length": 1}, "truncated": 0, "split": 1}
MIXED = {"requested_share": 0.5, "obtained_share": 0.501, "rows": 3, "distinct_rows": 3, "tokens": 9, "max_repeats": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    section = TrainTokenizer(
        strategy="train",
        chat_template="t",
        vocab_size=300,
        min_frequency=1,
        max_words=10_000,
        corpus=None,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=None,
        role_markers=["<|user|>"],
        special_tokens=[],
    )
    return train(["bonjour le monde"], section)


def row(tokenizer, source, text, answer):
    asked, answered = (tokenizer.encode(part).ids for part in (text, answer))
    content = {"input_ids": asked + answered, "trained": [False] * len(asked) + [True] * len(answered)}
    return {"id": f"{source} {text}", "source": source, "group": source, "language": "fr", **content}


def test_a_funnel_begins_with_what_came_in_and_ends_with_what_was_kept():
    assert funnel_bars(CLEAN) == [
        Bar("rows in", "10", 1.0, "in"),
        Bar("quarantined: broken_json", "2", 0.2, "lost"),
        Bar("dropped: retweet", "2", 0.2, "lost"),
        Bar("duplicates", "1", 0.1, "lost"),
        Bar("near-duplicates", "1", 0.1, "lost"),
        Bar("kept", "4", 0.4, "kept"),
    ]


def test_what_is_too_long_is_a_bar_too():
    assert [(bar.label, bar.value) for bar in encoding_bars(TOKENIZED)] == [
        ("records in", "4"),
        ("dropped: over_length", "1"),
        ("split", "1"),
        ("encoded", "3"),
    ]


def test_shares_and_lengths():
    assert share_bars({"en": 1, "fr": 3}, "kept") == [
        Bar("fr", "3 (75.0%)", 1.0, "kept"),
        Bar("en", "1 (25.0%)", 1 / 3, "kept"),
    ]
    bins = [{"source": "a", "upper_bound_tokens": bound, "rows": rows} for bound, rows in (("64", "2"), ("32", "4"))]
    assert histograms(bins) == {"a": [Bar("up to 32", "4", 1.0, "kept"), Bar("up to 64", "2", 0.5, "kept")]}


def test_a_character_of_several_tokens_is_one_piece_and_masks_never_share_one(tokenizer):
    example = row(tokenizer, "a", "<|user|>été ", "🧠</s>")
    found = list(pieces(example["input_ids"], example["trained"], tokenizer))
    assert "".join(piece.text for piece in found) == "<|user|>été 🧠</s>"
    assert "".join(piece.text for piece in found if piece.trained) == "🧠</s>"
    assert [piece.text for piece in found][-2:] == ["🧠", "</s>"]
    assert len(found[-2].ids) == 4


def test_examples_take_the_sources_in_turn(tokenizer):
    rows = [row(tokenizer, source, text, "x") for source in "ab" for text in ("1", "2", "3")]
    taken = first_rows([pa.RecordBatch.from_pylist(rows[:4]), pa.RecordBatch.from_pylist(rows[4:])], 2)
    assert [example["id"] for example in taken] == ["a 1", "a 2", "b 1", "b 2"]
    assert [example.id for example in mask_examples(taken, tokenizer, 3)] == ["a 1", "b 1", "a 2"]


def test_a_page_shows_texts_and_runs_none(tmp_path, tokenizer):
    metrics = {
        "fetch": {"files": 1},
        "clean": {**CLEAN, "sources": {"a": CLEAN}},
        "tokenizer": {"vocab_size": 300, "held_out": {}},
        "tokenize": {
            **TOKENIZED,
            "tokens": 9,
            "trained_tokens": 5,
            "sources": {"a": {**TOKENIZED, "tokens": 0, "trained_tokens": 0}},
        },
        "split": {
            "splits": {},
            "sources": {
                "a": {name: {"rows": 1, "share": 0.25} for name in ("train", "validation", "test", "left_out")}
            },
            "mix": {"sources": {"a": MIXED}},
        },
    }
    for stage, numbers in metrics.items():
        write_json(tmp_path / f"{stage}.json", numbers)
    where = {"file": f"a/{SCRIPT}.jsonl", "line": 3}
    write_jsonl(tmp_path / "quarantine.jsonl", [{**where, "reason": "broken_json", "detail": SCRIPT}])
    write_jsonl(tmp_path / "dropped.jsonl", [{**where, "reason": "retweet", "jaccard": None, "kept_id": None}])
    original = {"text": SCRIPT, "messages": []}
    write_jsonl(tmp_path / "repaired.jsonl", [{**where, "repaired_id": "f" * 64, "original": original}])
    write_csv(tmp_path / "lengths.csv", ("source", "upper_bound_tokens", "rows"), [("a", 32, 4)])
    (tmp_path / "trained.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_parquet(tmp_path / "mini.parquet", [row(tokenizer, "a", SCRIPT, SCRIPT)], TOKENS)
    files = {"clean": tmp_path, "lengths": tmp_path / "lengths.csv", "tokenizer": tmp_path / "trained.json"}
    paths = {stage: tmp_path / f"{stage}.json" for stage in metrics}
    write_report(tmp_path / "report", metrics=paths, mini_train=tmp_path / "mini.parquet", **files)
    index, masks = ((tmp_path / "report" / name).read_text(encoding="utf-8") for name in ("index.html", "masks.html"))
    for page in (index, masks):
        assert "<script" not in page
        assert "http" not in page
    assert "a/&lt;script&gt;" in index
    assert "10 rows in = 4 kept" in " ".join(index.split())
    assert "50.1 %" in index
    assert json.dumps("over_length") not in index
    assert "dropped: over_length" in index
    assert 'class="piece trained"' in masks
