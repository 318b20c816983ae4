"""French and English text of any size with the word statistics of the web, made from the sample's phrases.

A few hundred words that are common, two million that are rare and some that occur once, so that the number of
different words grows with the text as it does in a crawl. Spelling follows the letters of the sample's own words.
Each block depends on its number alone: the same bytes on every machine, in any number of processes.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.record import make_record
from finetune.io import read_json

PHRASES = Path(__file__).parents[1] / "data" / "sample" / "phrases.json"
BLOCK_RECORDS = 1_000
HEADS, TAILS = 6_000, 200  # their combinations: about a million words per language
# Zipf-Mandelbrot, p(rank) ~ (rank + 2.7) ** -1.2: 400 kB have 15,300 different words, 400 kB of English C4 12,900.
RANK_OFFSET, EXPONENT = 2.7, 1.2
ORDER = 3
ONCE_ONLY_SHARE = 0.004
ENDINGS = (*(" ",) * 88, *(", ",) * 7, " (", ") ", " - ", ": ", "'s ")
STOPS = (". ", ". ", ". ", "! ", "? ", ".\n", ".\n\n", "…\n")


@dataclass(frozen=True)
class Lexicon:
    """Words by falling frequency, the running sum of their probabilities, and the letters that follow each context."""

    words: list[str]
    cumulative: npt.NDArray[np.float64]
    letters: dict[str, str]


def records(block: int) -> Iterator[str]:
    """The records of one block as JSON lines of records.jsonl; about 2.2 MB."""
    sampler = random.Random(f"block {block}")  # noqa: S311 (a benchmark's text)
    numbers = np.random.default_rng([20261121, block])
    for _ in range(BLOCK_RECORDS):
        language = "fr" if sampler.random() < 0.4 else "en"
        record = make_record(source=f"web_{language}", text=_text(language, sampler, numbers), language=language)
        yield json.dumps(record.to_row(), sort_keys=True, ensure_ascii=False) + "\n"


def _text(language: str, sampler: random.Random, numbers: np.random.Generator) -> str:
    lexicon = _lexicon(language)
    ranks = np.searchsorted(lexicon.cumulative, numbers.random(int(sampler.lognormvariate(5.6, 0.7)) + 8))
    parts: list[str] = []
    capital, left = True, sampler.randrange(5, 30)
    for rank in ranks.tolist():
        chance = sampler.random()
        word = lexicon.words[rank] if chance > ONCE_ONLY_SHARE else _spell(lexicon.letters, sampler) + str(rank % 97)
        if chance > 0.985:
            word = str(rank)
        parts.append(word.capitalize() if capital or chance > 0.96 else word)
        left -= 1
        capital = left == 0
        parts.append(sampler.choice(STOPS if capital else ENDINGS))
        left = left or sampler.randrange(5, 30)
    return "".join(parts).rstrip()


@cache
def _lexicon(language: str) -> Lexicon:
    text = " ".join(_strings(read_json(PHRASES)[language]))
    common = Counter(re.findall(r"(?:[ldjnmts]'|qu')?[^\W\d_]+", text.lower()))
    following: dict[str, list[str]] = defaultdict(list)
    for word, count in sorted(common.items()):
        padded = "^" * ORDER + word + "$"
        for index in range(ORDER, len(padded)):
            # Rarer contexts too, so that new words are not copies of the few seen.
            following[padded[index - 1]].append(padded[index])
            following[padded[index - ORDER : index]] += padded[index] * min(count, 8)
    letters = {context: "".join(found) for context, found in following.items()}
    sampler = random.Random(f"lexicon {language}")  # noqa: S311
    words = dict.fromkeys(word for word, _ in sorted(common.items(), key=lambda item: (-item[1], item[0])))
    heads, tails = (dict.fromkeys(_spell(letters, sampler) for _ in range(count)) for count in (HEADS, TAILS))
    rare = [head + tail[-4:] for head in heads for tail in tails]
    sampler.shuffle(rare)
    # Short words are the more frequent ones.
    words |= dict.fromkeys(sorted(rare, key=lambda word: len(word) + sampler.random() * 12))
    weights = (np.arange(len(words)) + RANK_OFFSET) ** -EXPONENT
    return Lexicon(list(words), np.cumsum(weights / weights.sum()).clip(max=1.0), letters)


def _spell(letters: dict[str, str], sampler: random.Random) -> str:
    word = "^" * ORDER
    while len(word) < ORDER + 18:
        context = word[-ORDER:] if sampler.random() < 0.9 and word[-ORDER:] in letters else word[-1]
        letter = sampler.choice(letters[context])
        if letter == "$":
            break
        word += letter
    return word[ORDER:]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
