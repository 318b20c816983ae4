"""The one record type: what every source becomes and every later stage reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from json.encoder import encode_basestring
from typing import Any, Literal

from finetune.io import sha256_text

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` is a JSON string (a list of {name, arguments}), as Arrow would merge structs."""

    role: Role
    content: str
    tool_calls: str | None = None


@dataclass(frozen=True)
class Record:
    """A conversation (`messages`) or a plain text (`text`), never both.

    `group` names what may not be torn apart by the split (thread, user, day); `id` is the hash of the content,
    so equal content has an equal id whatever file it came from.
    """

    id: str
    source: str
    group: str
    language: str | None
    messages: tuple[Message, ...]
    tools: str | None
    text: str | None

    def to_row(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_row(row: dict[str, Any]) -> Record:
        """The record of a JSON object written by `to_row`."""
        messages = tuple(Message(**message) for message in row["messages"])
        return Record(**{**row, "messages": messages})

    def all_text(self) -> str:
        """Every text that a model would read, joined by newlines: for dedup, lengths and tokenizer training."""
        if self.text is not None:
            return self.text
        parts = [self.tools] if self.tools else []
        for message in self.messages:
            parts.append(message.content)
            if message.tool_calls:
                parts.append(message.tool_calls)
        return "\n".join(parts)


def make_record(
    *,
    source: str,
    messages: tuple[Message, ...] = (),
    text: str | None = None,
    tools: str | None = None,
    group: str | None = None,
    language: str | None = None,
) -> Record:
    """Build a record; its id hashes the content, and its group is the id unless the source names one."""
    if (text is None) == (not messages):
        raise ValueError(f"a record has either messages or text, got {len(messages)} messages and text={text!r}")
    identity = sha256_text(_canonical(messages, tools, text))
    return Record(identity, source, f"{source}/{group or identity}", language, messages, tools, text)


def _canonical(messages: tuple[Message, ...], tools: str | None, text: str | None) -> str:
    """JSON of `[messages, tools, text]` with sorted keys, twice as fast as a general encoder writes it."""
    turns = ", ".join(
        f'{{"content": {_quoted(message.content)}, "role": "{message.role}", '
        f'"tool_calls": {_quoted(message.tool_calls)}}}'
        for message in messages
    )
    return f"[[{turns}], {_quoted(tools)}, {_quoted(text)}]"


def _quoted(text: str | None) -> str:
    return "null" if text is None else encode_basestring(text)
