"""Nodes that share a folder end in the bytes of one machine, and the death of any ends the others soon and clearly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from node_runs import LIMIT_S, clean_environment, make_repository, outs, start_nodes, two_free_ports

from finetune import multi_node
from finetune.errors import DeviceError, StoppedError
from finetune.training import distribution, join, nodes
from finetune.training.nodes import Line, Node, this_node
from finetune.training_sections import Distribution

TWO = Distribution(strategy="ddp", processes=2)
# Long enough for a death in the middle.
EPOCHS = 12
VARIABLES = {
    "FINETUNE_NODES": "2",
    "FINETUNE_NODE_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


@pytest.fixture(scope="module")
def one_machine(untied_base: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository after `dvc repro` with two processes on one machine."""
    folder = make_repository(tmp_path_factory.mktemp("one") / "repository", untied_base, tiny_tokenizer, epochs=EPOCHS)
    command = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return folder


def repository(folder: Path, base: Path, tokenizer: Any) -> Path:
    return make_repository(folder / "repository", base, tokenizer, epochs=EPOCHS)


def has_checkpoint(folder: Path) -> bool:
    return any((folder / ".cache/checkpoints").glob("*/checkpoint-*"))


@pytest.mark.pipeline
def test_two_nodes_stopped_on_one_of_them_go_on_to_the_bytes_and_the_lock_of_one_machine(
    one_machine: Path, untied_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = repository(tmp_path, untied_base, tiny_tokenizer)
    started = start_nodes(folder)
    started.wait_for(lambda: has_checkpoint(folder))
    started.processes[1].send_signal(signal.SIGTERM)
    assert started.codes() == [75, 75], started.text()
    assert not (folder / "models/adapter").exists()
    again = start_nodes(folder)
    assert again.codes() == [0, 0], again.text()
    assert "resuming from checkpoint-" in again.text()
    assert outs(folder) == outs(one_machine)
    # Only the first process feeds MLflow, which is not there.
    told = ["lacks figures of this run" in log.read_text(encoding="utf-8") for log in again.logs]
    assert told == [True, False]


@pytest.mark.pipeline
@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_node_ends_the_other_and_all_go_on_from_the_checkpoint(
    one_machine: Path, untied_base: Path, tiny_tokenizer: Any, tmp_path: Path, dead: int
) -> None:
    folder = repository(tmp_path, untied_base, tiny_tokenizer)
    started = start_nodes(folder)
    started.wait_for(lambda: has_checkpoint(folder))
    started.kill(dead)
    dies_s = time.monotonic()
    codes = started.codes()
    assert codes[dead] == -9
    assert codes[1 - dead] not in (0, 75), started.text()
    assert time.monotonic() - dies_s < distribution.GRACE_S
    assert f"node {dead} is gone (" in started.logs[1 - dead].read_text(encoding="utf-8")
    if dead == 1:
        # What remains is that of any failed stage; the death of node 0 also leaves DVC's locks.
        return
    again = start_nodes(folder)
    assert again.codes() == [0, 0], again.text()
    assert "resuming from checkpoint-" in again.text()
    assert outs(folder) == outs(one_machine)


@pytest.mark.pipeline
def test_nothing_to_do_lets_all_nodes_go(one_machine: Path) -> None:
    started = start_nodes(one_machine, count=2)
    assert started.codes() == [0, 0], started.text()
    assert "didn't change, skipping" in started.text()


def test_a_node_with_other_parameters_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node, other = both_nodes()
    with nodes.listening(node.address, node.port) as server:
        host = multi_node.Host(node, {"params.yaml": "a", "torch": "2.13.0"}, server)
        with pytest.raises(DeviceError, match=r"torch is 2\.12\.0 there, 2\.13\.0 on node 0"):
            join.join(other, TWO, "nothing", {"params.yaml": "a", "torch": "2.12.0"})
        assert host.dismiss(0) == 0


def test_what_must_be_the_same_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    same = multi_node.same_on_all()
    assert {"params.yaml", "Python", "GPU", "torch", "transformers", "loop.py"} <= same.keys()
    assert multi_node.differences(same, same) == ""
    assert multi_node.differences({"a": 1}, {"b": 2}) == "a is None there, 1 on node 0; b is 2 there, None on node 0"


def both_nodes() -> list[Node]:
    port = two_free_ports()
    return [Node(rank, 2, "127.0.0.1", port) for rank in range(2)]


def test_a_node_that_never_comes_ends_the_training_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.5)
    node, _ = both_nodes()
    for name, value in {**VARIABLES, "FINETUNE_NODE_RANK": "0", "MASTER_PORT": str(node.port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=r"node 1 did not come within 0 s(.|\n)*finetune.multi_node"):
        distribution.relaunch_if_needed(TWO, "nothing", [], 1)


def test_a_node_0_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "START_S", 0.5)
    with pytest.raises(DeviceError, match="node 0 is gone \\(no answer for 0 s\\)"):
        join.join(both_nodes()[1], TWO, "nothing", {})


def test_a_signal_between_trainings_ends_a_waiting_node_with_75() -> None:
    node, other = both_nodes()
    with nodes.listening(node.address, node.port) as server:
        host = multi_node.Host(node, {}, server)
        threading.Timer(1.0, signal.raise_signal, [signal.SIGTERM]).start()
        with pytest.raises(StoppedError, match="SIGTERM between two trainings"):
            join.join(other, TWO, "nothing", {})
        assert host.dismiss(3) == 3


def test_strangers_and_nodes_that_came_already_are_turned_away() -> None:
    node, _ = both_nodes()
    with nodes.listening(node.address, node.port) as server:
        host = multi_node.Host(node, {}, server)
        lines = [Line(socket.create_connection((node.address, node.port)), "node 0") for _ in range(5)]
        for line, hello in zip(lines, [{"node": 1}, {"node": 1}, {"node": 2}, {"node": "x"}, {}], strict=True):
            line.send(hello)
            assert line.receive(0.5) is None if line is lines[0] else is_closed(line)
        assert host.dismiss(0) == 0
        assert lines[0].receive(5) == {"ended": 0}


def is_closed(line: Line) -> bool:
    with pytest.raises(ConnectionError):
        line.receive(5)
    return True


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"FINETUNE_NODES": "two"}, "'two' is not a number"),
        ({"FINETUNE_NODE_RANK": "2"}, "node 2 of 2"),
        ({"FINETUNE_NODE_RANK": ""}, "FINETUNE_NODES is set, and not FINETUNE_NODE_RANK"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "and not MASTER_ADDR, MASTER_PORT"),
        ({"MASTER_PORT": "x"}, "'x' is not a number"),
    ],
)
def test_half_of_the_variables_is_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], what: str) -> None:
    for name, value in {**VARIABLES, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=what):
        this_node()


def test_one_machine_is_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_NODES", raising=False)
    assert this_node() is None
    monkeypatch.setenv("FINETUNE_NODES", "1")
    assert this_node() is None
    with pytest.raises(DeviceError, match="on one machine: make repro"):
        multi_node.run(None, [])


def test_a_stage_started_by_hand_on_another_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=r"this is node 1 of 2(.|\n)*python -m finetune.multi_node"):
        distribution.relaunch_if_needed(TWO, "nothing", [], 1)


@pytest.mark.parametrize(("strategy", "processes", "count"), [("single", 1, 2), ("ddp", 3, 2), ("ddp", 2, 4)])
def test_processes_that_nodes_cannot_share_are_refused(strategy: Any, processes: int, count: int) -> None:
    settings = Distribution(strategy=strategy, processes=processes)
    with pytest.raises(DeviceError, match=f"are not for {count} nodes(.|\\n)*{count} times the GPUs of a node"):
        distribution.processes_here(settings, Node(0, count, "127.0.0.1", 29400))


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeviceError, match=f"port {port} cannot be listened on"), nodes.listening("localhost", port):
            pass


@pytest.mark.parametrize(("steps", "code"), [("80 80", 0), ("80 0", 1)])
def test_processes_that_see_other_checkpoints_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], steps: str, code: int
) -> None:
    source = """
import os, sys, torch
from finetune.training.distribution import check_same_step
torch.distributed.init_process_group("gloo")
try:
    check_same_step(int(sys.argv[1].split()[int(os.environ["RANK"])]))
finally:
    torch.distributed.destroy_process_group()
"""
    (tmp_path / "same_step_child.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    assert distribution.relaunch_if_needed(TWO, "same_step_child", [steps], 1) == code
    assert ("the processes would go on from steps [80, 0]" in capfd.readouterr().err) is bool(code)


def test_a_signal_that_a_batch_system_sends_to_every_process_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import os, pathlib, sys, time
from finetune.training.interrupts import stop_wish
with stop_wish() as wish:
    pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    until = time.monotonic() + 60
    while not wish.signal_name and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2)
sys.exit(75)
"""
    (tmp_path / "patient_child.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    files = [tmp_path / rank for rank in "01"]

    def send() -> None:
        while not all(file.exists() and file.read_text(encoding="utf-8") for file in files):
            time.sleep(0.05)
        for pid in [*(int(file.read_text(encoding="utf-8")) for file in files), os.getpid()]:
            os.kill(pid, signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert distribution.relaunch_if_needed(TWO, "patient_child", [str(tmp_path)], 1) == 75
    sender.join()


def test_one_process_agrees_with_itself() -> None:
    distribution.check_same_step(80)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
def test_on_loopback_nothing_listens_on_a_network(address: str) -> None:
    with nodes.listening(address, 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with nodes.listening("node0.example", 0) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")  # noqa: S104
