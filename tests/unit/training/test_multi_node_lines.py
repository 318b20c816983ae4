"""The line between two nodes: an exit code, or anything else, which counts as the other one's death."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from finetune.training import nodes
from finetune.training.nodes import Line


@pytest.mark.parametrize(
    "sent", [b"[]\n", b"x" * (2 * nodes.MAX_BYTES), b"nonsense\n", b'{"ended": "never"}\n', b"{}\n", b""]
)
def test_what_is_no_message_counts_as_the_death_of_a_node(sent: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(socket.create_connection(server.getsockname()), "node 1")
        theirs, _ = server.accept()
    sender = threading.Thread(target=send_and_close, args=[theirs, sent])
    sender.start()
    until_s = time.monotonic() + 10
    while line.poll() is None:
        assert time.monotonic() < until_s
    assert line.poll() == 1
    line.kill()
    sender.join()


def send_and_close(connection: socket.socket, sent: bytes) -> None:
    with connection, suppress(OSError):
        connection.sendall(sent)


def test_the_exit_code_of_a_node_is_that_it_sends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(socket.create_connection(server.getsockname()), "node 1")
        theirs = Line(server.accept()[0], "node 0")
    assert line.poll() is None
    theirs.send({"ended": 75})
    time.sleep(0.2)
    assert (line.poll(), line.returncode) == (75, 75)
