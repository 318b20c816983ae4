import random
from collections import Counter

import pytest
from clean_runs import chat, groups_of, run_clean, source_of, split_of

from finetune.errors import DataError
from finetune.io import sha256_tree

LANGUAGES = {"languages": None}
WORDS = [f"{first}{second}" for first in ("ba", "ce", "di", "fo", "gu", "lé") for second in ("", *"bcdfglmnprstvx")]


def text_of(sampler, words):
    return " ".join(f"{sampler.choice(WORDS)}{sampler.choice(WORDS)}" for _ in range(words))


def shingle_set(*texts):
    words = " ".join(texts).casefold().split()
    return {" ".join(words[place : place + 5]) for place in range(len(words) - 4)}


def jaccard(left, right):
    return len(left & right) / len(left | right)


def planted_rows(seed, count):
    """Chat rows, and for each planted duplicate (row number -> row number of its original)."""
    sampler = random.Random(seed)  # noqa: S311
    rows = [chat(text_of(sampler, 12), text_of(sampler, sampler.randint(60, 200))) for _ in range(count)]
    originals = {}
    for original in sampler.sample(range(count), count // 10):
        question, answer = (turn["content"] for turn in rows[original]["messages"])
        if sampler.random() < 0.5:
            answer = f"  {answer.upper()} ".replace(" ", "  ", 3)
        else:
            words = answer.split()
            for place in sampler.sample(range(len(words)), max(1, len(words) // 60)):
                words[place] = "changed"
            answer = " ".join(words)
        originals[len(rows)] = original
        rows.append(chat(question, answer))
    return rows, originals


def test_planted_duplicates_are_found_and_nothing_else_goes(tmp_path):
    rows, originals = planted_rows(1, 3000)
    run = run_clean(tmp_path, {"a": rows}, **LANGUAGES)
    kept = {tuple(turn["content"] for turn in record["messages"]) for record in run.rows()}
    gone = {number for number, row in enumerate(rows) if tuple(turn["content"] for turn in row["messages"]) not in kept}
    sets = {
        number: shingle_set(*(turn["content"] for turn in rows[number]["messages"]))
        for pair in originals.items()
        for number in pair
    }
    similar = {copy for copy, original in originals.items() if jaccard(sets[copy], sets[original]) >= 0.8}
    assert len(originals) == 300
    assert len(similar) > 280
    found = {copy for copy in similar if copy in gone or originals[copy] in gone}
    rightly = {number for number in gone if number in similar or any(originals[copy] == number for copy in similar)}
    assert len(found) / len(similar) >= 0.98
    assert len(rightly) / len(gone) >= 0.98
    assert run.numbers()["rows_in"] == 3300


def test_no_two_kept_records_are_equal_or_near_whatever_their_split(tmp_path):
    rows, _ = planted_rows(2, 600)
    run = run_clean(tmp_path, {"a": rows[:330], "b": rows[330:]}, **LANGUAGES)
    sets = [shingle_set(*(turn["content"] for turn in record["messages"])) for record in run.rows()]
    assert max(jaccard(left, right) for place, left in enumerate(sets) for right in sets[:place]) < 0.8


def test_planted_contamination_is_found_and_nothing_else_goes(tmp_path):
    sampler = random.Random(3)  # noqa: S311
    groups = [f"g{number}" for number in range(2000)]
    rows = [chat(text_of(sampler, 20), text_of(sampler, 100), group=group) for group in groups]
    tests = [chat(text_of(sampler, 25), text_of(sampler, 4)) for _ in range(100)]
    held_out = [row for row in rows if split_of(row["group"]) != "train"]
    train = [row for row in rows if split_of(row["group"]) == "train"]
    planted = {}
    for row in sampler.sample(train, 200):
        kind, origin = sampler.choice([("held_out", held_out), ("quiz", tests)])
        words = sampler.choice(origin)["messages"][0]["content"].split()
        start = sampler.randrange(len(words) - 12)
        passage = ", ".join(words[start : start + 13]).capitalize()
        row["messages"][1]["content"] += f" said «{passage}»"
        planted[row["group"]] = f"contaminated_by_{kind}"
    sources = [source_of("a"), source_of("quiz", use="decontamination")]
    run = run_clean(tmp_path, {"a": rows, "quiz": tests}, sources, **LANGUAGES)
    found = {rows[line - 1]["group"]: row["reason"] for (file, line), row in run.dropped().items()}
    assert found == planted
    assert Counter(planted.values()) == run.numbers()["dropped"]
    assert run.numbers()["sources"]["quiz"]["kept"] == 100
    assert {record["source"] for record in run.rows()} == {"a"}


def test_every_row_is_counted_once_and_the_outs_say_where_it_went(tmp_path):
    near = " ".join(f"word{number}" for number in range(20))
    first, second, third, fourth = groups_of("train", 4)
    rows = [
        chat("Question?", "An answer of some words", group=first),
        chat("question?", "an  ANSWER of some words", group=second),
        b"{broken",
        chat("Question?", "x"),
        chat("Count!", near, group=third),
        chat("Count!", f"{near} one", group=fourth),
    ]
    run = run_clean(tmp_path, {"a": rows}, **LANGUAGES, max_quarantined_share=0.5)
    ids = [record["id"] for record in run.rows()]
    numbers = run.numbers()
    assert {name: numbers[name] for name in ("rows_in", "kept", "duplicates", "near_duplicates")} == {
        "rows_in": 6,
        "kept": 2,
        "duplicates": 1,
        "near_duplicates": 1,
    }
    assert (numbers["dropped"], numbers["quarantined"]) == ({"answer_too_short": 1}, {"broken_json": 1})
    assert numbers["languages"] == {"en": 2}
    dropped = run.rows("dropped")
    assert [(row["line"], row["reason"], row["jaccard"]) for row in dropped] == [
        (2, "duplicate", None),
        (4, "answer_too_short", None),
        (6, "near_duplicate", 0.9444),
    ]
    assert [row["kept_id"] for row in dropped] == [ids[0], None, ids[1]]
    assert [row["reason"] for row in run.rows("quarantine")] == ["broken_json"]
    assert (tmp_path / "funnel.csv").read_text(encoding="utf-8").splitlines() == [
        "source,step,rows",
        "a,rows_in,6",
        "a,quarantined_broken_json,1",
        "a,dropped_answer_too_short,1",
        "a,duplicates,1",
        "a,near_duplicates,1",
        "a,kept,2",
    ]
    assert not (tmp_path / "clean/.scratch").exists()


def test_the_held_out_copy_stays_and_among_equals_the_first(tmp_path):
    (test_group,) = groups_of("test", 1)
    (validation_group,) = groups_of("validation", 1)
    *trained, third = groups_of("train", 3)
    other = chat("Something else?", "Another answer", group=third)
    answer = "The very same answer in all of the rows"
    groups = [trained[0], validation_group, trained[1], test_group]
    run = run_clean(tmp_path, {"a": [chat("Well?", answer, group=group) for group in groups] + [other]}, **LANGUAGES)
    assert [record["group"] for record in run.rows()] == [f"a/{test_group}", f"a/{third}"]
    run = run_clean(tmp_path, {"a": [chat("Well?", answer, group=group) for group in trained]}, **LANGUAGES)
    assert [record["group"] for record in run.rows()] == [f"a/{trained[0]}"]


def test_growing_a_source_moves_no_record_to_another_split(tmp_path):
    rows, _ = planted_rows(4, 400)
    for number, row in enumerate(rows):
        row["group"] = f"g{number % 300}"
    before = run_clean(tmp_path / "small", {"a": rows[:200]}, **LANGUAGES)
    after = run_clean(tmp_path / "grown", {"a": rows}, **LANGUAGES)
    held_out = {record["id"] for record in before.rows() if split_of(record["group"][2:]) == "test"}
    still = {record["id"]: split_of(record["group"][2:]) for record in after.rows()}
    moved = [identity for identity in held_out if still.get(identity, "test") != "test"]
    assert moved == []
    assert len(held_out & still.keys()) > 15


@pytest.mark.parametrize("chunk_bytes", [3_000, 50_000])
def test_the_same_bytes_with_one_and_two_workers(tmp_path, monkeypatch, chunk_bytes):
    rows, _ = planted_rows(5, 300)
    rows.insert(17, b"\xff")
    monkeypatch.setattr("finetune.data.reading.lines.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("finetune.data.cleaning.chunk_jobs.JOB_BYTES", 1)
    monkeypatch.setattr("finetune.data.cleaning.decontamination.JOB_BYTES", 1)
    for workers in ("1", "2"):
        monkeypatch.setenv("FINETUNE_WORKERS", workers)
        run_clean(tmp_path / workers, {"a": rows[:200], "b": rows[200:]}, **LANGUAGES)
    monkeypatch.undo()
    run_clean(tmp_path / "whole", {"a": rows[:200], "b": rows[200:]}, **LANGUAGES)
    assert sha256_tree(tmp_path / "1") == sha256_tree(tmp_path / "2") == sha256_tree(tmp_path / "whole")


def test_a_long_chunk_becomes_several_parts_with_the_same_outcome(tmp_path, monkeypatch):
    rows, _ = planted_rows(6, 200)
    run_clean(tmp_path / "one", {"a": rows}, **LANGUAGES)
    monkeypatch.setattr("finetune.data.cleaning.chunk_jobs.PART_BYTES", 5_000)
    monkeypatch.setattr("finetune.data.cleaning.part_writer.BATCH_BYTES", 1_000)
    monkeypatch.setattr("finetune.data.cleaning.decontamination.READ_BYTES", 2_000)
    monkeypatch.setattr("finetune.data.cleaning.outs.READ_BYTES", 2_000)
    run_clean(tmp_path / "many", {"a": rows}, **LANGUAGES)
    assert sha256_tree(tmp_path / "many") == sha256_tree(tmp_path / "one")


def test_a_tokenizer_source_goes_to_the_corpus_and_never_displaces_training(tmp_path):
    text = "A text that the tokenizer is trained on, and nothing else"
    corpus = source_of("web", format="text", use="tokenizer")
    rows = {
        "web": [{"text": text}, {"text": "The one that the model is trained on"}],
        "b": [{"text": "The one that the model is trained on"}],
    }
    run = run_clean(tmp_path, rows, [corpus, source_of("b", format="text")], **LANGUAGES)
    assert [record["text"] for record in run.rows("corpus")] == [text]
    assert [record["source"] for record in run.rows()] == ["b"]


def test_the_original_of_a_repaired_text_is_kept_with_its_place(tmp_path):
    run = run_clean(
        tmp_path, {"a": [chat("Well?", "All is well"), chat("Vu ?", "DÃ©jÃ\u00a0 vu, bien sÃ»r")]}, **LANGUAGES
    )
    (row,) = run.rows("repaired")
    assert (row["file"], row["line"]) == ("a/a.jsonl", 2)
    assert row["original"]["messages"][1]["content"] == "DÃ©jÃ\u00a0 vu, bien sÃ»r"
    assert row["repaired_id"] == run.rows()[1]["id"]
    assert run.rows()[1]["messages"][1]["content"] == "Déjà vu, bien sûr"


def test_too_large_a_quarantined_share_names_counts_first_fault_and_file(tmp_path):
    rows = {"a": [chat("Well?", "All is well"), b"{", b"[1"]}
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be read \(.*\), more than the share 0.5") as caught:
        run_clean(tmp_path, rows, **LANGUAGES, max_quarantined_share=0.5)
    assert "the first is a/a.jsonl:2: broken_json" in caught.value.what
    assert caught.value.where == str(tmp_path / "clean/quarantine.jsonl")
    assert not (tmp_path / "clean/records.jsonl").exists()
    assert not (tmp_path / "clean/.scratch").exists()


def test_a_source_that_is_mostly_broken_is_named_though_it_is_small_beside_the_others(tmp_path):
    good = [chat(f"Question {number}?", f"Answer {number}") for number in range(100)]
    rows = {"a": good, "b": [chat("Well?", "All is well"), b"{", b"[1"]}
    with pytest.raises(DataError, match=r"2 of 3 rows of source b cannot be read \(.*\), more than the share 0.5"):
        run_clean(tmp_path, rows, **LANGUAGES, max_quarantined_share=0.05)
    run_clean(tmp_path / "half", {"a": good, "b": rows["b"][:2]}, **LANGUAGES, max_quarantined_share=0.05)


def test_no_record_left_to_train_on_is_an_error_with_its_cause(tmp_path):
    passage = " ".join(f"word{number}" for number in range(20))
    (test,), (train,) = groups_of("test", 1), groups_of("train", 1)
    rows = [chat("Well?", passage, group=test), chat("What?", f"{passage} again", group=train)]
    with pytest.raises(DataError, match="no record of the train split is left, only of test 1: 2 rows in") as caught:
        run_clean(tmp_path, {"a": rows}, **LANGUAGES)
    assert "contaminated_by_held_out 1" in caught.value.what
    assert "clean.decontamination" in caught.value.remedy
    with pytest.raises(DataError, match="nothing dropped") as caught:
        run_clean(tmp_path / "held_out", {"a": rows[:1]}, **LANGUAGES)
    assert "lower split.validation_share" in caught.value.remedy


def test_a_source_of_which_nothing_is_left_is_an_error_with_the_counts(tmp_path):
    (own,), (other,) = groups_of("train", 1), groups_of("train", 1, source="b")
    again = [chat("WELL?", "All  is well", group=other), chat("Well?", "x")]
    rows = {"a": [chat("Well?", "All is well", group=own)], "b": again}
    with pytest.raises(DataError, match="nothing is left of source b: 2 rows in, 0 kept, answer_too_short 1, dupl"):
        run_clean(tmp_path, rows, **LANGUAGES)


def test_a_file_of_which_every_row_is_dropped_is_counted_beside_the_others(tmp_path):
    rows = {"a": [chat("Well?", "All is well")], "b": [chat("Well?", "x")]}
    with pytest.raises(DataError, match="nothing is left of source b: 1 rows in, 0 kept, answer_too_short 1"):
        run_clean(tmp_path, rows, **LANGUAGES)
