"""Token rows -> pieces of text, each trained or masked, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tokenizers import Tokenizer

from finetune.data.splits import TokenRow

UNDECODABLE = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of the few that together make whole characters."""

    text: str
    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class Example:
    """One document; tokens in all, and those of them that are trained."""

    id: str
    source: str
    language: str | None
    tokens: int
    trained_tokens: int
    pieces: tuple[Piece, ...]


def mask_examples(rows: Sequence[TokenRow], tokenizer: Tokenizer, count: int) -> list[Example]:
    """Up to `count` of the rows, one of each source in turn."""
    by_source = [[row for row in rows if row["source"] == source] for source in sorted({row["source"] for row in rows})]
    in_turn = [row for together in zip_longest(*by_source) for row in together if row is not None]
    return [_example(row, tokenizer) for row in in_turn[:count]]


def _example(row: TokenRow, tokenizer: Tokenizer) -> Example:
    return Example(
        id=row["id"],
        source=row["source"],
        language=row["language"],
        tokens=len(row["input_ids"]),
        trained_tokens=sum(row["trained"]),
        pieces=tuple(pieces(row["input_ids"], row["trained"], tokenizer)),
    )


def pieces(input_ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The tokens as texts; a character that is spread over tokens makes one piece of them, if their masks are equal."""
    pending: list[int] = []
    for index, token in enumerate(input_ids):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        last = index + 1 == len(input_ids)
        if UNDECODABLE not in text or last or trained[index + 1] != trained[index]:
            yield Piece(text, tuple(pending), trained[index])
            pending = []
