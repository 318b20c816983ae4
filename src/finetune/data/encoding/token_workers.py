"""records.jsonl -> tokens.parquet, a range of lines at a time, in as many processes as FINETUNE_WORKERS says.

A range is a piece that another machine may have done (finetune.data.shards): the SHA-256 of its bytes says which.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from finetune.data.encoding.chat import Chat
from finetune.data.encoding.encoder import Encoder, make_encoder
from finetune.data.encoding.tokenizing import (
    Part,
    TokenCounts,
    Totals,
    check_totals,
    line_ranges,
    read_range,
    tokenize_records,
)
from finetune.data.row_groups import READ_ROWS, row_group_writer
from finetune.data.shards import Shard, Store, store_if_any
from finetune.data.tables import TOKENS
from finetune.data.vocabulary.tokenizer_files import load_chat
from finetune.data.workers import ordered_map
from finetune.data_sections import Tokenize
from finetune.io import sha256_tree
from finetune.log import progress_bar

ROWS = "rows.arrow"
# What a worker loads once: the tokenizer's table does not go along with every range.
_LOADED: list[tuple[Chat, Encoder]] = []


class Done(NamedTuple):
    """What came of a range; `taken` out of the store, or `damaged` there and so done here."""

    part: Part
    taken: bool
    damaged: bool


def tokenize_file(records: Path, tokenizer: Path, target: Path, params: Tokenize) -> Totals:
    """Replace `target` by the token rows of the records, in their order; the workers' number changes no byte.

    What `python -m finetune.shard tokenize` has done on other machines is taken, if it is of the very same work. Raises
    DataError when nothing is left to train on; then `target` stays as it was.
    """
    totals, store = Totals(), store_if_any("tokenize", determinants(tokenizer, params))
    done = ordered_map(
        partial(_tokenize_range, records, params, store),
        line_ranges(records),
        initializer=_load,
        initargs=(tokenizer,),
    )
    pieces = taken = damaged = 0
    with row_group_writer(target, TOKENS) as writer, progress_bar(None, 0, "record", "tokenize") as bar:
        for part, was_taken, was_damaged in done:
            pieces, taken, damaged = pieces + 1, taken + was_taken, damaged + was_damaged
            totals.add(part.totals)
            for start in range(0, part.rows.num_rows, READ_ROWS):
                writer.add(part.rows.slice(start, READ_ROWS))
            bar.update(sum(counts.records_in for counts in part.totals.counts.values()))
        check_totals(totals)
    if store is not None:
        store.report(pieces, taken, damaged)
    return totals


def determinants(tokenizer: Path, params: Tokenize) -> dict[str, Any]:
    """What the rows of a range depend on besides its bytes."""
    return {"tokenize": params.model_dump(mode="json"), "tokenizer": sha256_tree(tokenizer)}


def make_shard(records: Path, tokenizer: Path, params: Tokenize, shard: Shard, store: Store) -> Iterator[bool]:
    """Put the rows of one worker's ranges into the store; yields for each whether it had to be made."""
    ranges = list(line_ranges(records))
    own = [places for at, places in enumerate(ranges) if shard.has(at / len(ranges))]
    return ordered_map(partial(_make_piece, records, params, store), own, initializer=_load, initargs=(tokenizer,))


def _load(tokenizer: Path) -> None:
    chat = load_chat(tokenizer)
    _LOADED[:] = [(chat, make_encoder(chat.tokenizer))]


def _tokenize_range(records: Path, params: Tokenize, store: Store | None, places: tuple[int, int]) -> Done:
    found = store.find(_piece(records, places)) if store is not None else None
    if found is not None and found.value is not None:
        return Done(_kept(found.folder, found.value), taken=True, damaged=False)
    return Done(_encode_range(records, params, places), taken=False, damaged=found is not None and found.damaged)


def _encode_range(records: Path, params: Tokenize, places: tuple[int, int]) -> Part:
    chat, encoder = _LOADED[0]
    return tokenize_records(read_range(records, *places), chat, encoder, params)


def _make_piece(records: Path, params: Tokenize, store: Store, places: tuple[int, int]) -> bool:
    return store.make(_piece(records, places), lambda folder: _keep(_encode_range(records, params, places), folder))


def _piece(records: Path, places: tuple[int, int]) -> dict[str, Any]:
    with records.open("rb") as handle:
        handle.seek(places[0])
        return {"records": hashlib.sha256(handle.read(places[1] - places[0])).hexdigest()}


def _keep(part: Part, folder: Path) -> dict[str, Any]:
    """Write the rows of a range; gives its totals as JSON."""
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, TOKENS) as writer:
        writer.write_batch(part.rows)
    counts = {source: {**vars(own), "dropped": dict(own.dropped)} for source, own in part.totals.counts.items()}
    lengths = [[source, bound, count] for (source, bound), count in part.totals.lengths.items()]
    return {**vars(part.totals), "counts": counts, "lengths": lengths}


def _kept(folder: Path, value: dict[str, Any]) -> Part:
    """The part that `_keep` wrote."""
    with pa.memory_map(str(folder / ROWS)) as source:
        rows = pa.ipc.open_file(source).get_batch(0)
    counts = {
        source: TokenCounts(**{**own, "dropped": Counter(own["dropped"])}) for source, own in value["counts"].items()
    }
    lengths = Counter({(source, bound): count for source, bound, count in value["lengths"]})
    return Part(rows, Totals(**{**value, "counts": counts, "lengths": lengths}))
