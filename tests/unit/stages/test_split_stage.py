"""The split stage on token rows made here: what is in its files, for a mix and without one."""

from collections import Counter

import numpy as np
import pytest
from pyarrow import parquet

from finetune.data.splits import assign
from finetune.data.tables import TOKENS, write_parquet
from finetune.data_sections import Split
from finetune.errors import DataError
from finetune.io import read_json, read_parquet
from finetune.mix_sections import Mix
from finetune.stages import split

MIX = Mix(
    unit="tokens", shares={"chat": 0.5, "code": 0.3, "tools": 0.2}, total=None, on_exhausted="repeat", max_repeats=3
)
SECTION = Split(validation_share=0.1, test_share=0.1, mini_train_rows=20, pack_tokens=64, mix=MIX)


def token_rows(sources):
    """Documents of 4 to 40 tokens, each of one token of its own, the first three of which are not trained."""
    rows = []
    for source, count in sources.items():
        for number in range(count):
            length, token = 4 + number % 37, len(rows)
            rows.append(
                {
                    "id": f"{source}{number}",
                    "source": source,
                    "group": f"{source}/{number // 2}",
                    "language": None,
                    "input_ids": [token] * length,
                    "trained": [False] * 3 + [True] * (length - 3),
                }
            )
    return rows


ROWS = token_rows({"chat": 1500, "code": 1000, "tools": 200})


def run(folder, rows=ROWS, section=SECTION, seed=1):
    write_parquet(folder / "tokens/tokens.parquet", rows, TOKENS)
    plots = (folder / "split.csv", folder / "mix.csv")
    split.split_rows(folder / "tokens", folder / "split", folder / "split.json", *plots, seed=seed, split=section)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("mixed"))


def documents(folder):
    """How often each document (by its token) is in the packed rows; whole, with its labels, in rows that fit."""
    uses = Counter()
    for row in read_parquet(folder / "split/packed.parquet"):
        bounds = np.cumsum(row["seq_lengths"])[:-1]
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64
        for ids, labels in zip(np.split(row["input_ids"], bounds), np.split(row["labels"], bounds), strict=True):
            token = int(ids[0])
            assert ids.tolist() == ROWS[token]["input_ids"]
            assert labels.tolist() == [token if trained else -100 for trained in ROWS[token]["trained"]]
            uses[token] += 1
    return uses


def test_each_row_is_in_the_file_of_its_group_and_in_the_order_it_came(mixed):
    expected = {"train": [], "validation": [], "test": []}
    for row in ROWS:
        expected[assign(row["group"], 0.1, 0.1)].append(row)
    for name, rows in expected.items():
        assert read_parquet(mixed / f"split/{name}.parquet") == rows
    mini = read_parquet(mixed / "split/mini_train.parquet")
    assert len(mini) == 20
    assert all(row in expected["train"] for row in mini)
    names = ["mini_train.parquet", "packed.parquet", "test.parquet", "train.parquet", "validation.parquet"]
    assert sorted(path.name for path in (mixed / "split").iterdir()) == names


def test_the_packed_rows_hold_the_mix_with_the_shares_asked_for(mixed):
    uses, mix = documents(mixed), read_json(mixed / "split.json")["mix"]
    train = {row["input_ids"][0]: row for row in read_parquet(mixed / "split/train.parquet")}
    tokens = Counter()
    for token, count in uses.items():
        tokens[train[token]["source"]] += count * len(train[token]["input_ids"])
    shares = {source: tokens[source] / tokens.total() for source in MIX.shares}
    assert shares == pytest.approx(MIX.shares, rel=0.01)
    assert mix["unit"] == "tokens"
    assert mix["tokens"] == tokens.total()
    assert mix["rows"] == uses.total()
    tools = mix["sources"]["tools"]
    # With its three uses at most, the smallest source bounds the mix.
    assert (tools["max_repeats"], tools["rows"]) == (3, 3 * tools["available_rows"])
    assert tools["distinct_rows"] == tools["available_rows"]
    assert mix["sources"]["chat"]["max_repeats"] == 1
    plot = (mixed / "mix.csv").read_text(encoding="utf-8").splitlines()
    assert plot[:3] == ["source,kind,share", "chat,requested,0.5", f"chat,obtained,{round(shares['chat'], 6)}"]


def test_without_a_mix_each_training_row_is_packed_once(tmp_path):
    run(tmp_path, section=SECTION.model_copy(update={"mix": None}))
    train = read_parquet(tmp_path / "split/train.parquet")
    assert documents(tmp_path) == {row["input_ids"][0]: 1 for row in train}
    numbers = read_json(tmp_path / "split.json")
    assert numbers["mix"]["tokens"] == numbers["splits"]["train"]["tokens"]
    assert numbers["mix"]["trained_tokens"] == numbers["splits"]["train"]["trained_tokens"]


def test_the_packed_bytes_depend_on_the_seed_and_not_on_the_order_of_the_rows(mixed, tmp_path):
    packed = (mixed / "split/packed.parquet").read_bytes()
    assert (run(tmp_path / "a", ROWS[::-1]) / "split/packed.parquet").read_bytes() == packed
    assert (run(tmp_path / "b", seed=2) / "split/packed.parquet").read_bytes() != packed


def test_many_small_windows_lose_nothing_either(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "WINDOW_ROWS", 100)
    run(tmp_path)
    numbers = read_json(tmp_path / "split.json")
    assert documents(tmp_path).total() == numbers["mix"]["rows"]
    file = parquet.ParquetFile(tmp_path / "split/packed.parquet")
    assert file.metadata.num_row_groups == -(-numbers["mix"]["rows"] // 100)
    assert numbers["packed"]["fill"] > 0.95


def test_a_document_longer_than_a_row_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="a document has 40 tokens, a packed row holds 39"):
        run(tmp_path, section=SECTION.model_copy(update={"pack_tokens": 39}))
    assert not (tmp_path / "split").exists()
