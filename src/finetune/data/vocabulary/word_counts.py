"""Texts -> how often each word (pre-token) occurs, in bounded memory; what had to be forgotten is counted.

A text is first cut before each space that follows another character, where the pattern always begins a new word.
Those pieces repeat, so they are counted as they are, and the pattern runs over the different ones only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow
import regex
from pyarrow import compute
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from finetune.pretokenizer import LLAMA3_PATTERN

# Twice as fast as the library, and the same on these characters (Latin, punctuation, currencies: tested). Of other
# scripts it knows letters of a newer Unicode than the library does, so their words are split by the library.
everyday_words = regex.compile(LLAMA3_PATTERN).findall
EVERYDAY = r"^[\x{00}-\x{24F}\x{2000}-\x{206F}\x{20A0}-\x{20BF}]*$"
SPLITTER = Split(Regex(LLAMA3_PATTERN), behavior="isolated")
# Python's `\s` holds all white space of the pattern's engine and a few control characters more, so that a cut may be
# missed and is never wrong.
SPACE_AFTER_SPACE = regex.compile(r"\s ")
CERTAIN_CUT = regex.compile(r"(?<=\S) ")
# Pieces that the pattern takes whole, and of which every engine knows that they are letters.
ONE_WORD = r"^ ?[A-Za-zÀ-ÖØ-öø-ÿŒœ]+$"
EMPTY, SPACE = (pyarrow.scalar(text, pyarrow.large_string()) for text in ("", " "))
# What is kept when the table is full, so that it is not thinned out after every block.
KEPT_SHARE = 0.75


@dataclass(frozen=True)
class WordCounts:
    """Words as bytes end to end (word i is data[offsets[i]:offsets[i + 1]]) and how often each occurs.

    `forgotten_words` were dropped from the full table with the `forgotten_occurrences` seen until then; one that came
    again was counted from 0, and may have been dropped, and counted here, more than once.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    forgotten_words: int
    forgotten_occurrences: int


@dataclass
class WordTable:
    """Counts of at most `max_words` different words, UTF-8; beyond it the rarest are forgotten.

    Of equally rare words the older ones are kept, so that the result depends on the texts and their order alone.
    """

    max_words: int
    counts: dict[bytes, int] = field(default_factory=dict)
    forgotten_words: int = 0
    forgotten_occurrences: int = 0

    def add(self, block: pyarrow.Table) -> None:
        """Add what `count_words` gave for one block of texts."""
        known, count_of = self.counts, self.counts.get
        for word, count in zip(block["word"].to_pylist(), block["count"].to_pylist(), strict=True):
            known[word] = count_of(word, 0) + count
        if len(known) > self.max_words:
            self._forget_rarest(int(self.max_words * KEPT_SHARE))

    def finish(self) -> WordCounts:
        """The counted words in the order in which they were first seen; the table is emptied."""
        lengths = np.fromiter(map(len, self.counts), np.int64, len(self.counts))
        counts = np.fromiter(self.counts.values(), np.int64, len(self.counts))
        data = np.frombuffer(b"".join(self.counts), np.uint8)
        self.counts = {}
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        return WordCounts(data, offsets, counts, self.forgotten_words, self.forgotten_occurrences)

    def _forget_rarest(self, kept_words: int) -> None:
        counts = np.fromiter(self.counts.values(), np.int64, len(self.counts))
        limit = int(np.partition(counts, len(counts) - kept_words)[len(counts) - kept_words])
        at_limit = kept_words - int((counts > limit).sum())
        kept = counts > limit
        kept[np.flatnonzero(counts == limit)[:at_limit]] = True
        self.forgotten_words += len(counts) - kept_words
        self.forgotten_occurrences += int(counts[~kept].sum())
        self.counts = {word: count for (word, count), keep in zip(self.counts.items(), kept, strict=True) if keep}


def count_words(texts: Iterable[str]) -> pyarrow.Table:
    """Columns `word` (UTF-8 bytes) and `count` of one block of texts; a word may stand in two rows.

    The order of the rows depends on the texts and their order alone.
    """
    openings: list[str] = []
    even: list[str] = []
    uneven: list[str] = []
    for text in texts:
        if SPACE_AFTER_SPACE.search(text):
            opening, *pieces = CERTAIN_CUT.split(text)
            uneven.extend(pieces)
        else:
            opening, space, rest = text.partition(" ")
            even.extend([rest] if space else [])
        openings.append(opening)
    split = compute.list_flatten(compute.split_pattern(_strings(even), " "))
    counted = pyarrow.chunked_array([split, _strings(uneven)]).value_counts()
    spaced = compute.binary_join_element_wise(EMPTY, counted.field("values"), SPACE)
    pieces_with_space = pyarrow.chunked_array([spaced, _strings(openings)])
    ones = pyarrow.repeat(pyarrow.scalar(1, pyarrow.int64()), len(openings))
    return _words_of(pieces_with_space, pyarrow.chunked_array([counted.field("counts"), ones]))


def library_words(text: str) -> list[str]:
    """The words of a text, in order, as the library's pre-tokenizer splits it."""
    return [word for word, _ in SPLITTER.pre_tokenize_str(text)]


def _words_of(pieces: pyarrow.ChunkedArray, counts: pyarrow.ChunkedArray) -> pyarrow.Table:
    whole = compute.match_substring_regex(pieces, ONE_WORD)
    everyday = compute.match_substring_regex(pieces, EVERYDAY)
    found: dict[str, int] = {}
    count_of = found.get
    for chosen, split in (
        (compute.and_not(everyday, whole), everyday_words),
        (compute.invert(everyday), library_words),
    ):
        for piece, count in zip(pieces.filter(chosen).to_pylist(), counts.filter(chosen).to_pylist(), strict=True):
            for word in split(piece):
                found[word] = count_of(word, 0) + count
    found_counts = pyarrow.array(list(found.values()), pyarrow.int64())
    words = pyarrow.chunked_array([*pieces.filter(whole).chunks, _strings(list(found))])
    return pyarrow.table(
        {
            "word": words.cast(pyarrow.large_binary()),
            "count": pyarrow.chunked_array([*counts.filter(whole).chunks, found_counts]),
        }
    )


def _strings(texts: list[str]) -> pyarrow.Array:
    # 64-bit offsets: a block of one long record may hold more than 2 GiB.
    return pyarrow.array(texts, pyarrow.large_string())
