"""`python -m finetune.multi_node [arguments of dvc repro]`, on every node: node 0 runs DVC, the others train with it.

DVC runs the stages of node 0 as on one machine, and so records what they make; a training there has its processes on
all nodes (finetune.training.join). The repository lies in a folder that all nodes share, at one path. Exit codes are
those of `finetune.doctor.repro`, on every node: 75 means stopped, start all of them again.
"""

from __future__ import annotations

import platform
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pynvml

from finetune.doctor import repro
from finetune.errors import DeviceError, FinetuneError, StoppedError
from finetune.io import sha256_file
from finetune.log import logger, setup_logging
from finetune.params import load_params
from finetune.training.distribution import processes_here
from finetune.training.join import join
from finetune.training.nodes import CALL_S, NODES, Line, Node, listening, this_node

PARAMS, PINS = Path("params.yaml"), Path("requirements/train.txt")
MODULE = "finetune.stages.train_qlora"
# How long node 0 waits at the end for nodes that have not called yet, to tell them that there is nothing to do.
DISMISS_S = 60.0
POLL_S = 0.2


class Host:
    """What node 0 knows of the others: who has called, who trained with which exit code, who is gone.

    Its thread runs until `dismiss`, which tells every node how the pipeline has ended.
    """

    def __init__(self, node: Node, same: Mapping[str, Any], server: socket.socket) -> None:
        self._node, self._same, self._server = node, dict(same), server
        self._lines: dict[int, Line] = {}
        self._gone: set[int] = set()
        self._ended: int | None = None
        self._codes: set[int] = set()
        self._until_s = float("inf")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def dismiss(self, code: int) -> int:
        """Tell all nodes `code`, or 75 where a training was stopped on any of them; returns what they were told."""
        self._ended = StoppedError.exit_code if code and StoppedError.exit_code in self._codes else code
        self._until_s = time.monotonic() + DISMISS_S
        self._thread.join()
        return self._ended

    def _serve(self) -> None:
        self._server.settimeout(POLL_S)
        while self._is_needed():
            with suppress(TimeoutError):
                self._greet(Line(self._server.accept()[0], "a caller"))
            for rank, line in list(self._lines.items()):
                self._hear(rank, line)

    def _is_needed(self) -> bool:
        if self._ended is None:
            return True
        for line in self._lines.values():
            with suppress(OSError), line:
                line.send({"ended": self._ended})
        self._gone |= self._lines.keys()
        self._lines.clear()
        missing = set(range(1, self._node.count)) - self._gone
        if missing and time.monotonic() > self._until_s:
            logger.warning("node %s never called", ", ".join(map(str, sorted(missing))))
        return bool(missing) and time.monotonic() <= self._until_s

    def _greet(self, line: Line) -> None:
        try:
            message = line.receive(CALL_S) or {}
            rank = message.get("node")
            if type(rank) is not int or not 0 < rank < self._node.count or rank in self._lines:
                line.kill()
                return
            line.name = f"node {rank}"
            if differing := differences(self._same, message.get("same") or {}):
                logger.error("%s is refused: %s", line.name, differing)
                line.send({"refused": differing})
                line.kill()
                self._gone.add(rank)
                return
        except (OSError, ValueError):
            line.kill()
            return
        logger.info("%s is there", line.name)
        self._gone.discard(rank)
        self._lines[rank] = line

    def _hear(self, rank: int, line: Line) -> None:
        try:
            message = line.receive(0) or {}
        except (OSError, ValueError) as fault:
            logger.warning("%s is gone (%s); a training waits for it", line.name, fault)
            line.kill()
            del self._lines[rank]
            self._gone.add(rank)
            return
        if type(message.get("ended")) is int:
            self._codes.add(message["ended"])


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """What is not the same on two nodes, in words; empty if all is."""
    return "; ".join(
        f"{name} is {there.get(name)} there, {here.get(name)} on node 0"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    )


def same_on_all() -> dict[str, Any]:
    """What nodes that train together must have in common: parameters, code, libraries, Python, kind of GPU."""
    names = [line.partition("==")[0] for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    code = {file.name: sha256_file(file)[:12] for file in sorted((Path(__file__).parent / "training").glob("*.py"))}
    return {
        "params.yaml": sha256_file(PARAMS)[:12],
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "GPU": _gpu_names(),
        **{name: version(name) for name in names},
        **code,
    }


def _gpu_names() -> list[str]:
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return sorted({str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(at))) for at in range(count)})
    except pynvml.NVMLError:
        return []


def run(node: Node | None, arguments: list[str]) -> int:
    """This node's part of a pipeline; raises DeviceError for one node, and what `join`, `repro` and params raise."""
    if node is None:
        raise DeviceError(f"{NODES} does not say how many nodes there are", "environment", "on one machine: make repro")
    settings = load_params(PARAMS).train_qlora.distribution
    # Now, not when the training begins, which may be hours from here.
    processes_here(settings, node)
    if node.rank:
        return join(node, settings, MODULE, same_on_all())
    with listening(node.address, node.port) as server:
        host = Host(node, same_on_all(), server)
        code = 1
        try:
            code = repro.run(Path.cwd(), arguments)
        finally:
            code = host.dismiss(code)
    return code


def main(arguments: list[str]) -> int:
    """Run this node's part with these arguments for DVC; returns the exit code."""
    setup_logging("multi_node")
    try:
        return run(this_node(), arguments)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
