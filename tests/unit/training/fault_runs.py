"""Runs of faulty_run.py that several tests make: whole, killed and started again, and what they end in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faulty_run import STEPS_PER_EPOCH, Forks

from finetune.io import sha256_tree

OUTS = ("adapter", "train_log.csv", "metrics.json")
KILLED, TERMINATED, INTERRUPTED, STOPPED = -9, -15, -2, 75
LAST = 2 * STEPS_PER_EPOCH
# How often a run is killed below; docs/faults.md says the same.
DEATHS_IN_EPOCH_1, DEATHS_IN_EPOCH_2, POWER_FAILURES = 10, 16, 18


@contextmanager
def forks_in(folder: Path, base: Path, tokenizer: Any, **how: Any) -> Iterator[Forks]:
    """The program at work."""
    tokenizer.save_pretrained(folder / "tokenizer")
    started = Forks(folder / "work", base, folder / "tokenizer", **how)
    yield started
    started.close()


class Whole:
    """A run that no death befell: its outs, its events after the log entry of step `count_from`, what it had then."""

    def __init__(self, forks: Forks, place: Path, count_from: int = 0, **job: Any) -> None:
        self.out, self.job = place / "out", job
        code = forks.run(place / "run", self.out, count_from=count_from, snapshot_at=count_from, **job)
        assert code == 0, log_of(place)
        self.hashes, self.log = hashes(self.out), log_of(place)
        seen = json.loads((self.out / "events.json").read_text())
        self.events: list[str] = seen["events"]
        self.until: dict[int, int] = {int(step): count for step, count in seen["marks"].items()}
        self.count_from, self.snapshot = count_from, self.out / "snapshot"


def hashes(out: Path) -> dict[str, str]:
    """Of every out; one that is missing has the hash of nothing."""
    return {name: sha256_tree(out / name) if (out / name).exists() else "" for name in OUTS}


def log_of(place: Path) -> str:
    """What the last run logged."""
    return (place / "out/log.txt").read_text()


def start_again(forks: Forks, place: Path, **job: Any) -> dict[str, str]:
    """Run again as DVC does, which removes the outs first; returns their hashes."""
    before = log_of(place)
    shutil.rmtree(place / "out")
    code = forks.run(place / "run", place / "out", **job)
    assert code == 0, before + log_of(place)
    return hashes(place / "out")
