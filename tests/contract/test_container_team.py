"""The server of docker/compose.team.yaml with its own settings, against a real PostgreSQL and moto's S3 on loopback.

Only the addresses differ from compose's. Runs where `postgres` is installed; the images of compose are not needed.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline_files import ROOT
from ruamel.yaml import YAML

MODULES = {"psycopg2": "psycopg2-binary", "flask_wtf": "Flask-WTF", "boto3": "boto3", "moto": "moto[server]"}
MISSING = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
POSTGRES = [shutil.which(name) for name in ("initdb", "postgres", "psql")]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"pip install -c requirements/lock.txt {' '.join(MISSING)}"),
    pytest.mark.skipif(None in POSTGRES, reason="apt-get install postgresql, and its bin folder on PATH"),
]
LIMIT_S = 90.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_open(port: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert process.poll() is None, f"ended with {process.returncode}"
            assert time.monotonic() < end, "did not open its port"
            time.sleep(0.1)
        else:
            return


def begin(command: list[str], folder: Path, name: str, **given: object) -> subprocess.Popen[str]:
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=folder, **given)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's: that is closed to the user that PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="finetune-team-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def team(folder: Path) -> Iterator[dict[str, str]]:
    """Secrets made by team_env.py, PostgreSQL and S3 with them, and compose's settings of the server for both."""
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.getuid() == 0 else None
    data, sockets, ports = folder / "data", folder / "sockets", [free_port(), free_port()]
    for made in (data, sockets):
        made.mkdir()
        if user:
            shutil.chown(made, user)
    subprocess.run([sys.executable, str(ROOT / "docker/team_env.py")], cwd=folder, check=True)
    values = dict(line.split("=") for line in (folder / ".cache/team.env").read_text().splitlines())
    password = folder / "password"
    password.write_text(values["POSTGRES_PASSWORD"])
    initdb = ["initdb", "--username=mlflow", f"--pwfile={password}", "--auth=scram-sha-256", "--pgdata", str(data)]
    subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=folder)
    place = ["-p", str(ports[0]), "-k", str(sockets), "-c", "listen_addresses=127.0.0.1"]
    started = [
        begin(["postgres", "-D", str(data), *place], folder, "postgres", user=user),
        begin([sys.executable, "-m", "moto.server", "-p", str(ports[1])], folder, "storage"),
    ]
    try:
        for port, process in zip(ports, started, strict=True):
            wait_until_open(port, process)
        create = ["psql", "-h", "127.0.0.1", "-p", str(ports[0]), "-U", "mlflow", "-d", "postgres", "-c"]
        environment = {**os.environ, "PGPASSWORD": values["POSTGRES_PASSWORD"]}
        subprocess.run([*create, "CREATE DATABASE mlflow"], check=True, env=environment, capture_output=True)
        yield settings(values, *ports)
    finally:
        for process in started:
            process.terminate()
            process.wait(timeout=30)


def settings(values: dict[str, str], postgres: int, storage: int) -> dict[str, str]:
    """The server's environment in compose.team.yaml, with its secrets, at these ports."""
    service = YAML(typ="safe", pure=True).load((ROOT / "docker/compose.team.yaml").read_text())["services"]["mlflow"]
    found = {}
    for name, text in service["environment"].items():
        filled = re.sub(r"\$\{(\w+)(?::[?-]([^}]*))?\}", lambda match: values.get(match[1], match[2]), text)
        found[name] = filled.replace("@postgres:5432/", f"@127.0.0.1:{postgres}/").replace(
            "http://storage:9000", f"http://127.0.0.1:{storage}"
        )
    return found


def server(team: dict[str, str], port: int, folder: Path) -> subprocess.Popen[str]:
    """compose's command at another port, which TEAM_HOSTS would name."""
    service = YAML(typ="safe", pure=True).load((ROOT / "docker/compose.team.yaml").read_text())["services"]["mlflow"]
    command = ["127.0.0.1" if word == "0.0.0.0" else word for word in service["command"]]  # noqa: S104
    command[command.index("--port") + 1] = str(port)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    hosts = f"{team['MLFLOW_SERVER_ALLOWED_HOSTS']},127.0.0.1:{port}"
    environment = {
        **inherited,
        **team,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": hosts,
    }
    return begin([sys.executable, "-m", *command], folder, "mlflow", env=environment)


def ask(port: int, user: str, password: str, host: str = "mlflow:5000") -> int:
    """The status of docker/mlflow/healthcheck.py's question."""
    done = subprocess.run(
        [sys.executable, "-c", f"import healthcheck; healthcheck.PORT = {port}; healthcheck.main({host!r})"],
        cwd=ROOT / "docker/mlflow",
        env={**os.environ, "MLFLOW_AUTH_ADMIN_USERNAME": user, "MLFLOW_AUTH_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"healthcheck: (\d+) for Host", done.stderr)
    return int(found[1]) if found else (http.client.OK if done.returncode == 0 else -1)


CLIENT = """
import sys, mlflow, os
name = sys.argv[1]
mlflow.set_experiment("team")
with mlflow.start_run() as run:
    mlflow.log_metric("loss", 1.5)
    mlflow.log_text("bytes in the storage", "note.txt")
print(mlflow.MlflowClient().get_run(run.info.run_id).data.metrics["loss"])
print(mlflow.artifacts.load_text(run.info.artifact_uri + "/note.txt"))
"""


def test_a_teams_server_keeps_runs_in_postgresql_artifacts_in_s3_and_strangers_out(
    team: dict[str, str], folder: Path
) -> None:
    port = free_port()
    for _ in ("makes the bucket", "finds it"):
        command = [sys.executable, str(ROOT / "docker/mlflow/make_bucket.py")]
        subprocess.run(command, env={**os.environ, **team}, check=True, capture_output=True)
    process = server(team, port, folder)
    try:
        wait_until_open(port, process)
        admin, password = team["MLFLOW_AUTH_ADMIN_USERNAME"], team["MLFLOW_AUTH_ADMIN_PASSWORD"]
        assert ask(port, admin, password) == 200
        assert ask(port, admin, secrets.token_hex(8)) == 401
        assert ask(port, admin, "password1234") == 401
        assert ask(port, admin, password, host="evil.example:5000") == 403
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
            "MLFLOW_TRACKING_USERNAME": admin,
            "MLFLOW_TRACKING_PASSWORD": password,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        }
        client = [sys.executable, "-c", CLIENT, "team"]
        done = subprocess.run(client, env=environment, capture_output=True, text=True, check=False, cwd=folder)
        assert done.stdout.splitlines()[-2:] == ["1.5", "bytes in the storage"], done.stdout + done.stderr
        refused = subprocess.run(
            client,
            env={**environment, "MLFLOW_TRACKING_PASSWORD": "wrong"},
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        assert refused.returncode != 0
        assert "401" in refused.stdout + refused.stderr
    finally:
        process.terminate()
        process.wait(timeout=30)
    log = (folder / "mlflow.log").read_text()
    assert not [value for name, value in team.items() if "PASSWORD" in name or "SECRET" in name if value in log]
    assert not list(folder.rglob("mlflow.db"))
