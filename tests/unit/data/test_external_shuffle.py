import numpy as np
import pyarrow as pa
import pytest

from finetune.data.mixing.external_shuffle import WindowFile, shuffled
from finetune.data.mixing.row_index import RowIndex, text_hashes
from finetune.errors import DataError


def index_of(ids, tokens):
    count = len(ids)
    keys, zeros = text_hashes(ids), np.zeros(count, np.int32)
    lengths = np.array(tokens, np.int32)
    return RowIndex(("s",), keys, keys, zeros, zeros.astype(np.int8), lengths, lengths, zeros.astype(np.bool_))


IDS = [f"row{number}" for number in range(100)]
TOKENS = [1 + number % 5 for number in range(100)]


def order_of(ids, row_uses, seed, max_rows=1000, max_tokens=1000):
    """(id, window) of every use, in the training order."""
    index = index_of(ids, [1 + int(name.removeprefix("row")) % 5 for name in ids])
    uses = shuffled(index, np.array(row_uses, np.int32), seed, max_rows, max_tokens)
    order = np.argsort(uses.places)
    return [(ids[uses.rows[use]], int(uses.windows[use])) for use in order]


def test_windows_are_stretches_of_the_order_bounded_in_rows_and_tokens():
    order = order_of(IDS, [2] * 100, seed=1, max_rows=30)
    windows = [window for _, window in order]
    # 200 uses in windows of at most 30 are 7, of 29 but for the last.
    assert windows == sorted(windows)
    assert np.bincount(windows).tolist() == [29, 29, 29, 29, 29, 29, 26]
    by_tokens = order_of(IDS, [1] * 100, seed=1, max_tokens=20)
    sums = np.bincount([window for _, window in by_tokens], weights=[1 + int(name[3:]) % 5 for name, _ in by_tokens])
    assert sums.max() <= 20
    assert sums[:-1].min() > 15
    # A row that is longer than a window has one of its own.
    assert [window for _, window in order_of(["row4", "row9"], [1, 1], seed=1, max_tokens=3)] == [0, 1]


def test_the_order_is_that_of_the_seed_and_the_ids_whatever_the_order_of_the_rows():
    order = order_of(IDS, [1] * 100, seed=1)
    assert order_of(IDS[::-1], [1] * 100, seed=1) == order
    assert order_of(IDS, [1] * 100, seed=2) != order
    assert sorted(order) == sorted((name, 0) for name in IDS)
    # The first rows are no more among the first of the order than others: 25 of the first 50 are expected.
    assert 15 < sum(int(name[3:]) < 50 for name, _ in order[:50]) < 35


def test_another_row_slips_in_and_the_second_use_of_a_row_has_a_place_of_its_own():
    order = [name for name, _ in order_of(IDS, [1] * 100, seed=1)]
    grown = [name for name, _ in order_of([*IDS, "row100"], [1] * 101, seed=1)]
    assert [name for name in grown if name != "row100"] == order
    twice = [name for name, _ in order_of(IDS, [2] * 100, seed=1)]
    distances = [abs(twice.index(name) - (199 - twice[::-1].index(name))) for name in IDS]
    assert 50 < np.mean(distances) < 85  # 67 for two places drawn from 200


@pytest.mark.parametrize("run_tokens", [1, 25, 10_000])
@pytest.mark.parametrize("batch_rows", [1, 9, 100])
def test_each_window_gives_its_documents_back_however_they_came(tmp_path, run_tokens, batch_rows):
    row_uses = np.array([number % 3 for number in range(100)], np.int32)
    index = index_of(IDS, TOKENS)
    uses = shuffled(index, row_uses, 1, max_rows=20, max_tokens=1000)
    seen = []
    with WindowFile(tmp_path, uses, index, run_tokens) as windows:
        for start in range(0, 100, batch_rows):
            rows = [row for row in range(start, min(start + batch_rows, 100)) if row_uses[row]]
            windows.add(pa.array([[row] * TOKENS[row] for row in rows], pa.list_(pa.int32())), row_uses[rows])
        for window in range(uses.window_count):
            values, lengths, places = windows.read(window)
            documents = [int(part[0]) for part in np.split(values, np.cumsum(lengths)[:-1])]
            assert [TOKENS[row] for row in documents] == lengths.tolist()
            own = uses.windows == window
            assert sorted(places.tolist()) == sorted(uses.places[own].tolist())
            assert sorted(documents) == sorted(uses.rows[own].tolist())
            seen += documents
        assert list(tmp_path.iterdir()) == []
    assert np.bincount(seen, minlength=100).tolist() == row_uses.tolist()


def test_rows_that_changed_between_two_readings_are_an_error(tmp_path):
    index = index_of(IDS[:2], [3, 4])
    with WindowFile(tmp_path, shuffled(index, np.array([1, 1], np.int32), 1, 10, 10), index) as windows:
        windows.add(pa.array([[7], [8]], pa.list_(pa.int32())), np.array([1, 1], np.int32))
        with pytest.raises(DataError, match="the rows changed while they were read"):
            windows.flush()
