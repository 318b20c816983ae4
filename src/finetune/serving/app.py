"""A served model -> a web application with OpenAI's interface: llama-cpp-python's own server, fed trained prompts.

Of llama_cpp.server its functions are used (queue, streams, sampling), not its application: that one lets any web page
read the answers, is configured by environment variables such as API_KEY and SEED, and answers a bad request with 500.
Interface: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import llama_cpp
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    chat_formatter_to_chat_completion_handler,
    register_chat_completion_handler,
)
from llama_cpp.server import app as upstream
from llama_cpp.server.settings import ModelSettings, ServerSettings
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finetune.log import logger
from finetune.serving.calls import Chat, as_stream, with_tool_calls
from finetune.serving.pieces import WholePieces
from finetune.serving.requests import RequestError, offered_tools, read_request, tool_names
from finetune.serving.served import ServedModel

CHAT_FORMAT = "finetune"
LOOPBACK = ("127.0.0.1", "localhost")
LOCAL_PAGE = r"https?://(127\.0\.0\.1|localhost)(:\d+)?"
# Far above any context: 32 Mi characters are some 8 Mi tokens.
MAX_BODY_BYTES = 32 * 2**20


def build_app(served: ServedModel, name: str, hosts: Sequence[str]) -> Starlette:
    """Load the model and answer for it as `name`. `hosts`: the Host headers accepted, ["*"] for any.

    Raises ValueError where llama.cpp cannot load the GGUF. One application per process: llama_cpp.server keeps its
    model in a module.
    """
    _load(served, name)

    async def models(_: Request) -> Response:
        created_s = int(served.gguf.stat().st_mtime)
        entry = {"id": name, "object": "model", "created": created_s, "owned_by": "finetune"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(request: Request) -> Response:
        check_page(request.headers.get("origin"))
        body = await _json(request)
        asked, tools = read_request(body, served.modelfile, name), offered_tools(body)
        # Whatever can be refused is refused here: a stream that has begun could only break off.
        text, ids = served.prompt(body.get("messages"), tools)
        served.check_room(ids)
        logger.debug("prompt ids %s", ids)
        asked.messages = [{"role": "user", "content": text}]
        # A call is known when the answer is complete.
        streams, asked.stream = asked.stream, asked.stream and not tools
        try:
            made = await upstream.create_chat_completion(request, asked)
        except asyncio.CancelledError:
            raise RequestError("the server is ending", "", "server_ending", 503) from None
        if isinstance(made, Response):
            return made
        answer = with_tool_calls(made, tool_names(tools))
        return EventSourceResponse(_events(answer), sep="\n") if streams else JSONResponse(answer)

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])],
        middleware=[
            # Without these any web page that the user opens could ask the model: under a name of its own that it
            # points to 127.0.0.1 (DNS rebinding), or as another origin.
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
            Middleware(CORSMiddleware, allow_origin_regex=LOCAL_PAGE, allow_methods=["GET", "POST"], allow_headers="*"),
        ],
        exception_handlers={RequestError: _refusal},
    )


def check_page(origin: str | None) -> None:
    """Raise RequestError (403) for a request from a web page that is not of this machine."""
    if origin is not None and urlsplit(origin).hostname not in LOOPBACK:
        raise RequestError(f"pages of {origin} may not ask this server", "Origin", "forbidden", 403)


def _load(served: ServedModel, name: str) -> None:
    """Give llama_cpp.server the model, and a chat format that takes the one message as the rendered prompt."""
    stops = list(served.modelfile.stops)

    def rendered(*, messages: Sequence[Any], **_: Any) -> Any:
        return ChatFormatterResponse(prompt=messages[0]["content"], stop=stops, added_special=True)

    complete = chat_formatter_to_chat_completion_handler(rendered)

    def answer(*, llama: llama_cpp.Llama, **settings: Any) -> Any:
        if not isinstance(llama.tokenizer_, WholePieces):
            llama.tokenizer_ = WholePieces(llama)
        return complete(llama=llama, **settings)

    register_chat_completion_handler(CHAT_FORMAT)(answer)
    # model_construct, since these classes fill what is not given from environment variables without any prefix.
    upstream.set_server_settings(ServerSettings.model_construct(interrupt_requests=False))
    model = ModelSettings.model_construct(
        model=str(served.gguf),
        model_alias=name,
        n_ctx=served.modelfile.num_ctx,
        chat_format=CHAT_FORMAT,
        logits_all=False,
        verbose=False,
    )
    upstream.set_llama_proxy([model])


async def _json(request: Request) -> dict[str, Any]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"more than {MAX_BODY_BYTES} bytes", "body", status=413)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as fault:
        raise RequestError(f"the body is not JSON: {fault}", "body") from None
    if not isinstance(content, dict):
        raise RequestError("the body is a JSON object", "body")
    # null counts as not given, as in OpenAI's interface.
    return {key: value for key, value in content.items() if value is not None}


async def _events(completion: Chat) -> AsyncIterator[str]:
    for chunk in as_stream(completion):
        yield json.dumps(chunk)
    yield "[DONE]"


async def _refusal(_: Request, error: Exception) -> Response:
    fault = error if isinstance(error, RequestError) else RequestError(str(error), "body")
    entry = {"message": str(fault), "type": "invalid_request_error", "param": fault.key, "code": fault.code}
    return JSONResponse({"error": entry}, status_code=fault.status)
