"""A training under the mirror, small and by hand: its files, its MLflow, and what arrived there."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.tracking import TrainingMirror
from finetune.tracking.client import QUICK, connect

PARAMS_FILE = Path(__file__).parents[2] / "recipes/smoke/params.yaml"
# A process imports mlflow on a busy machine.
START_S = 120
STARTED_S = 1_700_000_000


def make_database(folder: Path) -> Path:
    """An empty database with its tables, whose making takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        connect(QUICK)
    return folder / "mlflow.db"


def use_database(database: Path, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Work in `folder` with a copy of `database`; returns its address."""
    shutil.copy(database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    patch.setenv("DVC_ROOT", str(folder))
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def mirror_of(folder: Path) -> TrainingMirror:
    return TrainingMirror(folder / "log.jsonl", folder / "telemetry.jsonl", PARAMS_FILE)


@contextmanager
def shown_warnings() -> Iterator[list[str]]:
    """The messages of the training process."""
    shown: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("finetune").addHandler(handler)
    yield shown
    logging.getLogger("finetune").removeHandler(handler)


def log(folder: Path, *steps: int, file: str = "log.jsonl", **figures: float) -> None:
    with (folder / file).open("a") as handle:
        for step in steps:
            entry = {"step": step, "time_s": STARTED_S + step, **(figures or {"train_loss": 4.0 / step})}
            handle.write(json.dumps(entry) + "\n")


def eventually(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.05)


def said_until(capfd: pytest.CaptureFixture[str], text: str) -> str:
    """What the mirror's process has written until this text came."""
    said = ""
    until_s = time.monotonic() + START_S
    while text not in said:
        assert time.monotonic() < until_s, said
        time.sleep(0.3)
        said += capfd.readouterr().err
    return said


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """Straight from the database: mlflow's own client keeps connections open."""
    connection = sqlite3.connect(folder / "mlflow.db", timeout=30)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def statuses(folder: Path) -> list[str]:
    return [status for (status,) in rows(folder, "select status from runs")]


def steps(folder: Path) -> list[int]:
    """The steps of the loss in the order in which they arrived."""
    return [step for (step,) in rows(folder, "select step from metrics where key = 'train_loss' order by rowid")]
