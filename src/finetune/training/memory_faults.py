"""a micro-batch that memory does not hold -> the same documents in smaller parts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

DOCUMENT_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")


def documents_in(batch: Mapping[str, Any]) -> int:
    """How many documents a padding-free batch holds."""
    return len(batch["cu_seq_lens_q"]) - 1


def split_documents(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """Cut a padding-free batch between documents into `parts` of about as many tokens, or fewer.

    `batch` is what TRL's collator makes: tensors [1, tokens], the ends of its documents and its longest one. No
    document sees another one and its first token has no loss, so that the sum of the parts' losses is the batch's.
    """
    if parts == 1:
        return [dict(batch)]
    ends = batch["cu_seq_lens_q"].tolist()
    tokens = ends[-1]
    cuts = sorted({min(ends, key=lambda end: abs(end - tokens * part / parts)) for part in range(parts + 1)})
    return [_between(batch, first, last, ends) for first, last in pairwise(cuts)]


def _between(batch: Mapping[str, Any], first: int, last: int, ends: list[int]) -> dict[str, Any]:
    own = torch.tensor([end - first for end in ends if first <= end <= last], dtype=torch.int32)
    part: dict[str, Any] = {
        name: value[:, first:last] for name, value in batch.items() if torch.is_tensor(value) and value.dim() == 2
    }
    part |= {name: own for name in DOCUMENT_ENDS if name in batch}
    part |= {name: int(own.diff().max()) for name in LONGEST if name in batch}
    if "seq_idx" in part:
        part["seq_idx"] = part["seq_idx"] - part["seq_idx"][0, 0]
    return part
