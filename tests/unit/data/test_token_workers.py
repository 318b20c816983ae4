import json

import pytest
from pyarrow import parquet
from test_encoder import TEXTS, trained

from finetune.data.encoding import tokenizing
from finetune.data.encoding.token_workers import tokenize_file
from finetune.data.record import Message, make_record
from finetune.data.vocabulary.tokenizer_files import install_templates
from finetune.data_sections import Tokenize
from finetune.errors import DataError
from finetune.io import write_json

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
)
PARAMS = Tokenize(max_tokens=40, over_length="split", loss="assistant")


@pytest.fixture
def folder(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    trained().save(str(tokenizer / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|user|>"}
    write_json(tokenizer / "tokenizer_config.json", tokens)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    install_templates(tmp_path / "template.jinja", tokenizer)
    return tmp_path


def write_records(path, records):
    path.write_text("".join(json.dumps(record.to_row()) + "\n" for record in records))


def conversations(count):
    turns = (Message("user", TEXTS[0]), Message("assistant", TEXTS[1]))
    return [make_record(source="s", messages=(*turns, Message("user", str(at)), turns[1])) for at in range(count)]


def test_the_number_of_workers_changes_no_byte(folder, monkeypatch):
    monkeypatch.setattr(tokenizing, "RANGE_BYTES", 2_000)
    records = conversations(30)
    write_records(folder / "records.jsonl", records)
    contents = set()
    for workers in ("1", "2"):
        monkeypatch.setenv("FINETUNE_WORKERS", workers)
        totals = tokenize_file(folder / "records.jsonl", folder / "tokenizer", folder / "tokens.parquet", PARAMS)
        assert (totals.counts["s"].records_in, totals.slow_because) == (30, None)
        contents.add((folder / "tokens.parquet").read_bytes())
    assert len(contents) == 1
    names = parquet.read_table(folder / "tokens.parquet").column("id").to_pylist()
    assert names == [f"{record.id}#{at}" for record in records for at in (1, 2)] != sorted(names)


def test_when_nothing_is_left_the_file_stays_as_it_was(folder):
    write_records(folder / "records.jsonl", [make_record(source="s", text="a</s>b")])
    (folder / "tokens.parquet").write_bytes(b"before")
    with pytest.raises(DataError, match="nothing is left to train on"):
        tokenize_file(folder / "records.jsonl", folder / "tokenizer", folder / "tokens.parquet", PARAMS)
    assert (folder / "tokens.parquet").read_bytes() == b"before"
