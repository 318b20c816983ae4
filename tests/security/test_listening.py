"""Whatever listens here listens on this machine only, unless a person says otherwise."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny_gguf
from ruamel.yaml import YAML
from serving_child import TEMPLATE, serving, write_served

from finetune.training import distribution
from finetune.training_sections import Distribution

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "::1"}
WAIT_S = 60.0
# Two processes of a training meet, add a number over both, and wait until they have been looked at.
MEETING = """
import os, pathlib, time, torch
from torch import distributed
distributed.init_process_group("gloo")
distributed.all_reduce(number := torch.ones(1))
assert number.item() == 2
pathlib.Path(f"met-{os.environ['RANK']}").touch()
while not pathlib.Path("looked").exists():
    time.sleep(0.05)
"""


def listening(process: psutil.Process) -> set[str]:
    """The addresses that a process and its children take connections at."""
    processes = [process, *process.children(recursive=True)]
    found = [connection for each in processes for connection in each.net_connections("inet")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def test_the_processes_of_a_training_meet_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meeting_child.py").write_text(MEETING, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: set[str] = set()

    def look() -> None:
        until_s = time.monotonic() + WAIT_S
        while len(list(tmp_path.glob("met-*"))) < 2 and time.monotonic() < until_s:
            time.sleep(0.05)
        seen.update(listening(psutil.Process()))
        (tmp_path / "looked").touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    code = distribution.relaunch_if_needed(Distribution(strategy="ddp", processes=2), "meeting_child", [], 1)
    watcher.join()
    assert code == 0
    assert seen
    assert seen <= LOOPBACK


@pytest.mark.parametrize("target", ["serve", "mlflow"])
def test_make_starts_its_servers_on_this_machine_only(tmp_path: Path, target: str) -> None:
    program = tmp_path / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "python $*"\n', encoding="utf-8")
    program.chmod(0o755)
    # Some shells have a HOST of their own.
    environment = {**os.environ, "HOST": "::", "MLFLOW_TRACKING_URI": "", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    command = ["make", "--no-print-directory", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "-o", "setup", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert " --host 127.0.0.1 " in done.stdout


def test_a_server_answers_on_this_machine_only(tmp_path: Path) -> None:
    folder = write_served(tmp_path / "served", tiny_gguf.train_tokenizer(), TEMPLATE, "a")
    with serving(folder, "--port", "0") as server:
        assert listening(psutil.Process(server.process.pid)) == {"127.0.0.1"}


@pytest.mark.parametrize("file", sorted((ROOT / "docker").rglob("*compose*.yaml")), ids=lambda file: file.name)
def test_compose_publishes_ports_on_this_machine_only(file: Path) -> None:
    services = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))["services"]
    ports = [str(port) for service in services.values() for port in service.get("ports", [])]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert [name for name, service in services.items() if service.get("network_mode") == "host"] == []
    assert [name for name, service in services.items() if service.get("privileged")] == []
