"""The rows of every step: all rows once an epoch, the same windows for any number of processes and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import DataError
from finetune.training.batches import PackedRows, ProcessBatches, Windows, check_batches, measure_rows


def test_windows_are_a_function_of_seed_and_epoch() -> None:
    windows = Windows(rows=7, batch_rows=3, seed=5)
    assert windows.steps_per_epoch == 3
    first = [window.tolist() for window in windows.of_epoch(0)]
    assert first == [[1, 4, 2], [3, 6, 5], [0]]
    assert [window.tolist() for window in windows.of_epoch(1)] == [[4, 2, 0], [6, 5, 3], [1]]
    assert windows.of_step(2).tolist() == [0]
    assert windows.of_step(4).tolist() == [6, 5, 3]
    assert windows.first_rows(0, 2).tolist() == [1, 4, 2, 3, 6, 5]
    assert [window.tolist() for window in Windows(7, 3, seed=6).of_epoch(0)] != first


@given(
    rows=st.integers(1, 40),
    micro=st.integers(1, 4),
    accumulated=st.integers(1, 3),
    processes=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_processes_share_each_window_without_loss_or_repetition(
    rows: int, micro: int, accumulated: int, processes: int, epoch: int
) -> None:
    windows = Windows(rows, micro * accumulated * processes, seed=1)
    samplers = [ProcessBatches(windows, micro, process, processes) for process in range(processes)]
    for sampler in samplers:
        sampler.epoch = epoch
    taken = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in taken] == [len(sampler) for sampler in samplers]
    assert len({len(batches) for batches in taken}) == 1
    assert max(len(batch) for batches in taken for batch in batches) <= micro
    for number, window in enumerate(windows.of_epoch(epoch)):
        part = slice(number * accumulated, (number + 1) * accumulated)
        trained = [row for batches in taken for batch in batches[part] for row in batch if row != rows]
        assert sorted(trained) == sorted(window.tolist())


def test_the_row_behind_the_last_has_no_trained_token() -> None:
    rows = Dataset.from_list([{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2], "seq_lengths": [4], "ids": ["a"]}])
    packed = PackedRows(rows)
    assert packed[0] == {"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2], "seq_lengths": [4]}
    assert packed[1] == {"input_ids": [1, 5], "labels": [-100, -100], "seq_lengths": [2]}


def test_the_first_token_of_a_document_is_not_counted() -> None:
    rows = Dataset.from_list(
        [
            {"input_ids": [1, 5, 2, 1, 6, 7, 2], "labels": [1, 5, 2, 1, -100, 7, 2], "seq_lengths": [3, 4]},
            {"input_ids": [1, 5], "labels": [-100, -100], "seq_lengths": [2]},
            {"input_ids": [1, 5, 2], "labels": [-100, 5, 2], "seq_lengths": [3]},
        ]
    )
    sizes = measure_rows(rows)
    assert sizes.tokens.tolist() == [7, 2, 3]
    assert sizes.trained.tolist() == [4, 0, 2]
    assert sizes.longest.tolist() == [4, 2, 3]


def test_a_batch_without_a_trained_token_is_refused_before_the_first_step() -> None:
    trained = np.array([3, 0, 2, 0])
    check_batches(Windows(4, 4, seed=0), trained, epochs=5)
    with pytest.raises(DataError, match=r"a batch of epoch 1 has no trained token \(rows \d; 2 such rows\)(.|\n)*loss"):
        check_batches(Windows(4, 1, seed=0), trained, epochs=1)
