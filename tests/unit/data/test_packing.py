import pytest

from finetune.data.packing import fill, pack
from finetune.errors import DataError


def document(identity, length, trained=True):
    return {"id": identity, "input_ids": [int(identity)] * length, "trained": [trained] * length}


DOCUMENTS = [document("1", 3), document("2", 5), document("3", 2), document("4", 4, trained=False), document("5", 6)]


def test_best_fit_decreasing_fills_rows_with_whole_documents_and_masks_each_first_label():
    packed = sorted(pack(DOCUMENTS, 8, seed=1), key=lambda row: row["input_ids"])
    assert packed == [
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
    assert fill(packed, 8) == pytest.approx(20 / 24)


def test_the_order_depends_on_the_seed_and_not_on_the_order_of_the_documents():
    many = [document(str(number), 1 + number % 7) for number in range(60)]
    assert pack(many, 8, seed=1) == pack(many[::-1], 8, seed=1)
    assert pack(many, 8, seed=1) != pack(many, 8, seed=2)
    packed = pack(many, 8, seed=1)
    assert max(len(row["input_ids"]) for row in packed) <= 8
    assert sum(len(row["input_ids"]) for row in packed) == sum(1 + number % 7 for number in range(60))


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(DataError, match="a document has 6 tokens, a packed row holds 5"):
        pack(DOCUMENTS, 5, seed=1)
