"""Clean records -> token rows, with every dropped record counted by reason and source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from finetune.data.encoding.chat import Chat, Encoded, encode_record, special_text_in
from finetune.data.encoding.encoder import Encoder, without_fast_path
from finetune.data.encoding.pieces import Fitted, fit
from finetune.data.record import Record
from finetune.data.tables import TOKENS
from finetune.data_sections import Tokenize
from finetune.errors import DataError
from finetune.tool_forms import dropped_keys

LENGTH_BIN_TOKENS = 32
# What a worker takes at a time: some thousand records, so that no worker waits long for the last one.
RANGE_BYTES = 4 << 20
# Of each range the first record and then every 512th is encoded by the tokenizers library as well.
CHECKED_EVERY = 512


@dataclass
class TokenCounts:
    """What became of one source's records. `trained_tokens` leaves out first tokens, which nothing predicts.

    `rows`: documents written; more than `kept` where records were split. `truncated`: records cut to `max_tokens`;
    `truncated_trained`: those of them that lost trained tokens, so also the stop token at their end.
    `dropped_exchanges`: exchanges that are too long by themselves, in records that were split.
    `tools_cut_by_ollama`: records whose function definitions have keys that Ollama leaves out of its prompts.
    """

    records_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    straddling_tokens: int = 0
    truncated: int = 0
    truncated_trained: int = 0
    cut_tokens: int = 0
    split: int = 0
    split_pieces: int = 0
    dropped_exchanges: int = 0
    tools_cut_by_ollama: int = 0

    def add(self, other: TokenCounts) -> None:
        """Add the counts of other records."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Totals:
    """Counts by source; `lengths`: records by (source, upper bound in tokens), before anything is cut.

    `slow_because`: why tiktoken could not be used, or null.
    """

    counts: dict[str, TokenCounts] = field(default_factory=dict)
    lengths: Counter[tuple[str, int]] = field(default_factory=Counter)
    longest_tokens: int = 0
    slow_because: str | None = None

    def add(self, other: Totals) -> None:
        """Add the totals of other records."""
        for source, counts in other.counts.items():
            self.counts.setdefault(source, TokenCounts()).add(counts)
        self.lengths += other.lengths
        self.longest_tokens = max(self.longest_tokens, other.longest_tokens)
        self.slow_because = other.slow_because


@dataclass(frozen=True)
class Part:
    """The rows of a run of records as an Arrow record batch of the schema TOKENS, and their totals."""

    rows: Any
    totals: Totals


def line_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of about RANGE_BYTES that end at line ends; raises DataError without the file."""
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro`, which makes it")
    size_bytes, start = path.stat().st_size, 0
    with path.open("rb") as handle:
        while start < size_bytes:
            handle.seek(min(start + RANGE_BYTES, size_bytes))
            handle.readline()
            yield start, handle.tell()
            start = handle.tell()


def read_range(path: Path, start: int, end: int) -> Iterator[Record]:
    """The records of a byte range of records.jsonl; raises DataError with the place of a damaged line."""
    with path.open("rb") as handle:
        handle.seek(start)
        while (at := handle.tell()) < end:
            try:
                row = orjson.loads(handle.readline())
            except orjson.JSONDecodeError as fault:
                raise DataError(f"not valid JSON: {fault}", f"{path}, byte {at}", "run `dvc repro` again") from None
            yield Record.from_row(row)


def tokenize_records(records: Iterable[Record], chat: Chat, encoder: Encoder, params: Tokenize) -> Part:
    """Encode every record; what is too long, spells a special token or keeps no trained token is dropped and counted.

    Raises DataError with `over_length: refuse` at the first record that is too long.
    """
    totals = Totals(slow_because=encoder.refusal)
    rows: list[tuple[Record, str, Encoded]] = []
    for number, record in enumerate(records):
        counts = totals.counts.setdefault(record.source, TokenCounts())
        counts.records_in += 1
        counts.tools_cut_by_ollama += record.tools is not None and bool(dropped_keys(orjson.loads(record.tools)))
        if special_text_in(record, chat) is not None:
            counts.dropped["special_token_in_text"] += 1
            continue
        whole = encode_record(record, chat, encoder, params.loss)
        if number % CHECKED_EVERY == 0 and encoder.fast is not None:
            _check_same(whole, encode_record(record, chat, without_fast_path(encoder), params.loss), record)
        length = len(whole.input_ids)
        totals.lengths[record.source, -(-length // LENGTH_BIN_TOKENS) * LENGTH_BIN_TOKENS] += 1
        fitted = fit(record, whole, chat, encoder, params)
        _count(counts, fitted, split=length > params.max_tokens and params.over_length == "split")
        pieces = fitted.documents
        names = [record.id] if len(pieces) == 1 else [f"{record.id}#{at}" for at in range(1, len(pieces) + 1)]
        rows += [(record, name, piece) for name, piece in zip(names, pieces, strict=True)]
        totals.longest_tokens = max([totals.longest_tokens, *(len(piece.input_ids) for piece in pieces)])
    return Part(_batch(rows), totals)


def check_totals(totals: Totals) -> None:
    """Raise DataError when a record is lost, or none is left."""
    for source, counts in totals.counts.items():
        if counts.records_in != counts.kept + counts.dropped.total():
            raise DataError(f"{counts} does not add up", f"source {source}", "report this as a bug")
    if not any(counts.kept for counts in totals.counts.values()):
        reasons = {source: dict(counts.dropped) for source, counts in sorted(totals.counts.items())}
        raise DataError(
            f"nothing is left to train on: {reasons or 'no record came in'}",
            "section tokenize",
            "raise tokenize.max_tokens, or add data",
        )


def token_metrics(totals: Totals) -> dict[str, Any]:
    """Counts by source and in total, as JSON, with the share of tokens that is trained."""
    total = TokenCounts()
    for counts in totals.counts.values():
        total.add(counts)
    sources = {source: _as_json(counts) for source, counts in totals.counts.items()}
    return {**_as_json(total), "longest_tokens": totals.longest_tokens, "sources": sources}


def _check_same(fast: Encoded, slow: Encoded, record: Record) -> None:
    if np.array_equal(fast.input_ids, slow.input_ids) and np.array_equal(fast.trained, slow.trained):
        return
    raise DataError(
        f"tiktoken gives other ids or another mask than the tokenizers library: {len(fast.input_ids)} tokens, "
        f"{fast.trained_tokens()} trained, instead of {len(slow.input_ids)} and {slow.trained_tokens()}",
        f"record {record.id} of source {record.source}",
        "report this as a bug, with the tokenizer: the conditions of finetune.data.encoding.encoder do not suffice",
    )


def _count(counts: TokenCounts, fitted: Fitted, *, split: bool) -> None:
    counts.dropped_exchanges += fitted.dropped_exchanges
    if fitted.reason is not None:
        counts.dropped[fitted.reason] += 1
        return
    counts.kept += 1
    counts.rows += len(fitted.documents)
    counts.tokens += sum(len(document.input_ids) for document in fitted.documents)
    counts.trained_tokens += sum(document.trained_tokens() for document in fitted.documents)
    counts.straddling_tokens += sum(document.straddling for document in fitted.documents)
    counts.truncated += fitted.cut_tokens > 0
    counts.truncated_trained += fitted.lost_trained
    counts.cut_tokens += fitted.cut_tokens
    counts.split += split
    counts.split_pieces += len(fitted.documents) if split else 0


def _batch(rows: list[tuple[Record, str, Encoded]]) -> Any:
    """The rows as Arrow arrays over the concatenated ids and masks, without a Python object per token."""
    offsets = np.concatenate([[0], np.cumsum([len(row.input_ids) for _, _, row in rows], dtype=np.int64)])
    places = pa.array(offsets.astype(np.int32))
    ids = np.concatenate([np.empty(0, np.int32), *(row.input_ids for _, _, row in rows)])
    trained = np.concatenate([np.empty(0, np.bool_), *(row.trained for _, _, row in rows)])
    columns = [
        pa.array([name for _, name, _ in rows], pa.string()),
        pa.array([record.source for record, _, _ in rows], pa.string()),
        pa.array([record.group for record, _, _ in rows], pa.string()),
        pa.array([record.language for record, _, _ in rows], pa.string()),
        pa.ListArray.from_arrays(places, pa.array(ids)),
        pa.ListArray.from_arrays(places, pa.array(trained)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TOKENS)


def _as_json(counts: TokenCounts) -> dict[str, Any]:
    share = round(counts.trained_tokens / max(counts.tokens, 1), 4)
    return {**vars(counts), "dropped": dict(counts.dropped), "trained_share": share}
