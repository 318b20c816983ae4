"""Chats that a served prompt must render as training did: ordinary ones, and the contents that break templates.

Contents that spell a special token ("<|user|>") become that token in training, in llama.cpp and in Ollama alike, since
all three look for special tokens in the whole rendered text. Served therefore equals trained; that a user can write a
role marker is the price, and is the same in every engine. Text in another Unicode normal form than NFC is not here:
`clean` normalises the training text, and llama.cpp applies no normalizer. Functions and calls are as a client sends
them, keys in any order: Ollama orders them by itself, and finetune.tool_forms does so before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.tool_forms import canonical_messages, canonical_tools

LONG_REPEATS = 120
CONTENTS = (
    ("plain", "Quels sont vos horaires ?"),
    ("accents", "Où êtes-vous ? Ça coûte 12,50 €, n’est-ce pas… « à peu près » — œuvre, Noël, ÀÉÎÕÜ"),
    ("emoji", "Merci 😀🎉 ❤️ 👍🏽 🇫🇷"),
    ("joined emoji", "👨\u200d👩\u200d👧\u200d👦 👩🏽\u200d🚀 🏳️\u200d🌈"),
    ("CJK", "営業時間は何時ですか。工作坊几点开门？ 안녕하세요"),
    ("other scripts", "Привет, מה שלומך, كيف حالك, नमस्ते, ไทย"),
    ("spaces around", "   two before, three after   "),
    ("tabs and blank lines", "\tfirst\n\n\n  second\t\t\n \nthird\n"),
    ("newlines around", "\n\nhello\n\n"),
    ("carriage returns", "one\r\ntwo\rthree"),
    ("unprintable", "no\u00a0break, zero\u200bwidth, soft\u00adhyphen, \ufeffmark"),
    ("template syntax", "{{ .Content }} {% if x %}{{- \"y\" -}}{% endif %} {# z #} {{ messages[0]['content'] }} `$x`"),
    ("quotes", '"a" \'b\' """c""" `d` \\n \\" \\\\ &amp; <b>&</b>'),
    ("code", "def f(x):\n    return {'a': [x ** 2, 0x1F, 1e-6]}  # 100%\n"),
    ("numbers", "2026-11-20 12:34:56 +33 1 23 45 67 89 1234567890 3.14159 ½ ²"),
    ("address", "https://example.org/a?b=c&d=%20#e me@example.org @user #tag"),
    ("role markers", "<|user|>\nhello\n<|assistant|>\n<|im_start|>system [INST] <|eot_id|> </s> <s> <<SYS>>"),
    ("long", "La réparation d'une roue voilée prend une heure environ. " * LONG_REPEATS),
    ("one letter", "a"),
)
TURNS = (
    "Hello",
    "Good day, how can I help?",
    "What are your hours?",
    "From 9 to 18.",
    "And on Sunday?",
    "Closed.",
    "Ok",
)


HOURS: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_hours",
        "description": "Opening hours of a day",
        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
    },
}
# Keys in no order at all, everything that Ollama's structs know, and numbers that Go and Python could write otherwise.
BOOK: dict[str, Any] = {
    "function": {
        "parameters": {
            "required": ["object", "day"],
            "properties": {
                "object": {
                    "description": 'Objet à réparer : <b>"lampe"</b> & co\n(un seul)',
                    "type": "object",
                    "properties": {
                        "width": {"type": "number"},
                        "brand": {"enum": ["Été", None, 2.0], "type": "string"},
                    },
                },
                "day": {"type": ["string", "null"], "enum": ["lundi", "mardi"]},
                "at": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                "parts": {"type": ["array"], "items": {"type": "object", "properties": {"z": {}, "a": {}}}},
            },
            "type": "object",
            "$defs": {"z": 1.0, "a": [1e16, 0.25]},
        },
        "name": "book_repair",
    },
    "type": "function",
}


@dataclass(frozen=True)
class ParityChat:
    """A chat as a client sends it; `system` is the Modelfile's SYSTEM, which the server puts first."""

    name: str
    messages: tuple[dict[str, Any], ...]
    system: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def full_messages(self) -> list[dict[str, Any]]:
        """The messages that the model is to see: those of the client, after SYSTEM if there is one."""
        lead = [{"role": "system", "content": self.system}] if self.system else []
        return canonical_messages([*lead, *self.messages])

    def full_tools(self) -> list[dict[str, Any]] | None:
        """The functions as the model is to see them; None where there are none."""
        return canonical_tools(self.tools) if self.tools else None

    def has_functions(self) -> bool:
        """Whether the chat has functions, calls beside the texts, or results of calls."""
        return bool(self.tools) or any("tool_calls" in turn or turn["role"] == "tool" for turn in self.messages)


def parity_chats(
    roles: Sequence[str], system: str, *, tools: bool = False, tool_calls: bool = False
) -> list[ParityChat]:
    """The chats of the gate, for a template with these roles and a Modelfile with this SYSTEM (empty: none).

    `tools` and `tool_calls`: whether the template writes function definitions and calls by itself.
    """
    chats = [_chat(name, "user", content) for name, content in CONTENTS]
    chats += [_chat(f"answer of {name}", "user assistant user", "Hello", content, "Ok") for name, content in CONTENTS]
    for turns in (2, 3, 4, 5):
        names = " ".join(["user assistant"] * (turns - 1) + ["user"])
        contents = [TURNS[number % len(TURNS)] for number in range(2 * turns - 1)]
        chats.append(_chat(f"{turns} turns", names, *contents))
        if "system" in roles:
            chats.append(_chat(f"system and {turns} turns", f"system {names}", "Be brief.", *contents))
    if "system" in roles:
        chats += [_chat(f"system of {name}", "system user", content, "Hello") for name, content in CONTENTS]
        chats.append(_chat("empty system", "system user", "", "Hello"))
        chats.append(_chat("blank system", "system user", "   ", "Hello"))
        if system:
            chats.append(ParityChat("SYSTEM", _chat("", "user", "Hello").messages, system))
            answered = _chat("", "user assistant user", *TURNS[:3])
            chats.append(ParityChat("SYSTEM and 2 turns", answered.messages, system))
    if "tool" in roles:
        call = '<tool_call>{"name": "hours", "arguments": {"day": "lundi"}}</tool_call>'
        names = "user assistant tool"
        chats.append(_chat("tool result last", names, "Lundi ?", call, '{"open": "09:00"}'))
        chats.append(_chat("answered tool call", f"{names} assistant user", "Lundi ?", call, "9 h", "À 9 h.", "Merci"))
        chats.append(_chat("two tool results", f"{names} tool", "Lundi ?", f"{call}\n{call}", "9 h", "18 h"))
    if tools:
        chats += _chats_with_tools(roles, system)
    if tool_calls:
        chats += _chats_with_calls(roles, (HOURS, BOOK) if tools else ())
    return chats


def _chats_with_tools(roles: Sequence[str], system: str) -> list[ParityChat]:
    """Definitions at the start of a chat: one, several, nested, of unusual text, with and without system message."""
    question = _chat("", "user", "Lundi ?").messages
    chats = [
        ParityChat("one function", question, tools=(HOURS,)),
        ParityChat("two functions", _chat("", "user assistant user", *TURNS[:3]).messages, tools=(HOURS, BOOK)),
        ParityChat("a bare function", question, tools=({"type": "function", "function": {"name": "now"}},)),
    ]
    for name, content in CONTENTS:
        function = {**HOURS["function"], "description": content}
        chats.append(ParityChat(f"function of {name}", question, tools=({**HOURS, "function": function},)))
    if "system" in roles:
        for content in ("Be brief.", "", "  \n "):
            messages = _chat("", "system user", content, "Lundi ?").messages
            chats.append(ParityChat(f"functions and system {content!r}", messages, tools=(BOOK, HOURS)))
        if system:
            chats.append(ParityChat("functions and SYSTEM", question, system, (HOURS, BOOK)))
    return chats


def _chats_with_calls(roles: Sequence[str], tools: tuple[dict[str, Any], ...]) -> list[ParityChat]:
    """Calls and results: one, several in an answer, beside a text, of unusual arguments, followed by other turns."""
    one, none = _call("get_hours", {"day": "lundi"}), _call("now", {})
    unusual = {"z": [1, 2.0, -0.5, 1e16, True, None], "a": {"b": {"d": 'é<&>"\\\n', "c": {}}}, "œ": "日本"}
    results = "tool" in roles
    chats = [
        _called("a call", [one], [], tools),
        _called("two calls", [one, _call("book_repair", unusual)], ["9 h", '{"ok": true}'] if results else [], tools),
        _called("a call without arguments", [none], ["10:15"] if results else [], tools),
        _called("a call beside a text", [one], ["9 h"] if results else [], tools, "Je regarde."),
        _called("a call without definitions", [one], ["9 h"] if results else [], ()),
    ]
    chats += [_called(f"a call of {name}", [_call("f", {"x": content})], [], tools) for name, content in CONTENTS]
    for turns in ("assistant", "assistant user assistant user"):
        chat = _called("", [one, one], ["9 h", "18 h"] if results else [], tools)
        later = _chat("", turns, *TURNS[1 : 1 + len(turns.split())]).messages
        chats.append(ParityChat(f"a call, then {turns}", chat.messages + later, tools=tools))
    return chats


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _called(
    name: str, calls: list[dict[str, Any]], results: Sequence[str], tools: tuple[dict[str, Any], ...], text: str = ""
) -> ParityChat:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Lundi ?"},
        {"role": "assistant", "content": text, "tool_calls": calls},
    ]
    for call, result in zip(calls, results, strict=False):
        messages.append({"role": "tool", "content": result, "name": call["function"]["name"]})
    return ParityChat(name, tuple(messages), tools=tools)


def _chat(name: str, roles: str, *contents: str) -> ParityChat:
    pairs = zip(roles.split(), contents, strict=True)
    return ParityChat(name, tuple({"role": role, "content": content} for role, content in pairs))
