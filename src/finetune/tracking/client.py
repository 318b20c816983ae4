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

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from finetune.errors import TrackingError
from finetune.lineage import artifact_folder, first_line, shown_uri, tracking_uri

# With mlflow's own limits (7 retries, growing pauses) a dead server holds each call for four minutes.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
# Outlasts a server that restarts (retries after 0, 4, 8 and 16 s); one that hangs is given up after 10 minutes.
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
FAULTS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)
MAX_BATCH = {"metrics": 1000, "params": 100}
SQLITE = "sqlite:///"


@contextmanager
def refusals(again: str = "make register") -> Iterator[None]:
    """Turn what MLflow, its database or the network raise into one TrackingError; `again`: what to type afterwards."""
    try:
        yield
    except FAULTS as fault:
        raise TrackingError(f"MLflow failed: {first_line(fault)}", shown_uri(), _remedy(fault, again)) from fault


def _remedy(fault: Exception, again: str) -> str:
    code = getattr(fault, "error_code", "")
    if isinstance(fault, ImportError):
        return f"`{sys.executable} -m pip install {fault.name or 'PACKAGE'}` (the driver), then `{again}`"
    if code == "UNAUTHENTICATED":
        return f"`export MLFLOW_TRACKING_USERNAME=` and `MLFLOW_TRACKING_PASSWORD=` of this server, then `{again}`"
    if code in ("PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        return (
            "ask the server's administrator for the permission, or to name this address in its --allowed-hosts; "
            f"then `{again}`"
        )
    if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        return f"`make mlflow` shows what is registered; `make register` registers; then `{again}`"
    return f"start the server (`make mlflow`) or `unset MLFLOW_TRACKING_URI`, then `{again}`"


def connect(limits: Mapping[str, str], again: str = "make register") -> Any:
    """A client whose store has answered once; TrackingError after 10 s at most. Later calls keep to `limits`.

    `again`: what a person types when the store is back.
    """
    os.environ.update(QUICK)
    uri = tracking_uri()
    with refusals(again):
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
