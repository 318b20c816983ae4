"""French and English JSON lines of any size with planted duplicates, for the benchmarks of the data stages.

The words are those of word_corpus.py. Beyond the first MADE_BLOCKS of it a block is an earlier one with its words in
another order: as many different runs of words as new text, ten times faster to make. One row in twenty is repeated in
other case and spacing, one in twenty with one word in a hundred changed (a true Jaccard of five-word shingles of about
0.9), a thousand rows later. The same bytes on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import orjson
import word_corpus

from finetune.data.workers import ordered_map

MADE_BLOCKS = 160
# A near-duplicate of a shorter text could be less similar than what is looked for.
MIN_WORDS_OF_NEAR = 60


def write_corpus(files: list[Path], size_bytes: int, *, chat: bool) -> dict[tuple[int, int], tuple[int, int]]:
    """Write about `size_bytes` in all, in files of equal size; gives (file, line) of each copy -> of its original.

    Rows are {"text": ...}, or with `chat` {"messages": [...]}: the first words ask, the others answer.
    """
    rows = _rows()
    places: dict[int, tuple[int, int]] = {}
    copies = {}
    for number, file in enumerate(files):
        with file.open("wb") as out:
            written = line = 0
            while written < size_bytes // len(files):
                serial, original, text = next(rows)
                row = orjson.dumps(_chat(text) if chat else {"text": text}, option=orjson.OPT_APPEND_NEWLINE)
                written += out.write(row)
                line += 1
                places[serial] = (number, line)
                if original is not None:
                    copies[places[serial]] = places[original]
    return copies


def _rows() -> Iterator[tuple[int, int | None, str]]:
    """Yield (number of the row, number of the row that it copies or None, text)."""
    waiting: list[tuple[int, str]] = []
    serial = 0
    for number, texts in enumerate(ordered_map(_block, count())):
        sampler = random.Random(f"copies {number}")  # noqa: S311 (a benchmark's text)
        rows = [*((None, text) for text in texts), *waiting]
        sampler.shuffle(rows)
        waiting = []
        for original, text in rows:
            yield serial, original, text
            chance = sampler.random()
            if original is None and chance < 0.05:
                waiting.append((serial, f" {text.upper()}".replace(" ", "  ", 2)))
            elif original is None and chance < 0.1 and len(words := text.split(" ")) >= MIN_WORDS_OF_NEAR:
                waiting.append((serial, _changed(words, sampler)))
            serial += 1


def _block(number: int) -> list[str]:
    texts = [orjson.loads(line)["text"] for line in word_corpus.records(number % MADE_BLOCKS)]
    stride = 1 + number // MADE_BLOCKS
    return texts if stride == 1 else [_reordered(text.split(" "), stride) for text in texts]


def _reordered(words: list[str], stride: int) -> str:
    return " ".join(word for start in range(stride) for word in words[start::stride])


def _changed(words: list[str], sampler: random.Random) -> str:
    for _ in range(max(1, len(words) // 100)):
        words[sampler.randrange(len(words))] = f"changed{sampler.randrange(10**6)}"
    return " ".join(words)


def _chat(text: str) -> dict[str, list[dict[str, str]]]:
    words = text.split(" ", 12)
    return {
        "messages": [
            {"role": "user", "content": " ".join(words[:12]) + "?"},
            {"role": "assistant", "content": words[-1]},
        ]
    }
