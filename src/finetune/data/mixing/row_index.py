"""One pass over the token rows -> what split, mix and packing decide on: a few numbers per row, in NumPy.

Ids, groups and answers are known by the first 64 bits of a hash. With 10 million of each, the chance that two of them
are taken for one is 1 in 300,000.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pyarrow import compute

from finetune.data.splits import SPLITS, SplitName
from finetune.errors import DataError

# A shorter answer ("Oui, bien sûr.") is said again by chance, and to know it is no proof of having seen the record.
MIN_ANSWER_TOKENS = 8
TRAIN = SPLITS.index("train")
Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowIndex:
    """The token rows in their order, about 30 bytes each.

    `keys`, `groups`: hash of id and group. `sources`: number of the source in `source_names`, which are sorted.
    `splits`: number of the split in SPLITS. `tokens`, `trained_tokens`: of the row, the first token never counted as
    trained, as nothing predicts it. `left_out`: held-out rows that share an answer with a row of train.
    """

    source_names: tuple[str, ...]
    keys: Hashes
    groups: Hashes
    sources: Integers
    splits: npt.NDArray[np.int8]
    tokens: Integers
    trained_tokens: Integers
    left_out: Mask

    def of_split(self, name: SplitName) -> Mask:
        """Which rows are in a split, those that are left out not counted."""
        in_split: Mask = self.splits == SPLITS.index(name)
        return in_split & ~self.left_out


class _Part(NamedTuple):
    """The columns of one batch; `sources` counts in the batch's own `source_names`."""

    source_names: list[str]
    keys: Hashes
    groups: Hashes
    sources: Integers
    splits: npt.NDArray[np.int8]
    tokens: Integers
    trained_tokens: Integers


def read_index(batches: Iterable[Any], validation_share: float, test_share: float) -> RowIndex:
    """Index the token rows of Arrow record batches (schema TOKENS), assign splits, find the rows to leave out.

    A model that has learned an answer by heart would be praised for it: a held-out row is left out if one of its runs
    of MIN_ANSWER_TOKENS trained tokens or more is, whole, such a run of a row of train.
    Raises DataError when two rows have one id.
    """
    parts: list[_Part] = []
    learned: list[Hashes] = []
    held_out: list[Hashes] = []
    held_out_rows: list[npt.NDArray[np.int64]] = []
    rows = 0
    for batch in batches:
        part, answers, answer_rows = _read(batch, validation_share, test_share)
        of_train = part.splits[answer_rows] == TRAIN
        learned.append(answers[of_train])
        held_out.append(answers[~of_train])
        held_out_rows.append(answer_rows[~of_train] + rows)
        rows += len(part.keys)
        parts.append(part)
    if not parts:
        raise DataError("no row came in", "data/tokens/tokens.parquet", "run `dvc repro`")
    left_out = np.zeros(rows, np.bool_)
    left_out[np.concatenate(held_out_rows)[_among(np.concatenate(held_out), _sorted(learned))]] = True
    names = tuple(sorted({name for part in parts for name in part.source_names}))
    index = RowIndex(
        names,
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.groups for part in parts]),
        np.concatenate([_numbers(part.source_names, names)[part.sources] for part in parts]),
        np.concatenate([part.splits for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.trained_tokens for part in parts]),
        left_out,
    )
    if doubles := rows - len(np.unique(index.keys)):
        raise DataError(f"{doubles} of {rows} ids repeat another", "data/tokens/tokens.parquet", "report this as a bug")
    return index


def assign_all(groups: Hashes, validation_share: float, test_share: float) -> npt.NDArray[np.int8]:
    """What `splits.assign` says of each group, by the group's hash: numbers of SPLITS."""
    position = groups / 2.0**64
    held_out = np.where(position < test_share, SPLITS.index("test"), SPLITS.index("validation"))
    return np.where(position < test_share + validation_share, held_out, TRAIN).astype(np.int8)


def text_hashes(texts: Iterable[str]) -> Hashes:
    """The first 64 bits of each text's SHA-256: sorted by it, texts are in the order of their whole SHA-256."""
    digests = b"".join(hashlib.sha256(text.encode("utf-8")).digest()[:8] for text in texts)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def bytes_of(numbers: Any) -> memoryview:
    """The memory of a NumPy array, as bytes."""
    return memoryview(numbers).cast("B")


def _read(batch: Any, validation_share: float, test_share: float) -> tuple[_Part, Hashes, npt.NDArray[np.int64]]:
    """The columns of a batch, the hashes of its answers and the row of each."""
    tokens = _lengths(batch.column("input_ids"))
    if not np.array_equal(tokens, _lengths(batch.column("trained"))):
        raise DataError("input_ids and trained differ in length", "data/tokens/tokens.parquet", "report this as a bug")
    learn: Mask = batch.column("trained").flatten().to_numpy(zero_copy_only=False)
    ids = batch.column("input_ids").flatten().to_numpy()
    ends = np.cumsum(tokens, dtype=np.int64)
    starts = ends - tokens
    before = np.concatenate([[0], np.cumsum(learn, dtype=np.int64)])
    sources, groups = (batch.column(name).dictionary_encode() for name in ("source", "group"))
    group_hashes = text_hashes(groups.dictionary.to_pylist())[groups.indices.to_numpy()]
    part = _Part(
        source_names=sources.dictionary.to_pylist(),
        keys=text_hashes(batch.column("id").to_pylist()),
        groups=group_hashes,
        sources=sources.indices.to_numpy(),
        splits=assign_all(group_hashes, validation_share, test_share),
        tokens=tokens,
        trained_tokens=(before[ends] - before[np.minimum(starts + 1, ends)]).astype(np.int32),
    )
    run_starts, run_ends = _runs(learn, starts)
    rows = np.searchsorted(ends, run_starts, side="right")
    return part, _answer_hashes(bytes_of(ids), 4 * run_starts, 4 * run_ends), rows


def _lengths(lists: Any) -> Integers:
    lengths: Integers = compute.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int32)
    return lengths


def _runs(learn: Mask, row_starts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and ends of the answers: runs of trained tokens of one row, of MIN_ANSWER_TOKENS at least."""
    edges = np.zeros(len(learn) + 1, np.bool_)
    edges[row_starts] = True
    edges[-1] = True
    edges[1:-1] |= learn[1:] != learn[:-1]
    places = np.flatnonzero(edges)
    starts, ends = places[:-1], places[1:]
    answers = learn[starts] & (ends - starts >= MIN_ANSWER_TOKENS)
    return starts[answers], ends[answers]


def _answer_hashes(content: memoryview, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Hashes:
    """Hashes of the bytes of `content` from each start to its end."""
    places = zip(starts.tolist(), ends.tolist(), strict=True)
    digests = b"".join(hashlib.blake2b(content[start:end], digest_size=8).digest() for start, end in places)
    return np.frombuffer(digests, dtype=np.uint64)


def _sorted(hashes: Sequence[Hashes]) -> Hashes:
    whole = np.concatenate(hashes)
    whole.sort()
    return whole


def _among(values: Hashes, whole: Hashes) -> Mask:
    """Which values are in `whole`, which is sorted."""
    if not len(whole):
        return np.zeros(len(values), np.bool_)
    found: Mask = whole[np.minimum(np.searchsorted(whole, values), len(whole) - 1)] == values
    return found


def _numbers(names: Sequence[str], all_names: Sequence[str]) -> Integers:
    return np.array([all_names.index(name) for name in names], np.int32)
