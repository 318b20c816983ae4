"""UTF-8 text -> 64-bit hashes of its words and of runs of words: what near-duplicates and contamination are found by.

Everything is arithmetic on numpy arrays of integers, so it is fast (about 100 MB/s a core) and the same on any machine.
Two different runs of words share a hash with a chance of 2^-64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.data.record import Record

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

# Never part of UTF-8. They open lines in the text of `lines_of`: one that nobody said (tool calls and results), and one
# that a user said; a plain text counts as such.
UNSPOKEN, ASKED = 0xFE, 0xFF
# A longer run of word characters (base64, a script without spaces) counts as several words.
MAX_WORD_BYTES = 64
EDGE = b"\n"
PADDING = EDGE * 8
# Letters, digits and the underscore of ASCII, and whatever is not ASCII; general punctuation is taken out below.
WORD_BYTES = np.array([chr(byte).isalnum() or byte == ord("_") for byte in range(128)] + [True] * 128)
WORD_BYTES[[UNSPOKEN, ASKED]] = False
MASKS = np.array([(1 << (8 * size)) - 1 for size in range(9)], dtype=np.uint64)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# The finaliser of MurmurHash3: https://github.com/aappleby/smhasher/wiki/MurmurHash3
MIX_1, MIX_2, MIX_SHIFT = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33)


def folded(text: str) -> str:
    """The text without differences of case and white space."""
    return " ".join(text.casefold().split())


class Folded(NamedTuple):
    """The folded texts of a record: (role, content, calls) of each turn, tools, text; "" where there is none."""

    turns: Sequence[tuple[str, str, str]]
    tools: str
    text: str


def fold(record: Record) -> Folded:
    """The folded texts of a record; folding is what takes longest, so it is done once."""
    turns = [
        (message.role, folded(message.content), folded(message.tool_calls) if message.tool_calls else "")
        for message in record.messages
    ]
    return Folded(turns, folded(record.tools or ""), folded(record.text or ""))


def lines_of(texts: Folded) -> bytes:
    """The texts of a record, a line each: what was said first, of users after `ASKED`, then the rest after `UNSPOKEN`.

    System prompts and tool definitions are left out: many records share them, and they make no two records alike.
    """
    if not texts.turns:
        return b"%c%b%b" % (ASKED, texts.text.encode(), EDGE)
    said, unsaid = [], []
    for role, content, calls in texts.turns:
        if role == "user":
            said.append(b"%c%b%b" % (ASKED, content.encode(), EDGE))
        elif role == "assistant":
            said.append(content.encode() + EDGE)
        elif role == "tool":
            unsaid.append(b"%c%b%b" % (UNSPOKEN, content.encode(), EDGE))
        if calls:
            unsaid.append(b"%c%b%b" % (UNSPOKEN, calls.encode(), EDGE))
    return b"".join(said + unsaid)


def mix(values: U64) -> U64:
    """A fixed one-to-one scrambling of 64-bit numbers."""
    mixed = (values ^ (values >> MIX_SHIFT)) * MIX_1
    mixed ^= mixed >> MIX_SHIFT
    mixed *= MIX_2
    mixed ^= mixed >> MIX_SHIFT
    return mixed


def hash_words(content: bytes) -> tuple[U64, I64]:
    """The hash of each word in order, and the offset in bytes at which it starts. Punctuation is no part of a word."""
    padded = EDGE + content + PADDING
    starts, lengths = _word_places(np.frombuffer(padded, dtype=np.uint8))
    eight_bytes_at = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    hashes = mix(eight_bytes_at[starts] & MASKS[np.minimum(lengths, 8)])
    for offset in range(8, MAX_WORD_BYTES, 8):
        longer = np.flatnonzero(lengths > offset)
        if not longer.size:
            break
        more = eight_bytes_at[starts[longer] + offset] & MASKS[np.minimum(lengths[longer] - offset, 8)]
        hashes[longer] = mix(hashes[longer] * MULTIPLIER + more)
    return hashes, starts - len(EDGE)


def hash_runs(words: U64, ends: I64, size: int, *, whole_if_shorter: bool) -> tuple[U64, I64]:
    """The hash of each run of `size` words within a segment, and the number of runs of each segment.

    `ends`: for each segment the index one past its last word. With `whole_if_shorter` a segment of fewer words than
    `size`, but at least one, has one run: all of its words.
    """
    firsts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    lengths = ends - firsts
    counts = np.maximum(lengths - size + 1, 0)
    short = np.flatnonzero((lengths > 0) & (lengths < size)) if whole_if_shorter else np.zeros(0, dtype=np.int64)
    counts[short] = 1
    rolled = np.zeros(len(words), dtype=np.uint64)
    last = len(words) - size + 1
    if last > 0:
        rolled[:last] = words[:last]
        for offset in range(1, size):
            rolled[:last] *= MULTIPLIER
            rolled[:last] += words[offset : offset + last]
    rolled[firsts[short]] = _whole(words, firsts[short], lengths[short])
    before = np.cumsum(counts) - counts
    places = np.arange(counts.sum()) + np.repeat(firsts - before, counts)
    return mix(rolled[places]), counts


def hash_segments(words: U64, ends: I64) -> U64:
    """The hash of all words of each segment (`ends` as above), however long; segments without words share one."""
    lengths = np.diff(ends, prepend=0)
    places = np.arange(len(words)) - np.repeat(ends - lengths, lengths)
    factors = np.full(int(lengths.max(initial=0)), MULTIPLIER)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(words * np.cumprod(factors)[places])])
    return mix(mix(sums[ends] - sums[ends - lengths]) + lengths.astype(np.uint64))


def _whole(words: U64, firsts: I64, lengths: I64) -> U64:
    hashes = words[firsts]
    for offset in range(1, int(lengths.max(initial=1))):
        longer = np.flatnonzero(lengths > offset)
        hashes[longer] = hashes[longer] * MULTIPLIER + words[firsts[longer] + offset]
    return hashes


def _word_places(raw: NDArray[np.uint8]) -> tuple[I64, I64]:
    """Start and length in bytes of each word; both ends of `raw` are no word bytes."""
    inside = WORD_BYTES[raw]
    # U+2000 to U+207F: dashes, curly quotes, ellipsis, narrow spaces.
    general = np.flatnonzero(raw == 0xE2)
    general = general[(raw[general + 1] == 0x80) | (raw[general + 1] == 0x81)]
    for offset in range(3):
        inside[general + offset] = False
    # U+0080 to U+00BF: guillemets, no-break space, signs; three of them are letters.
    signs = np.flatnonzero(raw == 0xC2)
    signs = signs[~np.isin(raw[signs + 1], (0xAA, 0xB5, 0xBA))]
    for offset in range(2):
        inside[signs + offset] = False
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    if lengths.max(initial=0) <= MAX_WORD_BYTES:
        return starts, lengths
    pieces = -(-lengths // MAX_WORD_BYTES)
    steps = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + steps * MAX_WORD_BYTES
    return starts, np.minimum(np.repeat(ends, pieces) - starts, MAX_WORD_BYTES)
