"""A record that is longer than `max_tokens` -> what the policy `over_length` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.encoding.chat import Chat, Encoded, encode_record
from finetune.data.encoding.encoder import Encoder
from finetune.data.record import Message, Record
from finetune.data_sections import Tokenize
from finetune.errors import DataError


@dataclass(frozen=True)
class Fitted:
    """The documents of one record, none longer than `max_tokens`, or the `reason` why there is none.

    `cut_tokens`: tokens that truncation took; `lost_trained`: whether one of them was trained, so that the document no
    longer ends in the stop token; `dropped_exchanges`: those that are too long by themselves.
    """

    documents: tuple[Encoded, ...] = ()
    reason: str | None = None
    cut_tokens: int = 0
    lost_trained: bool = False
    dropped_exchanges: int = 0


def fit(record: Record, whole: Encoded, chat: Chat, encoder: Encoder, params: Tokenize) -> Fitted:
    """The documents of a record whose ids are `whole`; raises DataError with `refuse` when it is too long."""
    length = len(whole.input_ids)
    if length <= params.max_tokens:
        return Fitted((whole,)) if whole.trained_tokens() else Fitted(reason="no_trained_token")
    if params.over_length == "truncate":
        return _truncate(whole, params.max_tokens)
    if params.over_length == "split":
        if record.text is not None:
            return _split_text(whole, chat, params.max_tokens)
        return _split_conversation(record, chat, encoder, params)
    if params.over_length == "refuse":
        raise DataError(
            f"record {record.id} of source {record.source} has {length} tokens, more than {params.max_tokens}",
            "tokenize.max_tokens",
            "raise it, or set tokenize.over_length to drop, truncate or split",
        )
    return Fitted(reason="over_length")


def exchanges(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system turns that open a conversation, and its exchanges: a user turn up to the last answer to it.

    Turns before the first user turn belong to the first exchange, and turns after the last answer to the last one.
    """
    opening = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    starts, answered = [opening], False
    for at, message in enumerate(messages):
        if message.role == "assistant":
            answered = True
        elif message.role == "user" and answered:
            starts.append(at)
            answered = False
    if not answered and len(starts) > 1:
        starts.pop()
    ends = [*starts[1:], len(messages)]
    return messages[:opening], [messages[start:end] for start, end in zip(starts, ends, strict=True)]


def _truncate(whole: Encoded, max_tokens: int) -> Fitted:
    kept = Encoded(whole.input_ids[:max_tokens], whole.trained[:max_tokens], whole.straddling)
    if not kept.trained_tokens():
        return Fitted(reason="no_trained_token_left")
    cut = whole.trained[max_tokens:]
    return Fitted((kept,), cut_tokens=len(cut), lost_trained=bool(cut.any()))


def _split_text(whole: Encoded, chat: Chat, max_tokens: int) -> Fitted:
    """Consecutive pieces of nearly equal length, each opened by BOS; EOS stands where the text ends, and only there."""
    head = whole.input_ids[:1] if chat.ids.bos is not None else whole.input_ids[:0]
    body, room = whole.input_ids[len(head) :], max_tokens - len(head)
    if room == 0:
        return Fitted(reason="over_length")
    parts = np.array_split(body, -(-len(body) // room))
    ids = [np.concatenate([head, part]) for part in parts]
    pieces = [Encoded(piece, np.ones(len(piece), np.bool_), 0) for piece in ids]
    return _with_trained(pieces, 0)


def _split_conversation(record: Record, chat: Chat, encoder: Encoder, params: Tokenize) -> Fitted:
    """Pieces of whole exchanges, each with the system turn and the tools.

    They are cut from the end, each as long as fits, so that the short one is the beginning, which lacks no context.
    With `last_assistant` only the piece that holds the last answer is trained, so it is the only one made.
    """
    system, parts = exchanges(record.messages)
    pieces: list[Encoded] = []
    dropped, end = 0, len(parts)
    while end > 0:

        def encoded_last(count: int, end: int = end) -> Encoded | None:
            messages = sum(parts[end - count : end], start=system)
            piece = encode_record(replace(record, messages=messages), chat, encoder, params.loss)
            return piece if len(piece.input_ids) <= params.max_tokens else None

        count, piece = _longest(encoded_last, end)
        if piece is None:
            dropped += 1
        else:
            pieces.append(piece)
        end -= max(count, 1)
        if params.loss == "last_assistant":
            dropped += end
            break
    return _with_trained(pieces[::-1], dropped)


def _longest(attempt: Callable[[int], Encoded | None], most: int) -> tuple[int, Encoded | None]:
    """The largest count of 1 to `most` that `attempt` fits, and its result; (0, None) when not even 1 does.

    By doubling, then halving: a long conversation is not encoded whole for each of its pieces.
    """
    fits, too_many = 0, most + 1
    best: Encoded | None = None
    while too_many - fits > 1:
        count = min(max(2 * fits, 1), most) if too_many > most else (fits + too_many) // 2
        result = attempt(count)
        if result is None:
            too_many = count
        else:
            fits, best = count, result
    return fits, best


def _with_trained(pieces: list[Encoded], dropped_exchanges: int) -> Fitted:
    trained = tuple(piece for piece in pieces if piece.trained_tokens())
    reason = None if trained else "no_trained_token" if pieces else "over_length"
    return Fitted(trained, reason, dropped_exchanges=dropped_exchanges)
