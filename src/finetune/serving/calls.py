"""an answer as text -> the function calls in it as OpenAI's `tool_calls`, whole or as the chunks of a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from finetune.evaluation.call_parser import CLOSED_MARKERS, OPEN_MARKERS, parse_calls

Chat = dict[str, Any]
MARKERS = re.compile("|".join(re.escape(marker) for marker in [*(first for first, _ in CLOSED_MARKERS), *OPEN_MARKERS]))

MARKED = re.compile("|".join(f"{re.escape(first)}.*?{re.escape(last)}" for first, last in CLOSED_MARKERS), re.DOTALL)
# Nothing closes these: all that follows is the call.
OPENED = re.compile("(?:" + "|".join(map(re.escape, OPEN_MARKERS)) + ").*", re.DOTALL)


def with_tool_calls(completion: Chat, offered: set[str]) -> Chat:
    """The completion with the calls of its text as `tool_calls`, if all are of offered functions; else as it is.

    What stands around the calls stays as `content`.
    """
    choice = completion["choices"][0]
    text = choice["message"]["content"]
    calls = parse_calls(text).calls
    if not calls or not {call.name for call in calls} <= offered:
        return completion
    entries = [
        {
            "id": f"call_{index}_{completion['id']}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for index, call in enumerate(calls)
    ]
    around = OPENED.sub("", MARKED.sub("", text)).strip() if MARKERS.search(text) else ""
    message = {**choice["message"], "content": around or None, "tool_calls": entries}
    return {**completion, "choices": [{**choice, "message": message, "finish_reason": "tool_calls"}]}


def as_stream(completion: Chat) -> Iterator[Chat]:
    """The chunks of a complete answer: all of it at once, then its end."""
    choice = completion["choices"][0]
    delta = {key: value for key, value in choice["message"].items() if value is not None}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    head = {**{key: completion[key] for key in ("id", "model", "created")}, "object": "chat.completion.chunk"}
    for piece, finished in ((delta, None), ({}, choice["finish_reason"])):
        yield {**head, "choices": [{"index": 0, "delta": piece, "logprobs": None, "finish_reason": finished}]}
