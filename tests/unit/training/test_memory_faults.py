"""A micro-batch in parts: the same documents, positions and labels, cut between documents only."""

from __future__ import annotations

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.training.memory_faults import documents_in, split_documents

ROWS = [
    {"input_ids": [1, 3, 2, 1, 4, 5, 6, 2], "labels": [-100, 3, 2, -100, 4, 5, 6, 2], "seq_lengths": [3, 5]},
    {"input_ids": [1, 7, 8, 2], "labels": [-100, -100, 8, 2], "seq_lengths": [4]},
]


def test_parts_hold_whole_documents_of_about_as_many_tokens() -> None:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)
    assert documents_in(batch) == 3
    parts = split_documents(batch, 2)
    assert [part["input_ids"].tolist() for part in parts] == [[[1, 3, 2, 1, 4, 5, 6, 2]], [[1, 7, 8, 2]]]
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1, 2, 0, 1, 2, 3, 4]], [[0, 1, 2, 3]]]
    assert [part["cu_seq_lens_q"].tolist() for part in parts] == [[0, 3, 8], [0, 4]]
    assert [part["max_length_k"] for part in parts] == [5, 4]
    assert [part["seq_idx"].tolist() for part in parts] == [[[0, 0, 0, 1, 1, 1, 1, 1]], [[0, 0, 0, 0]]]
    assert torch.cat([part["labels"] for part in parts], dim=1).equal(batch["labels"])


def test_there_are_never_more_parts_than_documents() -> None:
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)
    assert [part["input_ids"].shape[1] for part in split_documents(batch, 8)] == [3, 5, 4]
    assert split_documents(batch, 1)[0]["input_ids"].equal(batch["input_ids"])
