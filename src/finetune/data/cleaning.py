"""Parsed rows of all sources -> kept records, quarantine, originals of repaired texts, and counts that add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune.data.filters import content_key, reason_to_drop
from finetune.data.record import Record
from finetune.data.repair import MOJIBAKE, repair_record
from finetune.data.rows import Fault, Parsed, Row
from finetune.data_sections import Clean
from finetune.errors import DataError


@dataclass
class SourceCounts:
    """What became of one source's rows; `characters` are those of the kept records."""

    rows_in: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    kept: int = 0
    characters: int = 0
    repaired_texts: Counter[str] = field(default_factory=Counter)


@dataclass
class Cleaned:
    """The result of `clean_rows`: records in source order, then file order."""

    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    originals: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, SourceCounts] = field(default_factory=dict)


def clean_rows(rows_by_source: Iterable[tuple[str, Iterable[Row]]], rules: Clean) -> Cleaned:
    """Repair, filter and deduplicate; the first of equal records stays, over all sources."""
    cleaned, seen = Cleaned(), set[str]()
    for source, rows in rows_by_source:
        counts = cleaned.counts.setdefault(source, SourceCounts())
        for row in rows:
            counts.rows_in += 1
            if isinstance(row, Fault):
                counts.quarantined[row.reason] += 1
                cleaned.faults.append(row)
            else:
                _take(row, rules, counts, cleaned, seen)
        _check_balance(source, counts)
    return cleaned


def check_quarantine(cleaned: Cleaned, max_share: float, quarantine: object) -> None:
    """Raise DataError when more than `max_share` of all rows is quarantined."""
    rows = sum(counts.rows_in for counts in cleaned.counts.values())
    if rows and len(cleaned.faults) / rows > max_share:
        reasons = Counter(fault.reason for fault in cleaned.faults)
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        first = cleaned.faults[0]
        raise DataError(
            f"{len(cleaned.faults)} of {rows} rows cannot be read ({listed}), more than the share {max_share}; "
            f"the first is {first.place.file}:{first.place.line}: {first.reason}: {first.detail}",
            quarantine,
            "mend the rows named in that file, or raise clean.max_quarantined_share, then run `dvc repro`",
        )


def check_kept(cleaned: Cleaned) -> None:
    """Raise DataError when a source has no record left."""
    for source, counts in cleaned.counts.items():
        if counts.kept == 0:
            raise DataError(
                f"nothing is left of source {source}: {_describe(counts)}",
                f"fetch.sources, {source}",
                "loosen the rule that dropped the rows (section clean of params.yaml), or remove the source",
            )


def metrics_of(cleaned: Cleaned) -> dict[str, Any]:
    """Counts by source and in total, as JSON."""
    total = SourceCounts()
    for counts in cleaned.counts.values():
        total.rows_in += counts.rows_in
        total.quarantined += counts.quarantined
        total.dropped += counts.dropped
        total.duplicates += counts.duplicates
        total.kept += counts.kept
        total.characters += counts.characters
        total.repaired_texts += counts.repaired_texts
    by_source = {source: _as_json(counts) for source, counts in cleaned.counts.items()}
    return {**_as_json(total), "sources": by_source}


def funnel(cleaned: Cleaned) -> list[tuple[str, str, int]]:
    """Rows (source, step, rows): what comes in, what each step takes away, what is kept."""
    rows = []
    for source, counts in cleaned.counts.items():
        rows.append((source, "rows_in", counts.rows_in))
        rows += [(source, f"quarantined_{reason}", count) for reason, count in sorted(counts.quarantined.items())]
        rows += [(source, f"dropped_{reason}", count) for reason, count in sorted(counts.dropped.items())]
        rows.append((source, "duplicates", counts.duplicates))
        rows.append((source, "kept", counts.kept))
    return rows


def _take(row: Parsed, rules: Clean, counts: SourceCounts, cleaned: Cleaned, seen: set[str]) -> None:
    repaired = repair_record(row.record, rules)
    record = repaired.record
    counts.repaired_texts += repaired.texts_by_repair
    if repaired.texts_by_repair[MOJIBAKE]:
        place = {"file": row.place.file, "line": row.place.line}
        cleaned.originals.append({**place, "repaired_id": record.id, "original": row.record.to_row()})
    if reason := reason_to_drop(record, rules):
        counts.dropped[reason] += 1
        return
    key = content_key(record)
    if key in seen:
        counts.duplicates += 1
        return
    seen.add(key)
    counts.kept += 1
    counts.characters += len(record.all_text())
    cleaned.records.append(record)


def _check_balance(source: str, counts: SourceCounts) -> None:
    accounted = counts.kept + counts.duplicates + counts.dropped.total() + counts.quarantined.total()
    if accounted != counts.rows_in:
        raise DataError(
            f"{counts.rows_in} rows came in and {accounted} are accounted for: {_describe(counts)}",
            f"fetch.sources, {source}",
            "report this as a bug with the source's file: a row was lost or counted twice",
        )


def _describe(counts: SourceCounts) -> str:
    dropped = {**counts.dropped, **counts.quarantined, "duplicate": counts.duplicates}
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()) if count)
    return f"{counts.rows_in} rows in, {counts.kept} kept, {listed or 'nothing dropped'}"


def _as_json(counts: SourceCounts) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(counts).items()}
