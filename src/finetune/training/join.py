"""A node other than node 0 -> its processes in each training of node 0's pipeline, until that has ended.

Two lines lead to node 0: one for as long as its pipeline runs, and one for each training, which says what to start.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune.errors import DeviceError, FinetuneError, StoppedError
from finetune.log import logger
from finetune.training.distribution import SIGNALS, processes_here, ranks, run_processes
from finetune.training.nodes import CALL_S, Line, Node
from finetune.training_sections import Distribution

# How long node 0 may take to start: a scheduler may have started this node first.
START_S = 600.0
POLL_S = 0.5


def join(node: Node, settings: Distribution, module: str, same: Mapping[str, Any]) -> int:
    """Run this node's processes of `python -m module` whenever node 0 trains; returns the code that node 0 ends with.

    `same`: what must be the same on all nodes, by name; node 0 refuses others. Raises DeviceError where node 0 does not
    answer, refuses this node or is gone, and StoppedError after SIGINT or SIGTERM.
    """
    here = processes_here(settings, node)
    with _noting_signals() as noted, _called(node, noted) as pipeline:
        pipeline.send({"node": node.rank, "same": dict(same)})
        logger.info("node %d of %d waits for a training of node 0, %s", node.rank, node.count, node.address)
        while (ended := _end_of(pipeline, node)) is None:
            if noted:
                raise _stopped(noted)
            if (training := _call(node, node.port + 1)) is not None:
                with training:
                    code = _take_part(training, pipeline, node, here, module)
                logger.info("this node's part of the training has ended with %d", code)
        return ended


def _take_part(training: Line, pipeline: Line, node: Node, here: int, module: str) -> int:
    """Start this node's processes as node 0 orders, and tell both lines how they ended."""
    try:
        training.send({"node": node.rank})
        orders = training.receive(START_S)
    except OSError as fault:
        logger.warning("node 0 called a training and %s", fault)
        return 1
    if orders is None:
        return 1
    arguments, port, cpu_threads = list(map(str, orders["arguments"])), int(orders["port"]), int(orders["cpu_threads"])
    variables = ranks(node.rank, here, node.count, (node.address, port), cpu_threads)
    logger.info("starting %d of %d processes", here, here * node.count)
    code = run_processes([sys.executable, "-m", module, *arguments], variables, others=[], watched=[training])
    for line in (pipeline, training):
        try:
            line.send({"ended": code})
        except OSError as fault:
            logger.warning("%s: %s", line.name, fault)
    return code


def _end_of(pipeline: Line, node: Node) -> int | None:
    """The exit code of node 0's pipeline, or None while it runs."""
    try:
        message = pipeline.receive(POLL_S) or {}
    except OSError as fault:
        raise _lost(node, str(fault)) from None
    if "refused" in message:
        raise DeviceError(
            str(message["refused"]), f"node {node.rank}", "give all nodes the same files, versions and kind of GPU"
        )
    return int(message["ended"]) if "ended" in message else None


@contextmanager
def _called(node: Node, noted: list[int]) -> Iterator[Line]:
    until_s = time.monotonic() + START_S
    while (line := _call(node, node.port)) is None:
        if noted:
            raise _stopped(noted)
        if time.monotonic() > until_s:
            raise _lost(node, f"no answer for {START_S:.0f} s")
        time.sleep(POLL_S)
    with line:
        yield line


def _call(node: Node, port: int) -> Line | None:
    """A line to node 0, or None where it does not listen, or its name is not known yet."""
    try:
        return Line(socket.create_connection((node.address, port), CALL_S), "node 0")
    except OSError:
        return None


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Note signals between trainings; during one they are passed on to its processes."""
    noted: list[int] = []
    earlier = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _lost(node: Node, what: str) -> FinetuneError:
    remedy = "look at node 0's log; started again on all nodes, it goes on from the last checkpoint"
    return DeviceError(f"node 0 is gone ({what})", f"{node.address}:{node.port}", remedy)


def _stopped(noted: list[int]) -> FinetuneError:
    name = signal.Signals(noted[0]).name
    return StoppedError(f"{name} between two trainings", "this node", "start all nodes again: they go on")
