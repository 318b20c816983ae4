"""Which of the examined records go because of another one: exact duplicates, contamination, near-duplicates.

Among duplicates the order is: test, validation, training, tokenizer corpus, then the order of sources and files. So
what was held out stays held out when a copy of it is added anywhere; and as the split of a record depends on its own
group alone, growing a source moves no record from one split to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.cleaning.decontamination import contaminated
from finetune.data.cleaning.dedup import duplicates
from finetune.data.cleaning.near_duplicates import band_plan, near_duplicates
from finetune.data.cleaning.parts import EVALUATION, TRAIN, Parts
from finetune.data.cleaning.words import I64, U64
from finetune.data_sections import Clean, Decontamination, NearDuplicates
from finetune.log import logger

DUPLICATE, NEAR_DUPLICATE, CONTAMINATED_BY = "duplicate", "near_duplicate", "contaminated_by_"
HELD_OUT = "held_out"
Bools = NDArray[np.bool_]
# A record that goes, why (a number of `Gone.reasons`), the record that stays for it, their Jaccard or not a number.
GONE = np.dtype([("record", "<i8"), ("reason", "<i2"), ("kept", "<i8"), ("jaccard", "<f8")])


@dataclass(frozen=True)
class Gone:
    """The records that go, by ascending index; one is named for each that stays in its place or that it repeats.

    `partly_compared`: indexes, ascending, of records that stay though not all that may be near were compared with them.
    """

    rows: NDArray[np.void]
    reasons: tuple[str, ...]
    partly_compared: I64


def select(parts: Parts, rules: Clean, evaluation_sets: Sequence[str], scratch: Path) -> Gone:
    """The records that go. `evaluation_sets`: the sources that training must not repeat. Writes below `scratch`."""
    selection = _Selection(parts, evaluation_sets)
    selection.drop_duplicates()
    if rules.decontamination is not None:
        selection.drop_contaminated(rules.decontamination, scratch)
    if rules.near_duplicates is not None:
        selection.drop_near_duplicates(rules.near_duplicates)
    return selection.result()


class _Selection:
    """Records are taken out step by step; memory is about 100 bytes a record."""

    def __init__(self, parts: Parts, evaluation_sets: Sequence[str]) -> None:
        self._parts = parts
        self._populations: NDArray[np.uint8] = parts.column("population")
        self._stays = np.ones(parts.records, dtype=bool)
        self._evaluation_sets = list(evaluation_sets)
        self._reasons = (DUPLICATE, NEAR_DUPLICATE, *(CONTAMINATED_BY + name for name in (HELD_OUT, *evaluation_sets)))
        self._gone = [np.zeros(0, dtype=GONE)]
        self._partly_compared = np.zeros(0, dtype=np.int64)

    def drop_duplicates(self) -> None:
        """Exact duplicates: of equal records the first in the order above stays."""
        by_rank = self._by_rank()
        gone, kept = duplicates(self._parts.column("key")[by_rank])
        self._drop(by_rank[gone], DUPLICATE, by_rank[kept])

    def drop_contaminated(self, rules: Decontamination, scratch: Path) -> None:
        """Training records that share a run of words with a held-out record or an evaluation set."""
        sets = np.where(self._populations < TRAIN, 0, -1).astype(np.int16)
        for part, records in self._parts.ranges():
            if part.source in self._evaluation_sets:
                sets[records] = 1 + self._evaluation_sets.index(part.source)
        found = contaminated(self._parts, sets, self._stays, rules.ngram_words, scratch)
        for number in np.unique(found.sets):
            chosen = found.sets == number
            reason = self._reasons[2 + int(number)]
            self._drop(found.records[chosen], reason, found.repeated[chosen])

    def drop_near_duplicates(self, rules: NearDuplicates) -> None:
        """Records too similar to one that stays."""
        by_rank, bands = self._by_rank(), band_plan(rules.min_jaccard, rules.permutations)
        keys: Iterator[U64] = (self._parts.band(band)[by_rank] for band in range(bands.count))
        found, partly_compared = near_duplicates(
            keys, lambda rank: self._parts.words(int(by_rank[rank])), rules.min_jaccard, rules.shingle_words
        )
        gone = by_rank[[near.rank for near in found]] if found else np.zeros(0, np.int64)
        kept = by_rank[[near.kept for near in found]] if found else np.zeros(0, np.int64)
        self._drop(gone, NEAR_DUPLICATE, kept, np.array([near.jaccard for near in found]))
        if partly_compared:
            logger.warning(
                f"{len(partly_compared)} records share so much with so many others (a template) that they were "
                "compared with a part of these only: near-duplicates among them may stay; counted as `partly_compared`"
            )
        self._partly_compared = np.sort(by_rank[np.array(partly_compared, dtype=np.int64)])

    def result(self) -> Gone:
        """All that go; where a record went for one that went itself later, the one that this went for is named."""
        rows = np.concatenate(self._gone)
        rows = rows[np.argsort(rows["record"])]
        while len(rows):
            places = np.minimum(np.searchsorted(rows["record"], rows["kept"]), len(rows) - 1)
            passed_on = rows["record"][places] == rows["kept"]
            if not passed_on.any():
                break
            rows["kept"][passed_on] = rows["kept"][places[passed_on]]
        return Gone(rows, self._reasons, self._partly_compared)

    def _by_rank(self) -> I64:
        """Indexes of the records that stay, evaluation sets left out, in the order above."""
        staying = np.flatnonzero(self._stays & (self._populations < EVALUATION))
        return staying[np.argsort(self._populations[staying], kind="stable")]

    def _drop(self, records: I64, reason: str, kept: I64, jaccard: NDArray[np.float64] | None = None) -> None:
        rows = np.empty(len(records), dtype=GONE)
        rows["record"], rows["reason"], rows["kept"] = records, self._reasons.index(reason), kept
        rows["jaccard"] = np.nan if jaccard is None else jaccard
        self._gone.append(rows)
        self._stays[records] = False
