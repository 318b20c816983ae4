"""data/raw -> records.jsonl, quarantine.jsonl and repaired.jsonl, with every row accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.cleaning import check_kept, check_quarantine, clean_rows, funnel, metrics_of
from finetune.data.formats import parse_file
from finetune.data.rows import Row
from finetune.data.sources import verified_files
from finetune.data_sections import ChatSource, Clean, CsvSource, Fetch
from finetune.io import write_csv, write_json, write_jsonl
from finetune.log import logger, progress
from finetune.stages._main import stage_main

PARAMS = ("fetch", "clean")


def run(
    raw: Path, cleaned_dir: Path, metrics: Path, funnel_plot: Path, sources_plot: Path, *, fetch: Fetch, clean: Clean
) -> None:
    """Read every raw file by its source's format, then repair, filter, deduplicate and count."""
    rows = ((source.name, progress(_rows(raw, source), None, "row", source.name)) for source in fetch.sources)
    cleaned = clean_rows(rows, clean)
    quarantine = cleaned_dir / "quarantine.jsonl"
    # Written before the checks: whoever has to mend the data needs the file that says what to mend.
    write_jsonl(quarantine, (fault.to_row() for fault in cleaned.faults))
    write_jsonl(cleaned_dir / "repaired.jsonl", cleaned.originals)
    check_quarantine(cleaned, clean.max_quarantined_share, quarantine)
    check_kept(cleaned)
    write_jsonl(cleaned_dir / "records.jsonl", (record.to_row() for record in cleaned.records))
    numbers = metrics_of(cleaned)
    write_json(metrics, numbers)
    write_csv(funnel_plot, ("source", "step", "rows"), funnel(cleaned))
    characters = [(source, counts.kept, counts.characters) for source, counts in cleaned.counts.items()]
    write_csv(sources_plot, ("source", "rows", "characters"), characters)
    logger.info(
        "%d rows in = %d kept + %d dropped + %d duplicates + %d quarantined; texts repaired: %s",
        numbers["rows_in"],
        numbers["kept"],
        sum(numbers["dropped"].values()),
        numbers["duplicates"],
        sum(numbers["quarantined"].values()),
        numbers["repaired_texts"],
    )


def _rows(raw: Path, source: ChatSource | CsvSource) -> Iterator[Row]:
    for file in verified_files(raw, source.name):
        yield from parse_file((raw / file).read_bytes(), file, source)


if __name__ == "__main__":
    stage_main(run, PARAMS)
