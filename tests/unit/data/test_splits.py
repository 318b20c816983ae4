import pyarrow as pa
import pytest

from finetune.data.mixing.row_index import read_index
from finetune.data.mixing.split_report import check_splits, split_metrics
from finetune.data.splits import SPLITS, assign, trained_tokens
from finetune.data.tables import TOKENS
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


def index_of(rows, validation_share=0.1, test_share=0.1, batch_rows=7):
    parts = [rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]
    batches = [pa.RecordBatch.from_pylist(part, schema=TOKENS) for part in parts]
    return read_index(batches, validation_share, test_share)


def ids_by_split(rows, *shares):
    index = index_of(rows, *shares)
    return {
        name: [entry["id"] for entry, chosen in zip(rows, index.of_split(name), strict=True) if chosen]
        for name in SPLITS
    }


ROWS = [row(str(number)) for number in range(200)]
# With shares of 0.1: 8, 9 and 11 are train, 10 test, 13 validation.
TRAIN, VALIDATION, TEST = "s/8", "s/13", "s/10"


def test_the_split_is_a_function_of_the_group_name():
    # The first bytes of their SHA-256 are 54, 33, 07, 6b and 2b; test is below 1a (0.1 of 256), validation below 33.
    names = ["s/8", "s/9", "s/10", "s/11", "s/13"]
    assert [assign(name, 0.1, 0.1) for name in names] == ["train", "train", "test", "train", "validation"]
    assert {name: len(ids) for name, ids in ids_by_split(ROWS).items()} == {"train": 159, "validation": 22, "test": 19}


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.05, 0.3), (1e-9, 0.5), (0.3, 1e-9)])
def test_the_index_splits_as_each_group_alone(shares):
    rows = [row(str(number), group=f"s/{number % 300}") for number in range(1000)]
    assert [SPLITS[number] for number in index_of(rows, *shares).splits] == [assign(r["group"], *shares) for r in rows]


def test_old_rows_stay_where_they_are_when_data_grows_or_the_validation_share_changes():
    before = ids_by_split(ROWS, 0.1, 0.1)
    after = ids_by_split([row(f"new{number}") for number in range(50)] + ROWS[::-1], 0.2, 0.1)
    assert set(before["test"]) <= set(after["test"])
    assert set(before["validation"]) <= set(after["validation"])


def test_a_group_is_never_torn_apart():
    rows = [row(f"{group}-{part}", group=f"s/fil{group}") for group in range(40) for part in range(3)]
    groups = [{identity.split("-")[0] for identity in ids} for ids in ids_by_split(rows, 0.3, 0.3).values()]
    assert all(groups)
    assert sum(map(len, groups)) == 40


def test_the_first_token_is_never_trained():
    assert trained_tokens(row("a", trained=(True, True, False, True))) == 2
    rows = [row("a", trained=(True, True, False, True)), row("b", trained=(True,)), row("c", trained=(False, True))]
    index = index_of(rows)
    assert index.trained_tokens.tolist() == [2, 0, 1]
    assert index.tokens.tolist() == [4, 1, 2]


def test_one_id_twice_is_an_error():
    with pytest.raises(DataError, match="1 of 3 ids repeat another"):
        index_of([row("a"), row("b"), row("a")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", group=VALIDATION), row("b", group=TEST)], "no row to train on .train 0, validation 1, test 1"),
        (
            [row("a", group=TRAIN, trained=(True, False)), row("b", group=VALIDATION), row("c", group=TEST)],
            "no token of the 1 training rows is trained",
        ),
        ([row("a", group=TRAIN)], "no row to test on"),
        ([row("a", group=TRAIN), row("b", group=TEST)], "no row to validate on"),
    ],
)
def test_an_empty_split_is_an_error(rows, message):
    with pytest.raises(DataError, match=message):
        check_splits(index_of(rows))


def said(identity, group, *texts):
    """A row whose answers are `texts` (one token per letter), each after one token of prompt; "." is not trained."""
    letters = "".join(f".{text}" for text in texts)
    tokens = {"input_ids": [ord(letter) for letter in letters], "trained": [letter != "." for letter in letters]}
    return {**row(identity, group=group), **tokens}


@pytest.mark.parametrize("batch_rows", [1, 3, 7])
def test_a_held_out_row_with_any_answer_of_train_is_left_out(batch_rows):
    rows = [
        said("c", VALIDATION, "new answer", "ABCDEFGHI"),
        said("d", VALIDATION, "seven77"),
        said("e", TEST, "abcdefgh"),
        said("f", TEST, "abcdefghi", "bcdefgh"),
        said("a", TRAIN, "abcdefgh"),
        said("b", TRAIN, "seven77", "ABCDEFGHI"),
        said("g", TEST, "other answer"),
    ]
    index = index_of(rows, batch_rows=batch_rows)
    assert index.left_out.tolist() == [True, False, True, False, False, False, False]
    check_splits(index)
    left_out = split_metrics(index)["left_out"]
    assert left_out == {"answer_in_train": {"validation": {"s": 1}, "test": {"s": 1}}}


def test_an_answer_ends_with_its_row():
    """All tokens are trained, so that only the bound between two rows parts their answers."""
    whole = [row(name, group=group, trained=(True,) * 9) for name, group in (("a", TRAIN), ("b", TEST), ("c", TRAIN))]
    assert index_of(whole).left_out.tolist() == [False, True, False]
    whole[1]["input_ids"] = list(range(1, 10))
    assert index_of(whole).left_out.tolist() == [False, False, False]


@pytest.mark.parametrize(("name", "group"), [("validation", VALIDATION), ("test", TEST)])
def test_nothing_left_to_hold_out_is_an_error_that_says_why(name, group):
    others = {"validation": VALIDATION, "test": TEST}
    rows = [said("a", TRAIN, "abcdefgh"), said("d", group, "abcdefgh")]
    rows += [said("b", other, "x") for other_name, other in others.items() if other_name != name]
    with pytest.raises(DataError, match=rf"no row to .*{name} 0.*, 1 of {name} left out: their answers are in train"):
        check_splits(index_of(rows))


def test_metrics_by_source_and_split():
    rows = [row("a", group=TRAIN), row("b", group="s/9"), row("c", source="t", group=TRAIN), row("d", group=TEST)]
    rows += [said("e", "s/11", "abcdefgh"), {**said("f", VALIDATION, "abcdefgh"), "source": "t"}]
    metrics = split_metrics(index_of(rows))
    assert metrics["sources"]["s"]["train"] == {
        "rows": 3,
        "share": 0.75,
        "groups": 3,
        "tokens": 13,
        "trained_tokens": 10,
    }
    assert metrics["splits"]["test"]["share"] == 0.1667
    assert metrics["splits"]["train"]["groups"] == 3
    assert metrics["sources"]["t"]["test"]["rows"] == 0
    assert metrics["sources"]["t"]["left_out"]["rows"] == 1
    assert metrics["left_out"] == {"answer_in_train": {"validation": {"s": 0, "t": 1}, "test": {"s": 0, "t": 0}}}
    assert metrics["rows"] == 6
