"""Two machines: one trains, registers and pushes; the other has an empty cache, a registry's address and a remote's.

Both ways: the registry holds the files (`mode: upload`), and it only names them (`mode: reference`, by DVC's remote, an
S3 server). The recipe is smoke with fewer steps: what counts is that the bytes arrive, and that they answer.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clone import clone, git, repro, run

from finetune.io import sha256_file

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1200)]
moto = pytest.importorskip("moto.server", reason="pip install -r requirements/dev.txt -c requirements/lock.txt")
pytest.importorskip("dvc_s3", reason="pip install -r requirements/remotes.txt -c requirements/lock.txt")

# Steps of training, of pre-training, and answers: what takes time and does not matter here.
FEWER = (
    ("pretrain_steps: 200", "pretrain_steps: 20"),
    ("epochs: 5", "epochs: 1"),
    ("answers_per_task: 8", "answers_per_task: 1"),
    ("samples_per_source: 2", "samples_per_source: 1"),
)
KEYS = {"AWS_ACCESS_KEY_ID": "ann", "AWS_SECRET_ACCESS_KEY": "hunter2"}


@dataclass(frozen=True)
class Machines:
    """Where the model was made, the clone of the other machine, what its environment says, and the remote's address."""

    first: Path
    other: Path
    environment: dict[str, str]
    remote: str


def change(folder: Path, *pairs: tuple[str, str]) -> None:
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    git(folder, "commit", "--quiet", "--all", "--message", "Change params.yaml")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while not answers(f"{address}/health"):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < until_s
        time.sleep(0.3)
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def remote() -> Iterator[str]:
    """The address of an S3 server with the bucket `team`."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/team", method="PUT")).close()  # noqa: S310
    yield address
    server.stop()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()  # noqa: S310
    except (urllib.error.URLError, OSError):
        return False
    return True


def set_remote(folder: Path, address: str) -> None:
    for words in (["add", "--default", "team", "s3://team/dvc"], ["modify", "team", "endpointurl", address]):
        done = run([sys.executable, "-m", "dvc", "remote", words[0], "--local", *words[1:]], folder)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, registry: str, remote: str) -> Machines:
    first = clone(tmp_path_factory.mktemp("first"))
    change(first, *FEWER)
    repro(first, MLFLOW_TRACKING_URI=registry)
    git(first, "commit", "--quiet", "--all", "--message", "Run")
    # In another experiment, or it would be the same run, which holds the files by now.
    change(first, ("mode: upload", "mode: reference"), ("experiment: finetune", "experiment: by-reference"))
    repro(first, "register", MLFLOW_TRACKING_URI=registry)
    set_remote(first, remote)
    pushed = make(first, "push", **KEYS)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    # A commit's files and its history alone: neither the cache nor the remote's address travels with it.
    other = tmp_path_factory.mktemp("other") / "clone"
    git(first, "clone", "--quiet", str(first), str(other))
    assert not (other / ".dvc/config.local").exists()
    return Machines(first, other, {"MLFLOW_TRACKING_URI": registry, **KEYS}, remote)


def make(folder: Path, target: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "--old-file", "setup", target, *arguments]
    return run(command, folder, **environment)


def check_pulled(machines: Machines, folder: Path, output: str) -> None:
    figures = json.loads((machines.first / "metrics/quantize_gguf.json").read_text(encoding="utf-8"))["types"]
    file = folder / "model-Q8_0.gguf"
    assert sha256_file(file) == figures["Q8_0"]["sha256"] == sha256_file(machines.first / "models/gguf/model-Q8_0.gguf")
    assert f"SHA-256 {figures['Q8_0']['sha256']}" in output
    command = re.search(r"^python -m (finetune\.chat .*)$", output, re.MULTILINE)
    assert command is not None
    # The command that is printed, with one question; what a model of so few steps says does not matter.
    words = [sys.executable, "-m", *command[1].split(), "--ask", "Bonjour, quels sont vos horaires ?"]
    answered = run(words, machines.other)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_an_uploaded_version_is_pulled_from_the_registry_alone_and_answers(machines: Machines) -> None:
    done = make(machines.other, "pull", "NAME=finetune-smoke/1", "TO=models/pulled/uploaded", **machines.environment)
    assert done.returncode == 0, done.stderr
    check_pulled(machines, machines.other / "models/pulled/uploaded", done.stdout)


def test_a_version_by_reference_is_pulled_through_the_remote_by_its_alias_and_answers(machines: Machines) -> None:
    refused = make(machines.other, "pull", "NAME=finetune-smoke@challenger", **machines.environment)
    assert refused.returncode != 0
    assert "no DVC remote is set here" in refused.stderr
    set_remote(machines.other, machines.remote)
    done = make(machines.other, "pull", "NAME=finetune-smoke@challenger", **machines.environment)
    assert done.returncode == 0, done.stderr
    assert "finetune-smoke version 2 in models/pulled/finetune-smoke, verified" in done.stdout
    check_pulled(machines, machines.other / "models/pulled/finetune-smoke", done.stdout)
    again = make(machines.other, "pull", "NAME=finetune-smoke@challenger", **machines.environment)
    assert "left as it is" in again.stderr
    assert git(machines.other, "status", "--porcelain") == ""
