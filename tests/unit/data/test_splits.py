import pytest

from finetune.data.splits import (
    answers,
    assign,
    check_splits,
    leave_out_answered,
    mini_train,
    split_metrics,
    split_rows,
    trained_tokens,
)
from finetune.errors import DataError


def row(identity, *, source="s", group=None, trained=(False, True)):
    return {
        "id": identity,
        "source": source,
        "group": group or f"{source}/{identity}",
        "language": None,
        "input_ids": list(range(len(trained))),
        "trained": list(trained),
    }


ROWS = [row(str(number)) for number in range(200)]


def test_the_split_is_a_function_of_the_group_name():
    # The first bytes of their SHA-256 are 54, 33, 07, 6b and 2b; test is below 1a (0.1 of 256), validation below 33.
    names = ["s/8", "s/9", "s/10", "s/11", "s/13"]
    assert [assign(name, 0.1, 0.1) for name in names] == ["train", "train", "test", "train", "validation"]
    counts = {name: len(rows) for name, rows in split_rows(ROWS, 0.1, 0.1).items()}
    assert counts == {"train": 159, "validation": 22, "test": 19}


def test_old_rows_stay_where_they_are_when_data_grows_or_the_validation_share_changes():
    before = split_rows(ROWS, 0.1, 0.1)
    after = split_rows([row(f"new{number}") for number in range(50)] + ROWS[::-1], 0.2, 0.1)
    ids = {name: {entry["id"] for entry in rows} for name, rows in after.items()}
    assert {entry["id"] for entry in before["test"]} <= ids["test"]
    assert {entry["id"] for entry in before["validation"]} <= ids["validation"]


def test_a_group_is_never_torn_apart():
    rows = [row(f"{group}-{part}", group=f"s/fil{group}") for group in range(40) for part in range(3)]
    groups = [{entry["group"] for entry in part} for part in split_rows(rows, 0.3, 0.3).values()]
    assert all(groups)
    assert sum(map(len, groups)) == 40


def test_mini_train_does_not_depend_on_the_order_of_the_rows():
    assert [entry["id"] for entry in mini_train(ROWS[:8], 3)] == ["4", "3", "0"]
    assert mini_train(ROWS[:8][::-1], 3) == mini_train(ROWS[:8], 3)
    assert len(mini_train(ROWS[:2], 3)) == 2


def test_the_first_token_is_never_trained():
    assert trained_tokens(row("a", trained=(True, True, False, True))) == 2


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": [], "validation": [row("a")], "test": [row("b")]},
            "no row to train on .train 0, validation 1, test",
        ),
        (
            {"train": [row("a", trained=(True, False))], "validation": [row("b")], "test": [row("c")]},
            "no token of the 1 training rows is trained",
        ),
        ({"train": [row("a")], "validation": [row("b")], "test": []}, "no row to test on"),
        ({"train": [row("a")], "validation": [], "test": [row("b")]}, "no row to validate on"),
    ],
)
def test_an_empty_split_is_an_error(splits, message):
    with pytest.raises(DataError, match=message):
        check_splits(splits, {}, sum(map(len, splits.values())))


def said(identity, *texts):
    """A row whose answers are `texts` (one token per letter), each after one token of prompt; "." is not trained."""
    letters = "".join(f".{text}" for text in texts)
    return {**row(identity), "input_ids": [ord(letter) for letter in letters], "trained": [c != "." for c in letters]}


def test_answers_are_whole_runs_of_eight_trained_tokens_at_least():
    assert answers(said("a", "abcdefgh", "short", "123456789")) == {tuple(b"abcdefgh"), tuple(b"123456789")}
    assert answers(said("b", "abcdefg")) == set()


def test_a_held_out_row_with_any_answer_of_train_is_left_out():
    splits = {
        "train": [said("a", "abcdefgh"), said("b", "seven77", "ABCDEFGHI")],
        "validation": [said("c", "new answer", "ABCDEFGHI"), said("d", "seven77")],
        "test": [said("e", "abcdefgh"), said("f", "abcdefghi", "bcdefgh"), said("g", "other answer")],
    }
    kept, left_out = leave_out_answered(splits)
    names = {name: [entry["id"] for entry in rows] for name, rows in kept.items()}
    assert names == {"train": ["a", "b"], "validation": ["d"], "test": ["f", "g"]}
    assert {name: [entry["id"] for entry in rows] for name, rows in left_out.items()} == {
        "validation": ["c"],
        "test": ["e"],
    }
    check_splits(kept, left_out, 7)
    with pytest.raises(DataError, match=r"8 rows in, 7 out \(train 2, validation 1, test 2, 1 of validation left out"):
        check_splits(kept, left_out, 8)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_nothing_left_to_hold_out_is_an_error_that_says_why(name):
    splits = {"train": [said("a", "abcdefgh")], "validation": [said("b", "x")], "test": [said("c", "y")]}
    kept, left_out = leave_out_answered({**splits, name: [said("d", "abcdefgh")]})
    with pytest.raises(DataError, match=rf"no row to .*{name} 0, .*1 of {name} left out: their answers are in train"):
        check_splits(kept, left_out, 3)


def test_metrics_by_source_and_split():
    splits = {"train": [row("a"), row("b"), row("c", source="t")], "validation": [], "test": [row("d")]}
    metrics = split_metrics(splits, {"validation": [row("e", source="t")], "test": []})
    assert metrics["sources"]["s"]["train"] == {
        "rows": 2,
        "share": 0.6667,
        "groups": 2,
        "tokens": 4,
        "trained_tokens": 2,
    }
    assert metrics["splits"]["test"]["share"] == 0.2
    assert metrics["sources"]["t"]["test"]["rows"] == 0
    assert metrics["sources"]["t"]["left_out"]["rows"] == 1
    assert metrics["left_out"] == {"answer_in_train": {"validation": {"s": 0, "t": 1}, "test": {"s": 0, "t": 0}}}
    assert metrics["rows"] == 5
