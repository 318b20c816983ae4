"""Several machines -> one training: which node this is, and the lines of JSON by which nodes meet.

FINETUNE_NODES nodes are numbered from 0 by FINETUNE_NODE_RANK; MASTER_ADDR and MASTER_PORT say where node 0 is. Node 0
alone runs DVC. It listens on MASTER_PORT while its pipeline runs, and on the port behind it when a training begins; the
others call (finetune.training.join). As with torch.distributed, nothing is encrypted and nobody is asked for a
password: a network of one's own. No code and no path to write comes over it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from finetune.errors import DeviceError
from finetune.log import logger

NODES, NODE_RANK, ADDRESS, PORT = "FINETUNE_NODES", "FINETUNE_NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
# How long the first node of a training waits for the others: a node that is restarted has to fetch its image first.
GATHER_S = 600.0
# A host that died sends nothing: unanswered probes from 15 s on, every 5 s, three of them. Linux: tcp(7).
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
CALL_S = 5.0
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Node:
    """This machine, number `rank` of `count`; node 0 listens on `port` and the one behind it, at `address`."""

    rank: int
    count: int
    address: str
    port: int


class Line:
    """A connection of two nodes, by which each sends lines of JSON and learns that the other is gone.

    `poll` and `kill` are those of a process: as long as the line is open, the other node is at work.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name = name
        self.returncode: int | None = None
        self._socket, self._received = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def __enter__(self) -> Self:
        """The line, closed behind the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it: the other node takes this for our end."""
        self._socket.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; raises OSError where the other node is gone."""
        self._socket.settimeout(CALL_S)
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """The next message, or None if none comes in `wait_s`; raises OSError where the other node is gone."""
        until_s = time.monotonic() + wait_s
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.001, until_s - time.monotonic()))
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                return None
            if not received or len(self._received) > MAX_BYTES:
                raise ConnectionError("without a word" if not received else "sends what is no message")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ConnectionError(f"sends {line[:40]!r}, which is no message of this program")
        return message

    def poll(self) -> int | None:
        """The exit code that the other node has sent, 1 where it is gone, None while it is at work."""
        if self.returncode is None:
            try:
                message = self.receive(0)
                self.returncode = None if message is None else int(message["ended"])
            except (OSError, ValueError, KeyError) as fault:
                logger.error("%s is gone (%s); started again, all go on from the last checkpoint", self.name, fault)
                self.returncode = 1
        return self.returncode

    def kill(self) -> None:
        """Close the line: the other node ends its processes."""
        self._socket.close()
        self.returncode = self.returncode or 1


def this_node() -> Node | None:
    """Which node the environment says that this is; None on one machine. Raises DeviceError for half of it."""
    if int(_number(NODES, os.environ.get(NODES, "1"))) == 1:
        return None
    missing = [name for name in (NODE_RANK, ADDRESS, PORT) if not os.environ.get(name)]
    if missing:
        raise DeviceError(f"{NODES} is set, and not {', '.join(missing)}", "environment", "set all four: docs/scale.md")
    rank, count, port = (_number(name, os.environ[name]) for name in (NODE_RANK, NODES, PORT))
    if rank >= count:
        raise DeviceError(f"node {rank} of {count}", f"environment, {NODE_RANK}", "number the nodes from 0")
    return Node(rank, count, os.environ[ADDRESS], port)


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise DeviceError(f"{value!r} is not a number", f"environment, {name}", f"set {name} to a whole number")
    return int(value)


@contextmanager
def listening(address: str, port: int) -> Iterator[socket.socket]:
    """Listen on a port of this machine, 0 for any: on loopback if that is node 0's address, else on every network."""
    on_loopback = address == "localhost" or address.startswith("127.")
    both = not on_loopback and socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("127.0.0.1" if on_loopback else "", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
        )
    except OSError as fault:
        remedy = f"set {PORT} to a port of node 0 that is free, as the one behind it must be, the same on all nodes"
        raise DeviceError(f"port {port} cannot be listened on: {fault}", f"environment, {PORT}", remedy) from None
    with server:
        yield server


@contextmanager
def gathered(node: Node | None, orders: Mapping[str, Any]) -> Iterator[list[Line]]:
    """Wait until all other nodes have called for a training, tell them `orders`, and hold their lines; [] without them.

    Raises DeviceError when one does not come within GATHER_S.
    """
    if node is None:
        yield []
        return
    lines: dict[int, Line] = {}
    until_s = time.monotonic() + GATHER_S
    try:
        with listening(node.address, node.port + 1) as server:
            while missing := sorted(set(range(1, node.count)) - lines.keys()):
                server.settimeout(max(0.001, until_s - time.monotonic()))
                try:
                    _take(server, lines, missing)
                except TimeoutError:
                    raise DeviceError(
                        f"node {', '.join(map(str, missing))} did not come within {GATHER_S:.0f} s",
                        f"{node.address}:{node.port + 1}",
                        "look at its log; start `python -m finetune.multi_node` on every node",
                    ) from None
        for line in lines.values():
            line.send(orders)
        yield [lines[rank] for rank in sorted(lines)]
    finally:
        for line in lines.values():
            line.__exit__()


def _take(server: socket.socket, lines: dict[int, Line], missing: Sequence[int]) -> None:
    line = Line(server.accept()[0], "a caller")
    try:
        rank = (line.receive(CALL_S) or {}).get("node")
    except (OSError, ValueError):
        rank = None
    if type(rank) is not int or rank not in missing:
        line.kill()
        return
    line.name = f"node {rank}"
    lines[rank] = line
