"""What connects to MLflow: its errors, and the database that it makes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mirror_runs import eventually, rows

from finetune.errors import TrackingError
from finetune.tracking.client import PATIENT, QUICK, connect


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    code = "from finetune.tracking.client import QUICK, connect; connect(QUICK)"
    making = subprocess.Popen([sys.executable, "-c", code])
    eventually(lambda: any(file.stat().st_size > 0 for file in tmp_path.glob(".mlflow.db.*.partial")))
    making.kill()
    making.wait()
    assert not (tmp_path / "mlflow.db").exists()
    connect(QUICK)
    assert rows(tmp_path, "select name from experiments") == [("Default",)]


def test_a_folder_that_cannot_hold_the_database_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(TrackingError, match=r"MLflow failed(.|\n)*unset MLFLOW_TRACKING_URI"):
        connect(PATIENT)


def test_a_database_without_its_driver_stops_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://ann:hunter2@127.0.0.1:1/mlflow")
    with pytest.raises(TrackingError, match=r"-m pip install psycopg2` \(the driver\), then `make register`") as caught:
        connect(PATIENT)
    assert "hunter2" not in str(caught.value)


def test_a_password_in_the_address_is_never_shown(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:hunter2@127.0.0.1:{closed_port}")
    with pytest.raises(TrackingError, match="MLflow failed") as caught:
        connect(PATIENT)
    assert "hunter2" not in str(caught.value)
    assert f"http://***@127.0.0.1:{closed_port}" in str(caught.value)


def test_the_file_store_that_mlflow_gave_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    with pytest.raises(TrackingError, match="MLflow failed"):
        connect(PATIENT)


@pytest.mark.parametrize("first", ["finetune.stages.register", "finetune.tracking.registry", "finetune.origin"])
def test_mlflow_is_quiet_whichever_module_imports_it_first(first: str) -> None:
    code = f"import {first}, finetune.tracking.client, logging, os; print(logging.getLogger('mlflow').level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "30\n"
