"""MLFLOW_TRACKING_URI -> a client whose store has answered, and what every call to it shares."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Read while mlflow is imported. Its check of requirements asks pip, which fails offline.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"] = "false"
os.environ["MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# SQLite opens a database on a disk that is read-only for reading, and a pool would keep that connection for ever.
os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from finetune.errors import TrackingError
from finetune.lineage import artifact_folder, first_line, shown_uri, tracking_uri

# With mlflow's own limits (7 retries, growing pauses) a dead server holds each call for four minutes.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
FAULTS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)
MAX_BATCH = {"metrics": 1000, "params": 100}
SQLITE = "sqlite:///"


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what MLflow, its database or the network raise into one TrackingError with its remedy."""
    try:
        yield
    except FAULTS as fault:
        remedy = "start the server (`make mlflow`) or `unset MLFLOW_TRACKING_URI`, then `make register`"
        if isinstance(fault, ImportError):
            remedy = f"`{sys.executable} -m pip install {fault.name or 'PACKAGE'}` (the driver), then `make register`"
        raise TrackingError(f"MLflow failed: {first_line(fault)}", shown_uri(), remedy) from fault


def connect(limits: Mapping[str, str]) -> Any:
    """A client whose store has answered once; TrackingError after 10 s at most. Later calls keep to `limits`."""
    os.environ.update(QUICK)
    uri = tracking_uri()
    with refusals():
        if uri.startswith(SQLITE):
            _make_database(Path(uri.removeprefix(SQLITE)))
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    os.environ.update(limits)
    return client


def _make_database(file: Path) -> None:
    """Give a missing database its tables under another name first: killed half-way, it could not be mended."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        # mlflow itself would try for 100 s to open a file in a folder that cannot be written.
        sqlite3.connect(file).close()
        return
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        sqlite3.connect(partial).close()
        mlflow.MlflowClient(tracking_uri=f"{SQLITE}{partial}").search_experiments(max_results=1)
        # A link never replaces a database that another process has made meanwhile.
        with suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def find_experiment(client: Any, name: str) -> str:
    """The id of the experiment of this name, made where it is missing."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifact_folder()))


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Log params in batches that MLflow takes."""
    _log_batches(client, run_id, "params", [Param(key, value) for key, value in sorted(params.items())])


def log_now(client: Any, run_id: str, figures: Sequence[tuple[int, str, float]]) -> None:
    """Log (step, name, value) under the present time."""
    now_ms = round(time.time() * 1000)
    log_points(client, run_id, [(name, value, now_ms, step) for step, name, value in figures])


def log_points(client: Any, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
    """Log (name, value, Unix time in ms, step); a point that the run has already is taken for the same one."""
    _log_batches(client, run_id, "metrics", [Metric(*point) for point in points])


def _log_batches(client: Any, run_id: str, kind: str, entries: Sequence[Any]) -> None:
    for first in range(0, len(entries), MAX_BATCH[kind]):
        client.log_batch(run_id, **{kind: entries[first : first + MAX_BATCH[kind]]})
