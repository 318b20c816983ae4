"""Servers as a team meets them: dead, mute, dying, behind a password, and `make mlflow` on loopback only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from promotion_versions import NAME, register
from registry_server import free_port, is_open, mlflow_server, wait_until_open

from finetune.errors import TrackingError
from finetune.tracking import client as tracking_client
from finetune.tracking.client import PATIENT, QUICK, connect, log_now, refusals
from finetune.tracking.promotion import promote

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "ann", "hunter2-hunter2"


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_a_server_that_never_answers_is_given_up_within_ten_seconds(
    mute_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute_port}")
    started_s = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLflow failed(.|\n)*start the server(.|\n)*then `make register`"):
        connect(PATIENT)
    assert time.monotonic() - started_s < 10


def test_register_and_promote_of_a_dead_server_end_in_seconds_and_read_no_model(tmp_path: Path) -> None:
    """The two programs as DVC and make start them: their paths do not exist, and are not looked at."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://{USER}:{PASSWORD}@127.0.0.1:{free_port()}"}
    stage = ["finetune.stages.register", *(f"no/{number}" for number in range(16))]
    promotion = ["finetune.tracking", "promote", "--name", NAME]
    for arguments, again in ((stage, "make register"), (promotion, "make promote")):
        (tmp_path / "params.yaml").write_bytes((ROOT / "recipes/smoke/params.yaml").read_bytes())
        started_s = time.monotonic()
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"then `{again}`" in done.stderr
        assert PASSWORD not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
        # 15 s are promised; two cores may be busy with other tests.
        assert time.monotonic() - started_s < 30


def test_a_server_that_dies_on_the_way_is_an_error_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    # What waits for a server that restarts would wait half a minute here.
    monkeypatch.setattr(tracking_client, "PATIENT", QUICK)
    with mlflow_server(tmp_path, port=port) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = connect(QUICK)
        run_id = client.create_run("0").info.run_id
        log_now(client, run_id, [(1, "train_loss", 4.0)])
    with pytest.raises(TrackingError, match="MLflow failed"), refusals():
        log_now(client, run_id, [(2, "train_loss", 3.0)])
    with mlflow_server(tmp_path, port=port):
        log_now(connect(QUICK), run_id, [(2, "train_loss", 3.0)])
        assert [point.step for point in client.get_metric_history(run_id, "train_loss")] == [1, 2]


def test_make_mlflow_is_reached_from_this_machine_only(tmp_path: Path) -> None:
    port = free_port()
    make = ["make", "--no-print-directory", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "-o", "setup", "mlflow"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": "", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with (tmp_path / "log").open("wb") as log:
        shown = subprocess.Popen(
            [*make, f"MLFLOW_PORT={port}"], env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_open(port, shown, tmp_path / "log")
        others = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        # All of 127.0.0.0/8 is this machine; a server on every address would answer at 127.0.0.2 too.
        for host in {"127.0.0.2", *others} - {"127.0.0.1"}:
            assert not is_open(port, host), host
    finally:
        os.killpg(shown.pid, signal.SIGKILL)
        shown.wait(30)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for a name and a password, as docs/registry.md starts one."""
    pytest.importorskip("flask_wtf", reason="Flask-WTF is missing: pip install Flask-WTF (requirements/server.txt)")
    folder = tmp_path_factory.mktemp("guarded")
    settings = {"default_permission": "READ", "database_uri": f"sqlite:///{folder}/users.db"}
    settings |= {"admin_username": USER, "admin_password": PASSWORD}
    settings |= {"authorization_function": "mlflow.server.auth:authenticate_request_basic_auth"}
    lines = ["[mlflow]", *(f"{key} = {value}" for key, value in settings.items())]
    (folder / "auth.ini").write_text("\n".join(lines) + "\n")
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32}
    with mlflow_server(folder, "--app-name", "basic-auth", **environment) as address:
        yield address


@pytest.mark.parametrize(("user", "password"), [(USER, "wrong-wrong-wrong"), ("bob", PASSWORD), ("", "")])
def test_wrong_credentials_are_refused_at_once_and_never_shown(
    guarded: str, user: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(TrackingError) as caught:
        connect(PATIENT)
    assert "MLflow failed" in str(caught.value)
    assert caught.value.remedy == (
        "`export MLFLOW_TRACKING_USERNAME=` and `MLFLOW_TRACKING_PASSWORD=` of this server, then `make register`"
    )
    assert not password or password not in str(caught.value)


def test_with_the_right_credentials_a_version_is_registered_and_promoted(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    client: Any = connect(PATIENT)
    assert register(client, 2.0) == "1"
    assert promote(client, NAME).decision == "promoted"


def test_who_may_only_read_is_told_so(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    from mlflow.server import get_app_client

    get_app_client("basic-auth", tracking_uri=guarded).create_user("reader", "reader-password")
    if not connect(PATIENT).search_registered_models():
        register(connect(PATIENT), 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "reader-password")
    client = connect(PATIENT)
    with pytest.raises(TrackingError, match="administrator") as caught, refusals("make promote"):
        client.set_registered_model_alias(NAME, "champion", "1")
    assert "reader-password" not in str(caught.value)
