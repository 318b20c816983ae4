"""What MLflow, its server and its database may do to a training: nothing; and that they get what they missed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mirror_runs import (
    PARAMS_FILE,
    eventually,
    log,
    make_database,
    mirror_of,
    said_until,
    shown_warnings,
    statuses,
    steps,
    use_database,
)
from mlflow.server import app, handlers
from werkzeug.serving import make_server

from finetune.tracking import TrainingMirror


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Path) -> str:
    return use_database(database, tmp_path, monkeypatch)


@pytest.fixture
def mirror(tmp_path: Path) -> TrainingMirror:
    return mirror_of(tmp_path)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    with shown_warnings() as shown:
        yield shown


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


def test_without_a_server_training_goes_on_and_the_curves_are_copied_later(
    tmp_path: Path,
    mirror: TrainingMirror,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:hunter2@127.0.0.1:{closed_port}")
    started_s = time.monotonic()
    with mirror:
        mirror.begin(0)
        log(tmp_path, 1)
        assert time.monotonic() - started_s < 1
        said = said_until(capfd, "training goes on, the figures follow when it answers")
        mirror.finish("cd" * 32)
        ended_s = time.monotonic()
    assert time.monotonic() - ended_s < 11
    assert len(warnings) == 1
    assert "lacks figures of this run: `make register` copies the curves" in warnings[0]
    for text in (warnings[0], said):
        assert "hunter2" not in text
        assert f"http://***@127.0.0.1:{closed_port}" in text


def test_a_server_that_never_answers_holds_only_the_end_up_and_for_seconds(
    tmp_path: Path, mirror: TrainingMirror, silent_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
    started_s = time.monotonic()
    with mirror:
        mirror.begin(0)
        log(tmp_path, 1)
        entered_s = time.monotonic()
    assert entered_s - started_s < 1
    assert time.monotonic() - entered_s < 11
    assert len(warnings) == 1


def test_the_other_processes_of_a_training_have_no_run(tmp_path: Path, warnings: list[str]) -> None:
    with TrainingMirror(tmp_path / "log.jsonl", tmp_path / "telemetry.jsonl", PARAMS_FILE, active=False) as mirror:
        mirror.begin(0)
        mirror.finish("ab" * 32)
    assert statuses(tmp_path) == []
    assert warnings == []


def test_a_process_that_dies_takes_nothing_with_it(
    tmp_path: Path, mirror: TrainingMirror, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with mirror:
        time.sleep(0.2)
        mirror.begin(0)
    assert len(warnings) == 1
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with TrainingMirror(tmp_path / "log.jsonl", tmp_path / "telemetry.jsonl", PARAMS_FILE) as other:
        other.begin(0)
    assert len(warnings) == 2
    assert "no process for MLflow" in warnings[1]


def serve(port: int, store: str, folder: Path) -> multiprocessing.process.BaseProcess:
    """MLflow's own web application in a process of its own, which has mlflow imported already."""

    def run() -> None:
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = store
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
        handlers._tracking_store = None
        make_server("127.0.0.1", port, app, threaded=True).serve_forever()

    server = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    server.start()
    return server


def test_a_server_that_is_killed_and_restarted_has_the_gap_filled_while_training(
    tmp_path: Path,
    mirror: TrainingMirror,
    closed_port: int,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    server = serve(closed_port, store, tmp_path)
    with mirror:
        mirror.begin(0)
        log(tmp_path, 1, 2)
        eventually(lambda: steps(tmp_path) == [1, 2])
        server.kill()
        server.join()
        log(tmp_path, 3, 4)
        said = said_until(capfd, "the figures follow")
        log(tmp_path, 5)
        server = serve(closed_port, store, tmp_path)
        eventually(lambda: steps(tmp_path) == [1, 2, 3, 4, 5])
        mirror.finish("ef" * 32)
    server.kill()
    server.join()
    assert said.count("the figures follow") == 1
    assert statuses(tmp_path) == ["FINISHED"]
    assert warnings == []


def set_write_version(database: Path, version: int) -> None:
    """SQLite takes a file whose write version is above 2 for read-only (https://sqlite.org/fileformat2.html, 1.3.3)."""
    with database.open("r+b") as handle:
        handle.seek(24)
        counter = int.from_bytes(handle.read(4), "big")
        handle.seek(18)
        handle.write(bytes([version]))
        # The change counter tells the connections that are open to read the header again.
        handle.seek(24)
        handle.write((counter + 1).to_bytes(4, "big"))


def test_a_database_that_turns_read_only_and_back_has_the_gap_filled(
    tmp_path: Path, mirror: TrainingMirror, warnings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with mirror:
        mirror.begin(0)
        log(tmp_path, 1)
        eventually(lambda: steps(tmp_path) == [1])
        # The last point is seen before its transaction has closed everything.
        time.sleep(0.5)
        set_write_version(tmp_path / "mlflow.db", 3)
        log(tmp_path, 2)
        said = said_until(capfd, "the figures follow")
        assert "readonly database" in said
        set_write_version(tmp_path / "mlflow.db", 1)
        eventually(lambda: steps(tmp_path) == [1, 2])
    assert statuses(tmp_path) == ["FINISHED"]
    assert warnings == []
