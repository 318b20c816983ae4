from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from finetune.evaluation.generation import Answer
from finetune.evaluation.memorization import copied_answers, measure


def batch(rows: list[list[int]]) -> Any:
    return pa.record_batch({"input_ids": pa.array(rows, pa.list_(pa.int32()))})


def test_an_answer_is_a_copy_from_so_many_tokens_on() -> None:
    rows = [batch([[1, 2, 3, 4, 5, 6]])]
    answers = [[9, 2, 3, 4, 9], [9, 3, 4, 5, 6], [2, 3, 4, 5], [2, 3, 4, 9, 3, 4, 5], [3, 4, 5]]
    assert copied_answers(answers, rows, 4) == [False, True, True, False, False]


def test_a_span_over_two_rows_is_no_copy_and_one_over_two_batches_neither() -> None:
    answer = [[1, 2, 3, 4]]
    assert copied_answers(answer, [batch([[0, 1, 2], [3, 4, 0]])], 4) == [False]
    assert copied_answers(answer, [batch([[0, 1, 2]]), batch([[3, 4, 0]])], 4) == [False]
    assert copied_answers(answer, [batch([[7]]), batch([[5], [0, 1, 2, 3, 4]])], 4) == [True]


def test_slices_of_a_batch_and_batches_shorter_than_a_span() -> None:
    rows = batch([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9]])
    assert copied_answers([[1, 2, 3, 4], [5, 6, 7, 8]], [rows.slice(1, 2)], 4) == [False, True]
    assert copied_answers([[9, 9]], [rows.slice(2, 1)], 3) == [False]
    assert copied_answers([[1]], [rows], 3) == [False]


def test_all_rows_of_a_large_batch_are_searched() -> None:
    rows = [[row, 1, 2, row] for row in range(300)]
    assert copied_answers([[128, 1, 2, 128], [299, 1, 2, 299], [300, 1, 2, 300]], [batch(rows)], 4) == [
        True,
        True,
        False,
    ]


def test_the_hash_finds_what_a_search_finds() -> None:
    generator = np.random.default_rng(3)
    rows = [generator.integers(0, 3, length).tolist() for length in generator.integers(1, 40, 60)]
    answers = [generator.integers(0, 3, 12).tolist() for _ in range(200)]

    def searched(answer: list[int]) -> bool:
        spans = {tuple(answer[at : at + 8]) for at in range(5)}
        return any(tuple(row[at : at + 8]) in spans for row in rows for at in range(len(row) - 7))

    expected = [searched(answer) for answer in answers]
    assert 20 < sum(expected) < 180
    assert copied_answers(answers, [batch(rows[:30]), batch(rows[30:])], 8) == expected


def test_figures_of_each_model() -> None:
    answers = {
        "base": [Answer((1, 2, 3), ""), Answer((1,), "")],
        "tuned": [Answer((7, 7, 7), ""), Answer((4, 1, 2, 3), "")],
    }
    assert measure(answers, [batch([[1, 2, 3]])], 3) == {
        "base": {"answers": 2, "long_enough": 1, "copied": 1, "share": 0.5},
        "tuned": {"answers": 2, "long_enough": 2, "copied": 1, "share": 0.5},
    }
    assert measure(answers, [batch([[1, 2, 3]])], 4)["tuned"]["copied"] == 0
