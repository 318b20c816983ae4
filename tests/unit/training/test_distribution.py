"""The processes of a training: started with their numbers, told of signals once, ended together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from finetune.errors import DeviceError
from finetune.training import distribution
from finetune.training_sections import Distribution

REPOSITORY = Path(__file__).resolve().parents[3]
TWO = Distribution(strategy="ddp", processes=2)


def run_children(folder: Path, patch: pytest.MonkeyPatch, source: str) -> int | None:
    (folder / "light_child.py").write_text(source, encoding="utf-8")
    patch.setenv("PYTHONPATH", str(folder))
    return distribution.relaunch_if_needed(TWO, "light_child", [str(folder)], 3)


def test_children_are_told_who_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import json, os, pathlib, sys
names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps([os.environ[name] for name in names]))
"""
    assert run_children(tmp_path, monkeypatch, source) == 0
    assert json.loads((tmp_path / "0").read_text()) == ["0", "2", "2", "127.0.0.1", "3"]
    assert json.loads((tmp_path / "1").read_text()) == ["1", "2", "2", "127.0.0.1", "3"]


def test_a_failed_child_gives_its_code_and_takes_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "GRACE_S", 0.5)
    source = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    start_s = time.monotonic()
    assert run_children(tmp_path, monkeypatch, source) == 3
    assert time.monotonic() - start_s < 20


def test_a_child_killed_by_the_kernel_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    assert run_children(tmp_path, monkeypatch, source) == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_child_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    source = """
import os, pathlib, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
pathlib.Path(sys.argv[1], "ready" + os.environ["RANK"]).touch()
until = time.monotonic() + 30
while not got and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(0.5)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(map(str, map(int, got))))
sys.exit(75)
"""

    def send() -> None:
        while not ((tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert run_children(tmp_path, monkeypatch, source) == 75
    sender.join()
    assert [(tmp_path / rank).read_text() for rank in "01"] == [str(int(number))] * 2


def test_children_end_when_the_stage_is_killed(tmp_path: Path) -> None:
    relaunch = (
        "from finetune.training.distribution import relaunch_if_needed\n"
        "from finetune.training_sections import Distribution\n"
        "two = Distribution(strategy='ddp', processes=2)\n"
        f"relaunch_if_needed(two, 'child', [{str(tmp_path)!r}], 1)\n"
    )
    (tmp_path / "child.py").write_text(
        f"import os, pathlib, sys, time\n{relaunch}"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(tmp_path)])}
    with subprocess.Popen([sys.executable, "-c", relaunch], env=environment) as process:
        while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    children = [int((tmp_path / rank).read_text()) for rank in "01"]
    until_s = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_one_process_goes_on_by_itself() -> None:
    assert distribution.relaunch_if_needed(Distribution(strategy="single", processes=1), "nothing", [], 1) is None
    assert distribution.writes_files()


def test_another_number_of_processes_than_the_settings_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DeviceError, match=r"4 process.* processes is 2(.|\n)*distribution.processes: 4"):
        distribution.relaunch_if_needed(TWO, "nothing", [], 1)


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="2 processes need as many GPUs, 1 are visible"):
        distribution.relaunch_if_needed(TWO, "nothing", [], 1)
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match="2 processes need as many GPUs, 1 are visible"):
        distribution.relaunch_if_needed(TWO, "nothing", [], 1)


def test_accelerate_reads_the_configurations_and_starts_two_machines(tmp_path: Path) -> None:
    assert load_config_from_file(str(REPOSITORY / "distributed" / "one_node.yaml")).num_machines == 1
    (tmp_path / "child.py").write_text(
        "import os, pathlib, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(' '.join(os.environ[name] for name in names))\n",
        encoding="utf-8",
    )
    config = REPOSITORY / "distributed" / "several_nodes.yaml"
    numbers = ["--num_machines", "2", "--num_processes", "2", "--main_process_port", "29541"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *numbers]
    machines = [
        subprocess.Popen(
            [*launcher, "--machine_rank", rank, "-m", "child", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        for rank in "01"
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 1", "1 0 2 1"]
