"""The tokenizer stage as DVC runs it, for a kept, an extended and a trained tokenizer."""

import json

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from finetune.data.fetching.hub import Repo
from finetune.data.record import Message, make_record
from finetune.data.splits import assign
from finetune.data.vocabulary.bpe import train
from finetune.data_sections import ExtendTokenizer, KeepTokenizer, NewToken, TrainTokenizer
from finetune.errors import DataError
from finetune.io import read_json, sha256_tree, write_json, write_text
from finetune.stages import tokenizer

SPLIT = {"validation_share": 0.2, "test_share": 0.2, "pack_tokens": 64}
TRAINED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained(**changes):
    sections = {"chat_template": "t", "vocab_size": 300, "min_frequency": 1, "max_words": 10_000, "corpus": None}
    tokens = {"role_markers": ["<user>", "<assistant>"], "special_tokens": ["<search>", "</search>"]}
    return TrainTokenizer(**{"strategy": "train", **sections, **TRAINED, **tokens, **changes})


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Clean text, a template, and in the Hub cache a base whose only special token ends a text, as GPT-2's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = Repo("team/base", "model", "0" * 40)
    snapshot = tmp_path / "hub" / "models--team--base" / "snapshots" / repo.revision
    base = train(["le vélo est bleu"] * 4, trained())
    write_text(snapshot / "tokenizer.json", base.to_str().replace("<pad>", "<zero>").replace("<unk>", "<three>"))
    write_json(snapshot / "tokenizer_config.json", {"bos_token": "</s>", "eos_token": "</s>"})
    write_json(snapshot / "config.json", {"vocab_size": base.get_vocab_size()})
    files = [{"path": name} for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    manifest = {"kind": "hub", "repo_id": repo.repo_id, "revision": repo.revision, "files": files}
    write_json(tmp_path / "base_manifest.json", manifest)
    write_text(tmp_path / "template.jinja", TEMPLATE)
    chats = [
        make_record(source="chat", messages=(Message("user", f"{n} ?"), Message("assistant", "le vélo")), language="fr")
        for n in range(50)
    ]
    web = [make_record(source="web", text=f"the blue bike number {n}", language="en") for n in range(50)]
    for name, records in (("records", chats), ("corpus", web)):
        lines = [json.dumps(record.to_row(), sort_keys=True) + "\n" for record in records]
        write_text(tmp_path / "clean" / f"{name}.jsonl", "".join(lines))
    return tmp_path


def run(work, section):
    own = section.model_copy(update={"chat_template": str(work / "template.jinja")})
    paths = (work / "clean", work / "base_manifest.json", work / "tokenizer", work / "metrics.json")
    tokenizer.run(*paths, tokenizer=own, **SPLIT)
    return read_json(work / "metrics.json")


def test_a_trained_one_reports_its_text_its_markers_and_its_cost(work):
    numbers = run(work, trained())
    learned = sum(assign(record["group"], 0.2, 0.2) == "train" for record in rows(work, "records"))
    assert numbers["trained_on_records"] == learned
    assert numbers["special_ids"] == {"bos": 1, "eos": 2, "pad": 0}
    counts = {entry["marker"]: entry["tokens"] for entry in numbers["markers"]}
    assert counts == {"</s>": 1, "<assistant>": 1, "<s>": 1, "<system>": 8, "<tool>": 6, "<user>": 1}
    assert numbers["role_markers"] == 2
    assert numbers["held_out"]["fr"]["records"] == 50 - learned
    assert numbers["held_out_by_base"] is None
    assert numbers["words"]["forgotten_occurrences"] == 0
    loaded = AutoTokenizer.from_pretrained(str(work / "tokenizer"))
    assert loaded.convert_tokens_to_ids(["<unk>", "<user>", "<assistant>", "<search>", "</search>"]) == [3, 4, 5, 6, 7]
    before = sha256_tree(work / "tokenizer")
    run(work, trained())
    assert sha256_tree(work / "tokenizer") == before


def test_a_corpus_takes_text_for_the_tokenizer_in_its_shares(work):
    numbers = run(work, trained(corpus={"chat": 0.5, "web": 0.5}))
    assert numbers["obtained_shares"]["web"] == pytest.approx(0.5, abs=0.05)
    assert sorted(numbers["held_out"]) == ["en", "fr"]


def test_a_kept_one_without_a_pad_token_is_refused_and_an_added_one_pads(work):
    with pytest.raises(DataError, match="no token to pad with"):
        run(work, KeepTokenizer(strategy="keep", chat_template="t"))
    added = [
        NewToken(text="<|pad|>", place="add", reserved=None),
        NewToken(text="<call>", place="reserved", reserved="<search>"),
        NewToken(text="<bot>", place="text", reserved=None),
    ]
    numbers = run(work, ExtendTokenizer(strategy="extend", chat_template="t", tokens=added))
    size = numbers["vocab_size"]
    assert numbers["special_ids"] == {"bos": 2, "eos": 2, "pad": size - 1}
    assert numbers["new_tokens"]["<bot>"] == {"place": "text", "tokens_before": 5, "tokens": 5}
    assert numbers["held_out_by_base"] == numbers["held_out"]
    assert read_json(work / "tokenizer/extension.json") == {
        "trained_rows": {"<call>": 6, "<|pad|>": size - 1},
        "rows_before": size - 1,
        "rows_after": size,
    }
    assert (numbers["role_markers"], numbers["trained_on_records"]) == (0, 0)


def rows(work, name):
    lines = (work / "clean" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
