import pytest
from test_repair import rules

from finetune.data.cleaning import check_kept, check_quarantine, clean_rows, funnel, metrics_of
from finetune.data.record import make_record
from finetune.data.rows import Fault, Parsed, Place
from finetune.errors import DataError


def parsed(source, text, line=1):
    return Parsed(make_record(source=source, text=text), Place(f"{source}/f", line, 0))


def fault(source, reason, line=1):
    return Fault(Place(f"{source}/f", line, 0), reason, "seen", b"\xff")


ROWS = [
    ("a", [parsed("a", "Un texte"), parsed("a", "un  TEXTE", 2), fault("a", "broken_json", 3), parsed("a", "x", 4)]),
    ("b", [parsed("b", "un texte"), parsed("b", "dÃ©jÃ\u00a0 vu", 2)]),
]


def test_every_row_is_counted_once_and_the_first_of_equals_stays_over_all_sources():
    cleaned = clean_rows(ROWS, rules())
    assert [record.text for record in cleaned.records] == ["Un texte", "déjà vu"]
    numbers = metrics_of(cleaned)
    assert numbers["sources"]["a"] == {
        "rows_in": 4,
        "quarantined": {"broken_json": 1},
        "dropped": {"answer_too_short": 1},
        "duplicates": 1,
        "kept": 1,
        "characters": 8,
        "repaired_texts": {},
    }
    assert (numbers["rows_in"], numbers["kept"], numbers["duplicates"]) == (6, 2, 2)
    assert numbers["repaired_texts"] == {"mojibake": 1}
    assert funnel(cleaned)[:5] == [
        ("a", "rows_in", 4),
        ("a", "quarantined_broken_json", 1),
        ("a", "dropped_answer_too_short", 1),
        ("a", "duplicates", 1),
        ("a", "kept", 1),
    ]


def test_the_original_of_a_repaired_text_is_kept_with_its_place():
    cleaned = clean_rows(ROWS, rules())
    (original,) = cleaned.originals
    assert (original["file"], original["line"]) == ("b/f", 2)
    assert original["original"]["text"] == "dÃ©jÃ\u00a0 vu"
    assert original["repaired_id"] == cleaned.records[1].id


def test_too_large_a_quarantined_share_names_counts_first_fault_and_file():
    cleaned = clean_rows(ROWS, rules())
    check_quarantine(cleaned, 1 / 6, "q.jsonl")
    with pytest.raises(DataError, match=r"1 of 6 rows cannot be read \(broken_json 1\)") as caught:
        check_quarantine(cleaned, 0.16, "q.jsonl")
    assert "a/f:3: broken_json" in caught.value.what
    assert caught.value.where == "q.jsonl"


def test_a_source_of_which_nothing_is_left_is_an_error_with_the_counts():
    cleaned = clean_rows([("a", [parsed("a", "x"), parsed("a", "RT @b c", 2)])], rules())
    with pytest.raises(DataError, match="nothing is left of source a: 2 rows in, 0 kept, answer_too_short 1, retweet"):
        check_kept(cleaned)
