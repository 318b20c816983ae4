"""The server's prompts and answers, asked over HTTP as an OpenAI client asks it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny_gguf
from serving_child import NAME, QUESTION, ROOT, SYSTEM, TEMPLATE, Server, serving, write_served
from tokenizers import Tokenizer

from finetune.chat_template import compile_template
from finetune.export.modelfile import Modelfile
from finetune.export.parity import Trained
from finetune.export.parity_chats import ParityChat, parity_chats
from finetune.serving.requests import read_request

TOOLS_TEMPLATE = ROOT / "chat_templates/chatml_tools.jinja"
TOOLS = [{"type": "function", "function": {"name": "hours", "parameters": {"type": "object", "properties": {}}}}]
# One token: longer than the 32 bytes that llama-cpp-python would show of it, and than those of a first attempt here.
CALL = '<tool_call>{"name":"hours","arguments":{"day":1,"place":"workshop"}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_gguf.train_tokenizer()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Server]:
    """A server whose model answers everything with `a`."""
    folder = write_served(tmp_path_factory.mktemp("serve") / "says a", tokenizer, TEMPLATE, "a")
    with serving(folder, "--port", "0") as server:
        yield server


def as_openai_has_them(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as clients send them: arguments of calls as JSON text, calls with ids, results without names."""
    sent = [{key: value for key, value in message.items() if key != "name"} for message in messages]
    for message in sent:
        if calls := message.get("tool_calls"):
            texts = [json.dumps(call["function"]["arguments"]) for call in calls]
            functions = [{**call["function"], "arguments": text} for call, text in zip(calls, texts, strict=True)]
            message["tool_calls"] = [
                {"id": str(at), "type": "function", "function": function} for at, function in enumerate(functions)
            ]
    return sent


def check_prompts(server: Server, template: str, tokenizer: Tokenizer, chats: Sequence[ParityChat]) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    trained = Trained(compile_template(template, tokens, "template"), tokenizer)
    for chat in chats:
        asked: dict[str, Any] = {"messages": as_openai_has_them(chat.messages), "max_tokens": 1}
        completion = server.answer({**asked, "tools": chat.tools} if chat.tools else asked)
        # The server puts SYSTEM first unless the client sends a system message, as Ollama does.
        system = "" if chat.messages[0]["role"] == "system" else SYSTEM
        _, ids = trained.prompt(replace(chat, system=system))
        assert server.prompt() == ids, chat.name
        assert completion["usage"]["prompt_tokens"] == len(ids), chat.name


def test_every_prompt_has_the_trained_ids(server: Server, tokenizer: Tokenizer) -> None:
    chats = parity_chats(("system", "user", "assistant", "tool"), SYSTEM)
    assert len(chats) > 60
    check_prompts(server, TEMPLATE, tokenizer, chats)


def test_prompts_with_functions_have_the_trained_ids(calling: Server, tokenizer: Tokenizer) -> None:
    roles = ("system", "user", "assistant", "tool")
    chats = parity_chats(roles, SYSTEM, tools=True, tool_calls=True)
    chats = [chat for chat in chats if chat.has_functions()]
    assert len(chats) > 50
    check_prompts(calling, TOOLS_TEMPLATE.read_text(), tokenizer, chats)


def test_an_answer_has_openais_form_and_the_registered_name(server: Server) -> None:
    completion = server.answer({**QUESTION, "model": NAME, "user": "someone", "store": False, "stop": None})
    assert completion["model"] == NAME
    assert completion["object"] == "chat.completion"
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a"}
    assert choice["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] == 1


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_an_answer_streams(server: Server) -> None:
    status, text = server.ask({**QUESTION, "stream": True})
    assert status == 200
    found = chunks(text)
    assert "".join(chunk["delta"].get("content", "") for chunk in found) == "a"
    assert [chunk["finish_reason"] for chunk in found][-1] == "stop"


def test_the_models_list_names_the_registered_model(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/v1/models")
    assert [entry["id"] for entry in json.loads(connection.getresponse().read())["data"]] == [NAME]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/v1/embeddings", "/extras/tokenize"])
def test_nothing_else_is_offered(server: Server, path: str) -> None:
    assert server.ask(QUESTION, path=path)[0] == 404


def test_tools_are_in_the_prompt_as_in_training(server: Server, tokenizer: Tokenizer) -> None:
    result = [
        {"role": "user", "content": [{"type": "text", "text": "Mon"}, {"type": "text", "text": "day?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "hours", "arguments": '{"day": "Monday"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "9 to 18"},
    ]
    server.answer({"messages": result, "tools": TOOLS, "tool_choice": "auto"})
    text = (
        f"<s><|system|>\nBe brief.\n\nTools: {json.dumps(TOOLS)}\n<|user|>\nMonday?\n<|assistant|>\n"
        '<tool_call>{"arguments": {"day": "Monday"}, "name": "hours"}</tool_call></s>\n'
        "<|tool|>\n9 to 18\n<|assistant|>\n"
    )
    assert server.prompt() == tokenizer.encode(text, add_special_tokens=False).ids
    server.answer({**QUESTION, "tools": TOOLS, "tool_choice": "none"})
    text = "<s><|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\n"
    assert server.prompt() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Server]:
    """A server whose template writes functions and calls by itself, and whose model answers all with one call."""
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][CALL] = len(content["model"]["vocab"])
    words, template = Tokenizer.from_str(json.dumps(content)), TOOLS_TEMPLATE.read_text()
    folder = write_served(tmp_path_factory.mktemp("serve") / "calls", words, template, CALL)
    with serving(folder, "--port", "0") as server:
        yield server


def test_a_call_comes_back_as_a_tool_call(calling: Server) -> None:
    (choice,) = calling.answer({**QUESTION, "tools": TOOLS})["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "hours", "arguments": '{"day": 1, "place": "workshop"}'}
    assert call["type"] == "function"
    first, last = chunks(calling.ask({**QUESTION, "tools": TOOLS, "stream": True})[1])
    assert first["delta"]["tool_calls"][0]["function"] == call["function"]
    assert first["delta"]["tool_calls"][0]["index"] == 0
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}


def test_what_looks_like_a_call_stays_text_where_no_such_tool_is_offered(calling: Server) -> None:
    other = [{"type": "function", "function": {"name": "prices"}}]
    for body in (QUESTION, {**QUESTION, "tools": other}, {**QUESTION, "tools": TOOLS, "tool_choice": "none"}):
        (choice,) = calling.answer(body)["choices"]
        assert choice["message"] == {"role": "assistant", "content": CALL}
        assert choice["finish_reason"] == "stop"


def test_the_modelfiles_settings_are_the_defaults() -> None:
    settings = Modelfile("x", "", "", 64, 0.2, 0.7, 1.05, ())
    asked = read_request({}, settings, NAME)
    assert (asked.temperature, asked.top_p, asked.repeat_penalty) == (0.2, 0.7, 1.05)
    assert (asked.top_k, asked.min_p, asked.max_tokens, asked.seed) == (40, 0.0, None, None)
    asked = read_request({"temperature": 1, "top_p": 0.5, "max_completion_tokens": 7}, settings, NAME)
    assert (asked.temperature, asked.top_p, asked.repeat_penalty, asked.max_tokens) == (1.0, 0.5, 1.05, 7)
