import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.mixing.packing import best_fit, marked, pack


def packed_rows(documents, pack_tokens, seed="1/0"):
    """`documents`: (id that is repeated, length, trained)."""
    values = [
        marked(np.full(length, token, np.int32), np.full(length, trained)) for token, length, trained in documents
    ]
    lengths = np.array([length for _, length, _ in documents], np.int32)
    places = np.array([token for token, _, _ in documents], np.uint64)
    return pack(np.concatenate(values), lengths, places, pack_tokens, seed).to_pylist()


DOCUMENTS = [(1, 3, True), (2, 5, True), (3, 2, True), (4, 4, False), (5, 6, True)]


def test_best_fit_decreasing_fills_rows_with_whole_documents_and_masks_each_first_label():
    assert sorted(packed_rows(DOCUMENTS, 8), key=lambda row: row["input_ids"]) == [
        {
            "input_ids": [2, 2, 2, 2, 2, 1, 1, 1],
            "labels": [-100, 2, 2, 2, 2, -100, 1, 1],
            "seq_lengths": [5, 3],
        },
        {"input_ids": [4, 4, 4, 4], "labels": [-100, -100, -100, -100], "seq_lengths": [4]},
        {
            "input_ids": [5, 5, 5, 5, 5, 5, 3, 3],
            "labels": [-100, 5, 5, 5, 5, 5, -100, 3],
            "seq_lengths": [6, 2],
        },
    ]


def test_the_mask_stays_with_each_token_and_id_0_has_one_too():
    ids, trained = np.array([0, 7, 0, 9], np.int32), np.array([False, True, True, False])
    (row,) = pack(marked(ids, trained), np.array([4], np.int32), np.array([0], np.uint64), 8, "1/0").to_pylist()
    assert row == {"input_ids": [0, 7, 0, 9], "labels": [-100, 7, 0, -100], "seq_lengths": [4]}


def test_the_order_depends_on_the_seed_and_not_on_the_order_of_the_documents():
    many = [(number, 1 + number % 7, True) for number in range(60)]
    assert packed_rows(many, 8) == packed_rows(many[::-1], 8)
    assert packed_rows(many, 8) != packed_rows(many, 8, seed="2/0")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_every_document_is_in_one_row_and_no_row_is_over_full(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    rows = best_fit(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= capacity for row in rows)
    # No two rows are half empty or more: each document went where it fitted.
    assert sum(2 * sum(lengths[number] for number in row) <= capacity for row in rows) <= 1
