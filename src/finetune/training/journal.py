"""the trainer's steps -> train_log.jsonl and a progress bar: the run's own record, on disk before anything else."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetune.errors import NotFiniteError
from finetune.io import write_text
from finetune.log import progress_bar

LOG_FILE = "train_log.jsonl"
TIME = "time_s"
LOG_COLUMNS = (
    "step",
    "train_loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "trained_tokens",
    "skipped_steps",
)
GIB = 1 << 30
LogEntry = dict[str, float | None]
Seen = Callable[[int, int], None]


class Journal:
    """The log of one run in `folder`; entries above `step` belong to a state that is gone, and are dropped.

    Every process keeps the entries, one of them `writes` them, each with the time, which is no part of the result.
    """

    def __init__(self, folder: Path, step: int, *, writes: bool) -> None:
        self.path, self.writes = folder / LOG_FILE, writes
        lines = [line for line in read_log(self.path) if (line["step"] or 0) <= step]
        self.entries = [{name: value for name, value in line.items() if name != TIME} for line in lines]
        if writes:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, entry: LogEntry) -> None:
        """Add one line, flushed to the disk."""
        self.entries.append(entry)
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({**entry, TIME: round(time.time(), 3)}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())


class StepBar:
    """A progress bar over optimizer steps that shows loss, tokens a second and memory."""

    def __init__(self, steps: int, done: int) -> None:
        self.bar: tqdm[Any] = progress_bar(steps, done, "step", "train")
        self.since_s = time.monotonic()

    def show(self, step: int, loss: float, tokens: int) -> None:
        """Move to `step`; `tokens` went through the model since the last call."""
        now_s = time.monotonic()
        rate = tokens / max(now_s - self.since_s, 1e-9)
        self.since_s = now_s
        memory = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if torch.cuda.is_available() else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s{memory}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


def read_log(path: Path) -> Iterator[LogEntry]:
    """The lines of a log; a last one torn by a crash is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def log_rows(entries: Sequence[LogEntry]) -> list[list[object]]:
    """The entries as CSV rows in the order of LOG_COLUMNS; empty where a step was not validated."""
    return [["" if entry[name] is None else entry[name] for name in LOG_COLUMNS] for entry in entries]


def best_validation(entries: Sequence[LogEntry], min_improvement: float) -> tuple[int, int]:
    """(step of the best validation, validations since then); step 0 before the first.

    A validation is better than the best one when its loss is lower by more than `min_improvement`.
    """
    best, step, since = math.inf, 0, 0
    for entry in entries:
        loss = entry["validation_loss"]
        if loss is None:
            continue
        if loss < best - min_improvement:
            best, step, since = loss, int(entry["step"] or 0), 0
        else:
            since += 1
    return step, since


def check_finite(entry: Mapping[str, float | None]) -> None:
    """Raise NotFiniteError when a figure of an entry is NaN or infinite."""
    if bad := [name for name, value in entry.items() if value is not None and not math.isfinite(value)]:
        raise NotFiniteError(
            f"{', '.join(bad)} is not a finite number at step {entry['step']}",
            "train_qlora",
            "lower train_qlora.learning_rate or max_gradient_norm; the last good checkpoint is kept",
        )
