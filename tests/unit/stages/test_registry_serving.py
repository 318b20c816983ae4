"""`mlflow models serve` on a version that the register stage uploaded, asked over HTTP on a free port of 127.0.0.1."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_register import QUESTION, make_outputs, register
from transformers import AutoModelForCausalLM, AutoTokenizer

START_S = 120


def ask(port: int, body: dict[str, Any], path: str = "/invocations") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, untied_base: Path) -> Path:
    """The merged model of a finished pipeline whose version is registered."""
    root = tmp_path_factory.mktemp("a clone")
    argv = make_outputs(root, untied_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        register(argv)
    return argv[1]


@pytest.fixture(scope="module")
def port(merged: Path) -> Iterator[int]:
    """The port of `mlflow models serve`, started as the README says, from the root of the clone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    root = merged.parents[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/finetune-smoke@challenger"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(number)]
    # MLflow starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    log = root / "serve.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=file, start_new_session=True)
    until_s = time.monotonic() + START_S
    while not is_up(number) and server.poll() is None and time.monotonic() < until_s:
        time.sleep(0.1)
    try:
        assert is_up(number), log.read_text()
        yield number
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_version_answers_over_http_as_the_merged_model_does(port: int, merged: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"].tolist() == [[1, 3, 5, 6, 7, 4]]
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, 6:]
    status, text = ask(port, {"messages": messages, "max_tokens": 20})
    assert status == 200, text
    (completion,) = json.loads(text)
    assert completion["choices"][0]["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert completion["usage"]["prompt_tokens"] == 6
    assert completion["usage"]["completion_tokens"] == len(ids)


def test_what_the_version_cannot_do_is_as_documented(port: int) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    greedy = [
        json.loads(ask(port, {"messages": messages, "max_tokens": 8, **more})[1])[0]["choices"]
        for more in ({}, {"temperature": 1.5})
    ]
    assert greedy[0] == greedy[1]
    for more in ({"stop": ["m"]}, {"stream": True}):
        assert ask(port, {"messages": messages, "max_tokens": 8, **more})[0] == 400
