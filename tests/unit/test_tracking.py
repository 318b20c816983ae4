from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.server import app, handlers
from werkzeug.serving import BaseWSGIServer, make_server

from finetune import tracking
from finetune.errors import TrackingError
from finetune.lineage import run_params
from finetune.params import load_params

PARAMS_FILE = Path(__file__).parents[2] / "recipes/smoke/params.yaml"
CURVES = {step: {"train_loss": 4.0 / step} for step in (1, 2, 3)}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def serve(port: int) -> BaseWSGIServer:
    """MLflow's own web application on its own thread."""
    server = make_server("127.0.0.1", port, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def stop(server: BaseWSGIServer) -> None:
    server.shutdown()
    server.server_close()


def train(mirror: tracking.TrainingMirror) -> None:
    for step, figures in CURVES.items():
        mirror.log(step, figures)


def runs() -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient()
    return list(client.search_runs([client.get_experiment_by_name("finetune").experiment_id]))


def steps(run_id: str) -> list[int]:
    return sorted(point.step for point in mlflow.MlflowClient().get_metric_history(run_id, "train_loss"))


def register_curves(adapter_sha256: str) -> str:
    """What `make register` does with the curves."""
    client = tracking.connect(tracking.PATIENT)
    params = run_params(load_params(PARAMS_FILE))
    run_id = tracking.find_or_create_run(client, "finetune", adapter_sha256, params)
    tracking.ensure_curves(client, run_id, CURVES)
    return run_id


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The messages that training shows."""
    shown: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("finetune").addHandler(handler)
    yield shown
    logging.getLogger("finetune").removeHandler(handler)


def test_a_finished_training_is_a_tagged_run_with_its_curve(warnings: list[str]) -> None:
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        train(mirror)
        mirror.finish("ab" * 32)
    (run,) = runs()
    assert (run.info.status, run.data.tags["adapter_sha256"]) == ("FINISHED", "ab" * 32)
    assert run.data.params["seed"] == "42"
    assert steps(run.info.run_id) == [1, 2, 3]
    assert register_curves("ab" * 32) == run.info.run_id
    assert steps(run.info.run_id) == [1, 2, 3]
    assert warnings == []


@pytest.mark.parametrize(
    ("fault", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_training_that_ends_early_ends_its_run(fault: type[BaseException], status: str) -> None:
    with pytest.raises(fault), tracking.TrainingMirror(PARAMS_FILE):
        raise fault
    assert [run.info.status for run in runs()] == [status]
    assert "adapter_sha256" not in runs()[0].data.tags


def test_sigterm_ends_the_run_as_killed_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), tracking.TrainingMirror(PARAMS_FILE):
        signal.raise_signal(signal.SIGTERM)
    assert [run.info.status for run in runs()] == ["KILLED"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_goes_on_without_a_server_and_is_copied_later(
    closed_port: int, store: str, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    started_s = time.monotonic()
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        train(mirror)
        mirror.finish("cd" * 32)
    assert time.monotonic() - started_s < 10
    assert len(warnings) == 1
    assert "training goes on, `make register` copies the curves later" in warnings[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert steps(register_curves("cd" * 32)) == [1, 2, 3]


def test_a_server_that_never_answers_holds_training_up_for_seconds_only(
    silent_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
    started_s = time.monotonic()
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        train(mirror)
    assert 3 < time.monotonic() - started_s < 12
    assert len(warnings) == 1


def test_a_server_that_dies_and_returns_has_its_gap_filled(
    closed_port: int, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    # On a busy machine making the database takes longer than a live mirror waits.
    tracking.connect(tracking.QUICK)
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    monkeypatch.setattr(handlers, "_tracking_store", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    server = serve(closed_port)
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        mirror.log(1, CURVES[1])
        stop(server)
        mirror.log(2, CURVES[2])
        mirror.log(3, CURVES[3])
        server = serve(closed_port)
        mirror.finish("ef" * 32)
    assert len(warnings) == 1
    (run,) = runs()
    assert (run.info.status, steps(run.info.run_id)) == ("FINISHED", [1])
    assert register_curves("ef" * 32) == run.info.run_id
    assert steps(run.info.run_id) == [1, 2, 3]
    stop(server)


def test_a_folder_that_cannot_hold_the_database_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(TrackingError, match=r"MLflow failed(.|\n)*unset MLFLOW_TRACKING_URI"):
        tracking.connect(tracking.PATIENT)


def test_a_database_without_its_driver_leaves_training_alone_and_stops_register(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://ann:hunter2@127.0.0.1:1/mlflow")
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        train(mirror)
    assert len(warnings) == 1
    assert "psycopg2" in warnings[0]
    with pytest.raises(TrackingError, match=r"-m pip install psycopg2` \(the driver\), then `make register`") as caught:
        tracking.connect(tracking.PATIENT)
    assert "hunter2" not in str(caught.value) + warnings[0]


def test_a_password_in_the_address_is_never_shown(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:hunter2@127.0.0.1:{closed_port}")
    with tracking.TrainingMirror(PARAMS_FILE) as mirror:
        train(mirror)
    with pytest.raises(TrackingError, match="MLflow failed") as caught:
        tracking.connect(tracking.PATIENT)
    for text in (warnings[0], str(caught.value)):
        assert "hunter2" not in text
        assert f"http://***@127.0.0.1:{closed_port}" in text


def test_the_file_store_that_mlflow_gave_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    with pytest.raises(TrackingError, match="MLflow failed"):
        tracking.connect(tracking.PATIENT)
