import json

import pytest
from test_bpe import PARAMS

from finetune.data.encoding import tokenizing
from finetune.data.record import make_record
from finetune.data.vocabulary import tokenizer_corpus
from finetune.data.vocabulary.tokenizer_corpus import Range, is_learned, survey, training_words, with_quotas
from finetune.data_sections import Split
from finetune.errors import DataError

SPLIT = Split(validation_share=0.1, test_share=0.1, mini_train_rows=4, pack_tokens=64, mix=None)


def write_records(path, source, texts, language=None):
    rows = [make_record(source=source, text=text, language=language).to_row() for text in texts]
    with path.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return path


@pytest.fixture
def files(tmp_path):
    chats = write_records(tmp_path / "records.jsonl", "chats", [f"le vélo {n:04}" for n in range(100)], "fr")
    web = write_records(tmp_path / "corpus.jsonl", "web_en", [f"the bike is number {n:04}" for n in range(400)], "en")
    write_records(web, "web_fr", [f"le vélo est numéro {n:04}" for n in range(400)])
    return [chats, web]


def words_of(counts):
    names = [bytes(counts.data[a:b]).decode() for a, b in zip(counts.offsets, counts.offsets[1:], strict=False)]
    return dict(zip(names, counts.counts.tolist(), strict=True))


def test_the_training_share_is_counted_and_the_rest_is_held_out_by_language(files):
    found = survey(files, SPLIT)
    counts, learned = training_words(found, PARAMS, SPLIT)
    held_out = {language: len(texts) for language, texts in found.held_out.items()}
    assert sorted(held_out) == ["en", "fr", "unknown"]
    assert learned.records + sum(held_out.values()) == 900
    words = words_of(counts)
    assert (words[" vélo"], words[" bike"]) == (
        800 - 0 - held_out["fr"] - held_out["unknown"] - 300,
        400 - held_out["en"],
    )
    assert learned.bytes_by_source["web_en"] == words[" bike"] * len("the bike is number 0000")


def test_only_records_in_the_training_share_are_learned(files):
    record = make_record(source="chats", text="le vélo 0000")
    assert is_learned(record, SPLIT) == (tokenizer_corpus.assign(record.group, 0.1, 0.1) == "train")


def test_sources_stand_in_their_shares_of_the_bytes_until_one_has_no_more(files):
    found = survey(files, SPLIT)
    params = PARAMS.model_copy(update={"corpus": {"chats": 0.25, "web_en": 0.45, "web_fr": 0.3}})
    counts, learned = training_words(found, params, SPLIT)
    total = learned.bytes_by_source.total()
    # Within one record of the exact share; the first to run out is taken whole.
    assert learned.bytes_by_source["chats"] == sum(part["chats"] for part in found.available)
    for source, share in params.corpus.items():
        assert abs(learned.bytes_by_source[source] - share * total) <= 60
    assert words_of(counts)[" bike"] == learned.bytes_by_source["web_en"] // 23


def test_a_source_of_share_one_is_taken_alone_and_whole(files):
    found = survey(files, SPLIT)
    _, learned = training_words(found, PARAMS.model_copy(update={"corpus": {"web_fr": 1}}), SPLIT)
    assert dict(learned.bytes_by_source) == {"web_fr": sum(part["web_fr"] for part in found.available)}


def test_a_quota_ends_in_the_range_where_the_share_is_reached(tmp_path):
    ranges = [Range(tmp_path, at, at + 1) for at in range(4)]
    available = [{"a": 100}, {"a": 100, "b": 30}, {"b": 60}, {"a": 10}]
    quotas = [place.quotas for place in with_quotas(ranges, available, {"a": 0.6, "b": 0.4})]
    assert quotas == [{"a": 100, "b": 0}, {"a": 35, "b": 30}, {"a": 0, "b": 60}]


def test_a_source_without_text_and_an_empty_share_are_refused(files, tmp_path):
    with pytest.raises(DataError, match="no training text of web_de"):
        training_words(survey(files, SPLIT), PARAMS.model_copy(update={"corpus": {"web_de": 1}}), SPLIT)
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(DataError, match="no training text"):
        training_words(survey([tmp_path / "none.jsonl"], SPLIT), PARAMS, SPLIT)
    with pytest.raises(DataError, match="file is missing"):
        survey([tmp_path / "absent.jsonl"], SPLIT)


def test_held_out_text_of_a_language_is_bounded(files):
    held_out = survey(files, SPLIT, characters=30).held_out
    assert {language: len(texts) for language, texts in held_out.items()} == {"fr": 3, "en": 2, "unknown": 2}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_small_ranges_and_several_processes_count_the_same(files, workers, monkeypatch):
    params = PARAMS.model_copy(update={"corpus": {"chats": 0.25, "web_en": 0.45, "web_fr": 0.3}})
    expected, learned = training_words(survey(files, SPLIT), params, SPLIT)
    monkeypatch.setattr(tokenizing, "RANGE_BYTES", 5_000)
    monkeypatch.setattr(tokenizer_corpus, "BLOCK_BYTES", 8_000)
    monkeypatch.setattr(tokenizer_corpus, "PARALLEL_BYTES", 0)
    monkeypatch.setenv("FINETUNE_WORKERS", workers)
    found = survey(files, SPLIT)
    counts, again = training_words(found, params, SPLIT)
    assert len(found.ranges) > 20
    assert again == learned
    assert words_of(counts) == words_of(expected)
