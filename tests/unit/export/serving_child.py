"""A tiny model behind `python -m finetune.serve`, as a child process on a free port, and questions to it over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_gguf
from tokenizers import Tokenizer

from finetune.chat_template import serving_form
from finetune.export.modelfile import Modelfile, render_modelfile

ROOT = Path(__file__).parents[3]
NAME = "finetune-smoke"
# So long that an answer without end is not done when a test stops waiting for it.
NUM_CTX = 32768
SYSTEM = "Be brief."
# Writes neither tools nor calls by itself, as most templates of the recipes.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}


def write_served(folder: Path, tokenizer: Tokenizer, template: str, answer: str) -> Path:
    folder.mkdir()
    tiny_gguf.write_gguf(folder / "model.gguf", tokenizer, serving_form(template), add_bos=True, answer=answer)
    modelfile = Modelfile("model.gguf", "unused", SYSTEM, NUM_CTX, 0.0, 0.9, 1.0, ("</s>",))
    (folder / "Modelfile").write_text(render_modelfile(modelfile, context_tokens=NUM_CTX), encoding="utf-8")
    shutil.copy(ROOT / "recipes/smoke/params.yaml", folder)
    return folder


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path

    def ask(
        self, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def answer(self, body: Any) -> Any:
        status, text = self.ask(body)
        assert status == 200, text
        return json.loads(text)

    def prompt(self) -> list[int]:
        """The ids of the last prompt, from the log."""
        return list(json.loads(self.log.read_text().rpartition("prompt ids ")[2].partition("\n")[0]))


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server for the time of a `with`, ended by Ctrl-C; never left behind."""
    server = _start(folder, *arguments)
    try:
        yield server
        _end(server)
    finally:
        server.process.kill()
        server.process.wait()


def _start(folder: Path, *arguments: str) -> Server:
    # What llama_cpp.server would read: a key asked of every request, a file instead of the arguments.
    environment = {**os.environ, "FINETUNE_LOG_LEVEL": "DEBUG", "API_KEY": "secret", "CONFIG_FILE": "none", "SEED": "3"}
    log = folder / f"log {len(list(folder.glob('log *')))}"
    command = [sys.executable, "-m", "finetune.serve", "Modelfile", *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    for _ in range(600):
        found = re.search(r"answers at http://([\d.]+):(\d+)/v1", log.read_text())
        if found or process.poll() is not None:
            break
        time.sleep(0.05)
    if found is None:
        process.kill()
        raise AssertionError(log.read_text())
    return Server(process, found[1], int(found[2]), log)


def _end(server: Server) -> None:
    """Press Ctrl-C; the server ends by itself, without a traceback."""
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 0
    log = server.log.read_text()
    assert log.endswith("serve: ended\n")
    assert "Traceback" not in log
