"""Clean records -> token rows, with every dropped record counted by reason and source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune.data.chat import Chat, Encoded, encode_record, special_text_in
from finetune.data.record import Record
from finetune.data.splits import TokenRow, trained_tokens
from finetune.data_sections import Tokenize
from finetune.errors import DataError

LENGTH_BIN_TOKENS = 32


@dataclass
class TokenCounts:
    """What became of one source's records. `trained_tokens` leaves out first tokens, which nothing predicts."""

    records_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    trained_tokens: int = 0
    straddling_tokens: int = 0


@dataclass
class Tokenized:
    """The result of `tokenize_records`; `lengths` counts documents by (source, upper bound in tokens)."""

    rows: list[TokenRow] = field(default_factory=list)
    counts: dict[str, TokenCounts] = field(default_factory=dict)
    lengths: Counter[tuple[str, int]] = field(default_factory=Counter)


def tokenize_records(records: Iterable[Record], chat: Chat, params: Tokenize) -> Tokenized:
    """Encode every record; drop what is too long, spells a special token or keeps no trained token, and count it.

    Raises DataError when nothing is left, and with `over_length: refuse` at the first record that is too long.
    """
    result = Tokenized()
    for record in records:
        counts = result.counts.setdefault(record.source, TokenCounts())
        counts.records_in += 1
        if special_text_in(record, chat) is not None:
            counts.dropped["special_token_in_text"] += 1
            continue
        encoded = encode_record(record, chat, params.loss)
        length = len(encoded.input_ids)
        result.lengths[record.source, -(-length // LENGTH_BIN_TOKENS) * LENGTH_BIN_TOKENS] += 1
        if reason := _reason_to_drop(encoded, record, params):
            counts.dropped[reason] += 1
            continue
        row = _row(record, encoded)
        counts.kept += 1
        counts.tokens += length
        counts.trained_tokens += trained_tokens(row)
        counts.straddling_tokens += encoded.straddling
        result.rows.append(row)
    _check(result)
    return result


def token_metrics(result: Tokenized) -> dict[str, Any]:
    """Counts by source and in total, as JSON."""
    total = TokenCounts()
    for counts in result.counts.values():
        total.records_in += counts.records_in
        total.kept += counts.kept
        total.dropped += counts.dropped
        total.tokens += counts.tokens
        total.trained_tokens += counts.trained_tokens
        total.straddling_tokens += counts.straddling_tokens
    sources = {source: _as_json(counts) for source, counts in result.counts.items()}
    longest = max(len(row["input_ids"]) for row in result.rows)
    return {**_as_json(total), "longest_tokens": longest, "sources": sources}


def _reason_to_drop(encoded: Encoded, record: Record, params: Tokenize) -> str | None:
    length = len(encoded.input_ids)
    if length > params.max_tokens:
        if params.over_length == "refuse":
            raise DataError(
                f"record {record.id} of source {record.source} has {length} tokens, more than {params.max_tokens}",
                "tokenize.max_tokens",
                "raise it, or set tokenize.over_length to drop",
            )
        return "over_length"
    return None if any(encoded.trained[1:]) else "no_trained_token"


def _row(record: Record, encoded: Encoded) -> TokenRow:
    return {
        "id": record.id,
        "source": record.source,
        "group": record.group,
        "language": record.language,
        "input_ids": list(encoded.input_ids),
        "trained": list(encoded.trained),
    }


def _check(result: Tokenized) -> None:
    for source, counts in result.counts.items():
        if counts.records_in != counts.kept + counts.dropped.total():
            raise DataError(f"{counts} does not add up", f"source {source}", "report this as a bug")
    if not result.rows:
        reasons = {source: dict(counts.dropped) for source, counts in result.counts.items()}
        raise DataError(
            f"nothing is left to train on: {reasons or 'no record came in'}",
            "section tokenize",
            "raise tokenize.max_tokens, or add data",
        )


def _as_json(counts: TokenCounts) -> dict[str, Any]:
    return {**vars(counts), "dropped": dict(counts.dropped)}
