"""A Go TEMPLATE and chats -> the prompts that Ollama builds from them, rendered by the compiled program of main.go."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from finetune.errors import ExportError

RENDER_TIMEOUT_S = 60
Message = Mapping[str, Any]


class GoRequest(TypedDict):
    """One prompt to build: `system` is the Modelfile's SYSTEM, empty for none.

    Messages and tools are a client's, as transformers spells them; in Ollama a tool's `name` is its `tool_name`.
    """

    system: str
    messages: Sequence[Message]
    tools: NotRequired[Sequence[Mapping[str, Any]]]


def render_go(program: Path, template: str, requests: Sequence[GoRequest]) -> list[str]:
    """The prompt of each request, in order.

    Raises ExportError when the program is missing or fails, or when the template has a fault.
    """
    lines = "".join(json.dumps({"template": template, **_as_ollama_has_it(request)}) + "\n" for request in requests)
    try:
        # Bytes, not text: text mode would turn "\r\n" inside a prompt into "\n".
        done = subprocess.run([str(program)], input=lines.encode(), capture_output=True, timeout=RENDER_TIMEOUT_S)
    except OSError as fault:
        raise ExportError(f"the Go template program cannot be run: {fault}", program, "make setup") from None
    if done.returncode != 0:
        raise ExportError(f"the Go template program failed: {done.stderr.decode()}", program, "make setup")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer, request in zip(answers, requests, strict=True):
        if "error" in answer:
            raise ExportError(
                f"the Go TEMPLATE cannot render a chat: {answer['error']}",
                f"messages {list(request['messages'])!r:.300}",
                "mend the TEMPLATE, or leave out messages of a role that the chat template does not have",
            )
    return [answer["text"] for answer in answers]


def _as_ollama_has_it(request: GoRequest) -> dict[str, Any]:
    messages = [{**message, "tool_name": message.get("name", "")} for message in request["messages"]]
    return {**request, "messages": messages}
