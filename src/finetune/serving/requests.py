"""The JSON of a chat completion request -> messages, tools and settings, or the reason why it cannot be answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_cpp.server.types import CreateChatCompletionRequest
from pydantic import ValidationError

from finetune.data.reading.tool_calls import calls_json
from finetune.data.record import ROLES, Message
from finetune.data.rows import UnreadableRowError
from finetune.export.modelfile import Modelfile

# What a Modelfile leaves out is Ollama's default (api/types.go, DefaultOptions), not llama-cpp-python's.
OLLAMA_TOP_K = 40
OLLAMA_MIN_P = 0.0
# Keys that would change the answer and cannot be honoured; keys that no one knows are left alone, as clients send many.
# A grammar that llama.cpp cannot read ends the process (llama-cpp-python 0.3.36), and OpenAI's interface has none.
REFUSED = ("functions", "function_call", "logprobs", "top_logprobs", "grammar", "logit_bias")
FROM_MESSAGES = ("messages", "tools", "tool_choice")


class RequestError(Exception):
    """A request that cannot be answered: what is wrong, the key at fault, a code as OpenAI has them, HTTP's status."""

    def __init__(self, what: str, key: str, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(what)
        self.key, self.code, self.status = key, code, status


def read_request(body: Mapping[str, Any], settings: Modelfile, name: str) -> CreateChatCompletionRequest:
    """The request's settings, the Modelfile's where it has none; its messages are read by `read_messages`.

    Raises RequestError for another model's name, and for what this server cannot do.
    """
    given = {key: value for key, value in body.items() if key not in FROM_MESSAGES}
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    if given.get("model", name) != name:
        raise RequestError(f"the model {given['model']!r} is not here: {name!r} is", "model", "model_not_found", 404)
    for key in REFUSED:
        if given.get(key):
            raise RequestError(f"{key} is not supported", key, "unsupported_parameter")
    if given.get("n", 1) != 1:
        raise RequestError("one answer at a time: n is 1", "n")
    if body.get("tool_choice", "auto") not in ("auto", "none"):
        raise RequestError("tool_choice is auto or none: the model was trained to decide itself", "tool_choice")
    defaults = {
        "model": name,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": OLLAMA_TOP_K,
        "min_p": OLLAMA_MIN_P,
        "repeat_penalty": settings.repeat_penalty,
    }
    try:
        asked = CreateChatCompletionRequest(**{**defaults, **given})
    except ValidationError as fault:
        first = fault.errors()[0]
        raise RequestError(first["msg"], ".".join(map(str, first["loc"]))) from None
    _check_settings(asked)
    return asked


def _check_settings(asked: CreateChatCompletionRequest) -> None:
    if asked.max_tokens is not None and asked.max_tokens < 1:
        raise RequestError("max_tokens is a whole number from 1 on", "max_tokens")
    if "" in (asked.stop if isinstance(asked.stop, list) else [asked.stop]):
        raise RequestError("an empty stop would end every answer at once", "stop")
    if asked.response_format is not None and asked.response_format.get("schema") is not None:
        raise RequestError("a schema is not supported, json_object alone is", "response_format")


def offered_tools(body: Mapping[str, Any]) -> list[Any]:
    """The tools that the model may call: none for tool_choice none. Raises RequestError for one without a name."""
    tools = body.get("tools", []) if body.get("tool_choice") != "none" else []
    if not isinstance(tools, list):
        raise RequestError("tools is a list", "tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError('a tool is {"type": "function", "function": {"name": ...}}', f"tools[{index}]")
    return tools


def tool_names(tools: list[Any]) -> set[str]:
    """The names of offered functions."""
    return {tool["function"]["name"] for tool in tools}


def read_messages(messages: Any) -> list[Message]:
    """OpenAI's messages as the turns of a record; raises RequestError for what is not text or of no known role."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is a list with one message at least", "messages")
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    order, ids, start = list(range(len(read))), [], 0
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            ids, start = [call.get("id") for call in message["tool_calls"]], index + 1
        elif message["role"] != "tool":
            ids = []
        elif ids and message.get("tool_call_id") is not None:
            order[index] = start + _place(message["tool_call_id"], ids, f"messages[{index}].tool_call_id")
    # Results stand in the order of their calls, as in training.
    return [message for _, message in sorted(zip(order, read, strict=True), key=lambda pair: pair[0])]


def _place(identifier: Any, ids: list[Any], where: str) -> int:
    if identifier not in ids:
        raise RequestError(f"no call before it has the id {identifier!r}", where)
    return ids.index(identifier)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RequestError(f"a message has a role, one of {', '.join(ROLES)}", f"{where}.role")
    try:
        calls = calls_json(message.get("tool_calls"))
    except UnreadableRowError as fault:
        raise RequestError(fault.detail, f"{where}.tool_calls") from None
    return Message(message["role"], _content(message.get("content"), f"{where}.content"), calls)


def _content(content: Any, where: str) -> str:
    """A text, nothing (beside tool calls), or a list of text parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": "" if content is None else content}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("only text can be read: no pictures, files or sound", where)
    return "".join(map(str, texts))
