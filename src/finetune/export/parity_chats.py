"""Chats that a served prompt must render as training did: ordinary ones, and the contents that break templates.

Contents that spell a special token ("<|user|>") become that token in training, in llama.cpp and in Ollama alike, since
all three look for special tokens in the whole rendered text. Served therefore equals trained; that a user can write a
role marker is the price, and is the same in every engine. Text in another Unicode normal form than NFC is not here:
`clean` normalises the training text, and llama.cpp applies no normalizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ParityChat:
    """A chat as a client sends it; `system` is the Modelfile's SYSTEM, which the server puts first."""

    name: str
    messages: tuple[dict[str, str], ...]
    system: str = ""

    def full_messages(self) -> list[dict[str, str]]:
        """The messages that the model is to see: those of the client, after SYSTEM if there is one."""
        lead = [{"role": "system", "content": self.system}] if self.system else []
        return [*lead, *self.messages]


def parity_chats(roles: Sequence[str], system: str) -> list[ParityChat]:
    """The chats of the gate, for a template with these roles and a Modelfile with this SYSTEM (empty: none)."""
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
    return chats


def _chat(name: str, roles: str, *contents: str) -> ParityChat:
    pairs = zip(roles.split(), contents, strict=True)
    return ParityChat(name, tuple({"role": role, "content": content} for role, content in pairs))
