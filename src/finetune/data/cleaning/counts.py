"""What became of every row of every source: counts that add up, the checks on them, and what plots are drawn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.cleaning.parts import Part, Tally
from finetune.errors import DataError

Counts = Mapping[str, "SourceCounts"]


@dataclass
class SourceCounts:
    """One source's rows; `characters` and `languages` are of the kept records."""

    rows_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    near_duplicates: int = 0
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
    """Raise DataError when more than `max_share` of all rows is quarantined."""
    rows = sum(part.tally.rows_in for part in parts)
    reasons: Counter[str] = sum((part.tally.quarantined for part in parts), Counter())
    if rows and reasons.total() / rows > max_share:
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        first = next(part.first_fault for part in parts if part.first_fault is not None)
        raise DataError(
            f"{reasons.total()} of {rows} rows cannot be read ({listed}), more than the share {max_share}; "
            f"the first is {first}",
            quarantine,
            "mend the rows named in that file, or raise clean.max_quarantined_share, then run `dvc repro`",
        )


def check_counts(counts: Counts) -> None:
    """Raise DataError when a row of a source is lost or counted twice, or when a source has no record left."""
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


def metrics_of(counts: Counts) -> dict[str, Any]:
    """Counts in total and by source, as JSON."""
    total = SourceCounts()
    for own in counts.values():
        for name, value in vars(own).items():
            setattr(total, name, getattr(total, name) + value)
    return {**_as_json(total), "sources": {source: _as_json(own) for source, own in counts.items()}}


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
    lost = {**counts.dropped, **counts.quarantined}
    lost |= {"duplicate": counts.duplicates, "near_duplicate": counts.near_duplicates}
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(lost.items()) if count)
    return f"{counts.rows_in} rows in, {counts.kept} kept, {listed or 'nothing dropped'}"


def _as_json(counts: SourceCounts) -> dict[str, Any]:
    return {
        name: {key: count for key, count in sorted(value.items()) if count} if isinstance(value, Counter) else value
        for name, value in vars(counts).items()
    }
