"""The MLflow image: healthy as compose starts it, closed to other hosts, and with users only by their passwords."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engine import Engine, call
from jobs import Job, run, start, stop

UID, WAIT_S = 10001, 120
HOSTS = "mlflow,mlflow:5000,localhost,localhost:5000,127.0.0.1,127.0.0.1:5000"
USERS = ("mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1", "--app-name", "basic-auth")  # noqa: S104
HEALTH = ("python", "/opt/healthcheck.py")

Record = Callable[[str, bool, str], None]


def ask(engine: Engine, job: Job, *command: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command beside the server: in its container, or, where that is a chroot, in another one."""
    flags = [flag for name, value in variables.items() for flag in ("--env", f"{name}={value}")]
    if engine.command:
        return call(engine, *engine.command, "exec", *flags, str(job.name), *command)
    return run(engine, Job(job.image, command, UID, variables=variables))


def server(engine: Engine, image: str, folder: Path, record: Record) -> None:
    """Start both forms of the server and ask them as their clients do."""
    plain = Job(image, uid=UID, name="finetune-check-mlflow", variables={"MLFLOW_SERVER_ALLOWED_HOSTS": HOSTS})
    password = secrets.token_hex(16)
    users = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": HOSTS,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
    }
    _serve(engine, plain, folder / "server.log", {}, {"a foreign host": ({}, "evil.example:5000", 403)}, record)
    team = Job(image, USERS, uid=UID, name="finetune-check-users", variables=users)
    wrong = {**users, "MLFLOW_AUTH_ADMIN_PASSWORD": f"not-{password}"}
    _serve(engine, team, folder / "users.log", users, {"a wrong password": (wrong, "mlflow:5000", 401)}, record)
    for missing in ("MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD"):
        kept = {name: value for name, value in users.items() if name != missing}
        done = run(engine, Job(image, USERS, uid=UID, variables=kept))
        refused = done.returncode != 0 and missing in done.stdout
        record(f"server_with_users_needs_{missing.lower()}", refused, done.stdout[-800:])
    drivers = run(engine, Job(image, ("python", "-c", "import psycopg2, boto3; print('ok')"), uid=UID))
    record("server_has_postgresql_and_s3", drivers.returncode == 0, drivers.stdout[-500:])


def _serve(
    engine: Engine,
    job: Job,
    log: Path,
    credentials: Mapping[str, str],
    refused: Mapping[str, tuple[Mapping[str, str], str, int]],
    record: Record,
) -> None:
    process = start(engine, job, log)
    try:
        end, answer = time.monotonic() + WAIT_S, None
        while time.monotonic() < end and process.poll() is None and (answer is None or answer.returncode != 0):
            answer = ask(engine, job, *HEALTH, "mlflow:5000", variables=credentials)
        name = str(job.name).rpartition("-")[2]
        healthy = answer is not None and answer.returncode == 0
        record(f"server_{name}_is_healthy", healthy, log.read_text()[-2000:])
        for what, (variables, host, status) in refused.items():
            done = ask(engine, job, *HEALTH, host, variables=variables)
            expected = f"healthcheck: {status} for Host {host}"
            record(f"server_{name}_refuses_{what.replace(' ', '_')}", expected in done.stdout, done.stdout[-500:])
    finally:
        stop(engine, job, process, kill=True)
