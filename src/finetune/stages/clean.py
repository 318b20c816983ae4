"""data/raw -> data/clean: records, tokenizer corpus, quarantine and what was dropped, with every row accounted for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.data.cleaning.chunk_jobs import Rules, examine_all, jobs
from finetune.data.cleaning.counts import check_counts, check_quarantine, funnel, metrics_of, summary
from finetune.data.cleaning.outs import join, write_outs
from finetune.data.cleaning.parts import Parts
from finetune.data.cleaning.selection import select
from finetune.data.shards import store_if_any
from finetune.data_sections import Clean, Fetch
from finetune.io import fresh_folder, write_csv, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("fetch", "clean", "split.validation_share", "split.test_share")


def run(
    raw: Path,
    cleaned_dir: Path,
    metrics: Path,
    funnel_plot: Path,
    sources_plot: Path,
    *,
    fetch: Fetch,
    clean: Clean,
    validation_share: float,
    test_share: float,
) -> None:
    """Parse, repair and examine each row; drop duplicates, contamination and near-duplicates; count everything.

    What `python -m finetune.shard clean` has examined on other machines is taken, if it is of the very same work.
    """
    fresh_folder(cleaned_dir)
    rules = Rules(clean, validation_share, test_share)
    with _scratch(cleaned_dir / ".scratch") as scratch:
        store = store_if_any("clean", rules.to_json())
        parts = Parts(examine_all(raw, jobs(raw, fetch.sources), rules, scratch, store))
        # Written before the checks: whoever has to mend the data needs the file that says what to mend.
        join(parts, "quarantine", cleaned_dir / "quarantine.jsonl")
        join(parts, "repaired", cleaned_dir / "repaired.jsonl")
        check_quarantine(parts.parts, clean.max_quarantined_share, cleaned_dir / "quarantine.jsonl")
        gone = select(parts, clean, fetch.names("decontamination"), scratch)
        counts = write_outs(parts, gone, {source.name: source.use for source in fetch.sources}, cleaned_dir)
    check_counts(counts)
    numbers = metrics_of(counts)
    write_json(metrics, numbers)
    write_csv(funnel_plot, ("source", "step", "rows"), funnel(counts))
    write_csv(
        sources_plot,
        ("source", "rows", "characters"),
        [(source, own.kept, own.characters) for source, own in counts.items()],
    )
    logger.info(summary(numbers))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    stage_main(run, PARAMS)
