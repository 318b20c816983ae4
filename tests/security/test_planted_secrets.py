"""Secrets in the environment and in addresses: in no file, no log line and no error message.

tests/pipeline/test_miniatures.py plants them in whole runs and searches everything that these write; here are the ways
that fail, and those that talk most.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hub_server import REVISION, ROOT, TOKEN, State, fetch, serving, source
from pyarrow import parquet
from secret_search import PLANTED, WORDS, leaks, shown

SECRETS = {**WORDS, "HF_TOKEN": TOKEN, "HF_ENDPOINT": "planted-endpoint", "MLFLOW_TRACKING_URI": "planted/of@server"}
LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
BASE = {"kind": "hub", "repo_id": "team/model", "revision": REVISION}


@pytest.fixture
def hub() -> Iterator[State]:
    yield from serving(
        {
            "datasets/team/data": {"data/a.jsonl": LINE},
            "team/model": {"config.json": b"{}", "model.safetensors": b"weights"},
        }
    )


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_password_in_the_hubs_address_is_shown_nowhere(hub: State, tmp_path: Path) -> None:
    address = hub.url.replace("http://", f"http://ann:{SECRETS['HF_ENDPOINT']}@")
    done = fetch(hub, tmp_path, source(), base=BASE, HF_ENDPOINT=address, HF_TOKEN=TOKEN, HF_DEBUG="1", **PLANTED)
    assert done.returncode == 0, done.stderr
    assert {request.authorization for request in hub.of("config.json")} != {None}
    hub.gated = {"datasets/team/data"}
    refused = fetch(hub, tmp_path / "refused", source(), HF_ENDPOINT=address, HF_TOKEN=TOKEN, HF_DEBUG="1", **PLANTED)
    assert "access is restricted (gated repository)" in refused.stderr
    assert shown(done.stdout + done.stderr + refused.stderr, SECRETS) == []
    assert leaks(tmp_path, SECRETS) == []


def test_a_password_in_the_proxys_address_is_shown_nowhere(hub: State, tmp_path: Path, closed_port: int) -> None:
    proxy = f"http://ann:{WORDS['HTTPS_PROXY']}@127.0.0.1:{closed_port}"
    done = fetch(hub, tmp_path, source(), HF_TOKEN=TOKEN, http_proxy=proxy, HTTP_PROXY=proxy, NO_PROXY="", no_proxy="")
    assert done.returncode == 1
    assert "the Hub does not answer, try after try" in done.stderr
    assert hub.requests == []
    assert shown(done.stdout + done.stderr, SECRETS) == []


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a program of this repository prints with all secrets in its environment, wherever it ends."""
    variables = {**os.environ, **PLANTED, "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT / "src"), **environment}
    variables |= {"FINETUNE_LOG_LEVEL": "DEBUG", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=variables, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_server_that_is_away_is_named_without_its_password(tmp_path: Path, closed_port: int) -> None:
    server = f"http://ann:{SECRETS['MLFLOW_TRACKING_URI']}@127.0.0.1:{closed_port}"
    shutil.copy(ROOT / "recipes/smoke/params.yaml", tmp_path)
    command = ["finetune.stages.register", *(str(tmp_path / f"path{number}") for number in range(16))]
    printed = run(command, tmp_path, MLFLOW_TRACKING_URI=server)
    assert "TrackingError: MLflow failed: " in printed
    assert f"where:  http://***@127.0.0.1:{closed_port}" in printed
    assert shown(printed, SECRETS) == []
    assert leaks(tmp_path, SECRETS) == []


def test_the_doctor_names_addresses_without_their_passwords(tmp_path: Path, closed_port: int) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    server = f"http://ann:{SECRETS['MLFLOW_TRACKING_URI']}@127.0.0.1:{closed_port}"
    hub = f"http://ann:{SECRETS['HF_ENDPOINT']}@127.0.0.1:{closed_port}"
    printed = run(["finetune.doctor", "--json"], tmp_path, MLFLOW_TRACKING_URI=server, HF_ENDPOINT=hub)
    assert f"***@127.0.0.1:{closed_port}" in json.dumps(json.loads(printed[printed.index("{") :]))
    assert shown(printed, SECRETS) == []


@pytest.mark.parametrize("secret", sorted(WORDS.values()))
def test_the_search_finds_a_secret_in_whatever_form_it_lies(tmp_path: Path, secret: str) -> None:
    plain = secret.encode()
    pair = base64.b64encode(b"ann:" + plain + b"; more")
    files = {"a": plain, "b.gz": gzip.compress(plain), "c": b"Basic " + pair, "d": zlib.compress(plain)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pa.table({"text": [secret] * 9}), tmp_path / "e.parquet", compression="zstd")
    assert leaks(tmp_path, {"it": secret}) == [f"it in {name}" for name in ("a", "b.gz", "c", "d", "e.parquet")]
    assert leaks(tmp_path, {"it": secret}, but=["b.gz", "c", "d", "e.parquet"]) == ["it in a"]
    assert shown(f"x {secret} y", {"it": secret}) == ["it"]
