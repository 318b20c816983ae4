"""What the server refuses, what it tells then, and how it ends."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from serving_child import NUM_CTX, QUESTION, TEMPLATE, Server, serving, write_served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("serve") / "says a", tiny_gguf.train_tokenizer(), TEMPLATE, "a")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--port", "0") as server:
        yield server


@pytest.mark.parametrize(
    ("change", "status", "key", "message"),
    [
        ({"model": "gpt-4"}, 404, "model", "the model 'gpt-4' is not here: 'finetune-smoke' is"),
        ({"messages": []}, 400, "messages", "one message at least"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "system, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", "only text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": "!?" * NUM_CTX}]}, 400, "messages", f"num_ctx is {NUM_CTX}"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            *(400, "messages[0].tool_calls", "arguments of f"),
        ),
        ({"tools": [{"name": "f"}]}, 400, "tools[0]", "a tool is"),
        ({"tool_choice": "required"}, 400, "tool_choice", "auto or none"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"max_tokens": 0}, 400, "max_tokens", "from 1 on"),
        ({"max_completion_tokens": 0}, 400, "max_tokens", "from 1 on"),
        ({"n": 2}, 400, "n", "one answer at a time"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"grammar": "root ::= nosuch"}, 400, "grammar", "not supported"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias", "not supported"),
        ({"stop": ["a", ""]}, 400, "stop", "empty stop"),
        ({"response_format": {"type": "json_object", "schema": {"type": "nosuch"}}}, 400, "response_format", "schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_answered_is_told_why(
    server: Server, change: dict[str, Any], status: int, key: str, message: str, stream: bool
) -> None:
    answered, text = server.ask({**QUESTION, **change, "stream": stream})
    error = json.loads(text)["error"]
    assert (answered, error["param"]) == (status, key)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_request_is_told_so(server: Server, body: bytes) -> None:
    assert server.ask(body)[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "evil.example"}, 400),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost:1234"}, 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(server: Server, headers: dict[str, str], status: int) -> None:
    assert server.ask(QUESTION, headers)[0] == status


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_another_host_than_this_machine_is_a_warning_and_any_name_for_it_will_do(folder: Path) -> None:
    with serving(folder, "--port", "0", "--host", "127.0.0.2") as server:
        assert "on 127.0.0.2 everyone who reaches this machine can use the model" in server.log.read_text()
        assert server.ask(QUESTION, {"Host": "gpu-host.example"})[0] == 200
        assert server.ask(QUESTION, {"Origin": "https://evil.example"})[0] == 403


def refused(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "finetune.serve", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def test_a_taken_port_is_an_error_with_its_remedy(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(folder, "Modelfile", "--port", str(port))
    assert f"another program listens there already\n  where:  127.0.0.1:{port}\n" in error
    assert "make serve PORT=8001" in error


def test_a_missing_modelfile_is_an_error_with_its_remedy(folder: Path) -> None:
    assert "the Modelfile is missing\n  where:  models/Modelfile\n" in refused(folder, "models/Modelfile")


def test_ctrl_c_ends_an_answer_that_would_go_on(folder: Path) -> None:
    with serving(folder, "--port", "0") as server:
        # Without its end token the model writes until num_ctx is full.
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({**QUESTION, "logit_bias": {"1": -100}}))
        time.sleep(0.5)
        assert server.process.poll() is None
