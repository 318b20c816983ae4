"""What became of every row of every source: counts that add up, the checks on them, and what plots are drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.cleaning.parts import Part, Tally
from finetune.errors import DataError

Counts = Mapping[str, "SourceCounts"]
MAX_SHARE_OF_SOURCE = 0.5
# By how the reason begins that took most rows, when none is left to train on.
REMEDIES = {
    "contaminated_by_": (
        "the rows repeat held-out or evaluation texts (data/clean/dropped.jsonl names which): give rows of one origin "
        "one group, raise clean.decontamination.ngram_words, or set clean.decontamination to null"
    ),
    "near_duplicate": "add rows that differ, or raise clean.near_duplicates.min_jaccard",
    "duplicate": "add rows that differ",
    "nothing": "add rows with other groups, or lower split.validation_share and split.test_share",
}
OTHER_REMEDY = "loosen the rule that dropped most rows (section clean of params.yaml), or add rows"


@dataclass
class SourceCounts:
    """One source's rows; `characters`, `languages` and `kept_of_split` (training sources only) are of kept records.

    `partly_compared`: kept records that were not compared with all that may be near to them.
    """

    rows_in: int = 0
    kept: int = 0
    kept_of_split: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    near_duplicates: int = 0
    partly_compared: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    repaired_texts: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    languages: Counter[str] = field(default_factory=Counter)

    def add(self, tally: Tally) -> None:
        """Add what became of rows before they were compared."""
        self.rows_in += tally.rows_in
        self.dropped += tally.dropped
        self.quarantined += tally.quarantined
        self.repaired_texts += tally.repaired_texts


def check_quarantine(parts: Sequence[Part], max_share: float, quarantine: object) -> None:
    """Raise DataError when more than `max_share` of all rows, or more than half of one source's, is quarantined.

    A few broken rows are a large share of a small source; but of a source that is mostly broken, `format` or `columns`
    is likely wrong. A `max_share` above one half holds for each source too.
    """
    _check_share(parts, max_share, "", quarantine)
    for source in dict.fromkeys(part.source for part in parts):
        of_source = [part for part in parts if part.source == source]
        _check_share(of_source, max(max_share, MAX_SHARE_OF_SOURCE), f" of source {source}", quarantine)


def _check_share(parts: Sequence[Part], max_share: float, whose: str, quarantine: object) -> None:
    rows = sum(part.tally.rows_in for part in parts)
    reasons: Counter[str] = sum((part.tally.quarantined for part in parts), Counter())
    if rows and reasons.total() / rows > max_share:
        first = next(part.first_fault for part in parts if part.first_fault is not None)
        raise DataError(
            f"{reasons.total()} of {rows} rows{whose} cannot be read ({_listed(reasons)}), more than the share "
            f"{max_share}; the first is {first}",
            quarantine,
            "mend the rows named in that file, or raise clean.max_quarantined_share, then run `dvc repro`",
        )


def check_counts(counts: Counts) -> None:
    """Raise DataError when a row is lost or counted twice, a source has no record left, or the train split none."""
    for source, own in counts.items():
        accounted = own.kept + own.dropped.total() + own.duplicates + own.near_duplicates + own.quarantined.total()
        if accounted != own.rows_in:
            raise DataError(
                f"{own.rows_in} rows came in and {accounted} are accounted for: {_describe(own)}",
                f"fetch.sources, {source}",
                "report this as a bug with the source's file: a row was lost or counted twice",
            )
        if own.kept == 0:
            raise DataError(
                f"nothing is left of source {source}: {_describe(own)}",
                f"fetch.sources, {source}",
                "loosen the rule that dropped the rows (section clean of params.yaml), or remove the source",
            )
    _check_train_split([own for own in counts.values() if own.kept_of_split.total()])


def _check_train_split(trained_on: Sequence[SourceCounts]) -> None:
    total = _total(trained_on)
    if total.kept_of_split["train"]:
        return
    lost = _lost(total)
    cause = max(sorted(lost), key=lambda reason: lost[reason], default="nothing")
    raise DataError(
        f"no record of the train split is left, only of {_listed(total.kept_of_split)}: {_describe(total)}",
        "section clean of params.yaml",
        next((remedy for reason, remedy in REMEDIES.items() if cause.startswith(reason)), OTHER_REMEDY),
    )


def metrics_of(counts: Counts) -> dict[str, Any]:
    """Counts in total and by source, as JSON."""
    total = _total(counts.values())
    return {**_as_json(total), "sources": {source: _as_json(own) for source, own in counts.items()}}


def _total(counts: Iterable[SourceCounts]) -> SourceCounts:
    total = SourceCounts()
    for own in counts:
        for name, value in vars(own).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def funnel(counts: Counts) -> list[tuple[str, str, int]]:
    """Rows (source, step, rows): what comes in, what each step takes away, what is kept."""
    rows = []
    for source, own in counts.items():
        rows.append((source, "rows_in", own.rows_in))
        rows += [(source, f"quarantined_{reason}", count) for reason, count in sorted(own.quarantined.items())]
        rows += [(source, f"dropped_{reason}", count) for reason, count in sorted(own.dropped.items())]
        rows.append((source, "duplicates", own.duplicates))
        rows.append((source, "near_duplicates", own.near_duplicates))
        rows.append((source, "kept", own.kept))
    return rows


def summary(numbers: Mapping[str, Any]) -> str:
    """One line of what `metrics_of` gives."""
    return (
        f"{numbers['rows_in']} rows in = {numbers['kept']} kept + {sum(numbers['dropped'].values())} dropped "
        f"+ {numbers['duplicates']} duplicates + {numbers['near_duplicates']} near-duplicates "
        f"+ {sum(numbers['quarantined'].values())} quarantined; texts repaired: {numbers['repaired_texts']}"
    )


def _describe(counts: SourceCounts) -> str:
    return f"{counts.rows_in} rows in, {counts.kept} kept, {_listed(_lost(counts)) or 'nothing dropped'}"


def _lost(counts: SourceCounts) -> Counter[str]:
    twice = Counter({"duplicate": counts.duplicates, "near_duplicate": counts.near_duplicates})
    return counts.dropped + counts.quarantined + twice


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()) if count)


def _as_json(counts: SourceCounts) -> dict[str, Any]:
    return {
        name: {key: count for key, count in sorted(value.items()) if count} if isinstance(value, Counter) else value
        for name, value in vars(counts).items()
    }
