"""A real `mlflow server`, or `mlflow models serve`, on a free port of 127.0.0.1, for the tests that need one."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 120


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_open(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def wait_until_open(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_S
    while not is_open(port):
        if server.poll() is not None or time.monotonic() > until_s:
            raise AssertionError(log.read_text()[-4000:])
        time.sleep(0.1)


@contextmanager
def mlflow_server(folder: Path, *arguments: str, port: int = 0, **environment: str) -> Iterator[str]:
    """Its address; database and artifacts lie in `folder`, and the artifacts go through the server."""
    number = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(number), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, *arguments], env={**variables, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_open(number, server, folder / "server.log")
        yield f"http://127.0.0.1:{number}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


@contextmanager
def models_server(model: str, root: Path, tracking_uri: str) -> Iterator[int]:
    """The port of `mlflow models serve`, started as the README says, from the root of a clone."""
    number = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    # MLflow starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": tracking_uri}
    with (root / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(number)],
            cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_open(number, server, root / "serve.log")
        yield number
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def ask(port: int, body: dict[str, Any], path: str = "/invocations") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()
