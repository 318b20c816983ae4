"""test rows -> the scores of base and tuned, summed over the rows that may not be torn apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer

from finetune.errors import DataError
from finetune.evaluation.perplexity import LogitsOf, Score, model_logits, score, special_ids, trained_text_bytes
from finetune.io import sha256_text
from finetune.log import progress

# By (source, group), and then by the model's name.
GroupScores = dict[tuple[str, str], dict[str, Score]]
COLUMNS = ("source", "rows_sha256", "tokens", "bytes", "base_nats", "tuned_nats")


def base_and_tuned(model: Any) -> dict[str, LogitsOf]:
    """`model_logits` of a PEFT model with its adapter switched off for the length of each call, and on."""
    logits_of = model_logits(model)

    def base_logits_of(ids: list[int]) -> torch.Tensor:
        with model.disable_adapter():
            return logits_of(ids)

    return {"base": base_logits_of, "tuned": logits_of}


def score_groups(
    models: Mapping[str, LogitsOf],
    rows: Iterable[Mapping[str, Any]],
    total: int,
    tokenizer: Tokenizer,
) -> GroupScores:
    """Score every row with a trained token by every model in one pass, summed by (source, group), in that order.

    `total` is the number of rows, for the bar. Raises DataError when no row has a trained token.
    """
    scores: GroupScores = {}
    special = special_ids(tokenizer)
    for row in progress(rows, total, "row", " and ".join(models)):
        ids, trained = row["input_ids"], row["trained"]
        if not any(trained[1:]):
            continue
        size_bytes = trained_text_bytes(tokenizer, special, ids, trained)
        sums = scores.setdefault((row["source"], row["group"]), dict.fromkeys(models, Score()))
        for name, logits_of in models.items():
            sums[name] += score(logits_of(ids), ids, trained, size_bytes)
    if not scores:
        raise DataError(
            "no row of the test split has a trained token", "data/split/test.parquet", "raise split.test_share"
        )
    return dict(sorted(scores.items()))


def score_rows(scores: GroupScores, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str | int | float, ...]]:
    """COLUMNS of every group, sorted: what a later model is compared with, group by group, by finetune.tracking.gate.

    `rows_sha256` is over the sorted ids of the group's rows, which hash their content: whoever has it has scored the
    same texts, with whatever tokenizer. The group's own name, which may be a person's, is left out.
    """
    ids: dict[tuple[str, str], list[str]] = {key: [] for key in scores}
    for row in rows:
        ids.get((row["source"], row["group"]), []).append(row["id"])
    entries = [
        (
            key[0],
            sha256_text("\n".join(sorted(ids[key]))),
            both["tuned"].tokens,
            both["tuned"].text_bytes,
            both["base"].nats,
            both["tuned"].nats,
        )
        for key, both in scores.items()
    ]
    return sorted(entries, key=lambda entry: entry[:2])
