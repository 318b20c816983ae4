"""Clean text -> the counted words that a tokenizer is trained on, and the held-out text that it is measured on.

Both files of `clean` are read in parallel, a range of lines at a time; what is held in memory does not grow with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow

from finetune.data.encoding.tokenizing import line_ranges, read_range
from finetune.data.record import Record
from finetune.data.splits import HeldOutShares, assign
from finetune.data.vocabulary.word_counts import WordCounts, WordTable, count_words
from finetune.data.workers import ordered_map
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError
from finetune.log import logger, progress_bar

# Of each language: what bounds the memory and the time of measuring on it.
HELD_OUT_CHARACTERS = 8 << 20
UNKNOWN = "unknown"
BLOCK_BYTES = 16 << 20
# Less is read sooner than two processes are started.
PARALLEL_BYTES = 32 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Range:
    """The lines of a file from byte `start` to byte `end`. `quotas`: bytes of text to take of each source, or all."""

    path: Path
    start: int
    end: int
    quotas: Mapping[str, int] | None = None

    def records(self) -> Iterator[Record]:
        """Its records, in order."""
        return read_range(self.path, self.start, self.end)


@dataclass
class Learned:
    """What a tokenizer is trained on: records, and bytes of UTF-8 by source."""

    records: int = 0
    bytes_by_source: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Survey:
    """What the files hold: their ranges, bytes of training text by source in each, held-out texts by language."""

    ranges: list[Range]
    available: list[Counter[str]]
    held_out: dict[str, list[str]]


def survey(files: Sequence[Path], shares: HeldOutShares, characters: int = HELD_OUT_CHARACTERS) -> Survey:
    """Read the files once. Held-out: records outside the training share, the first `characters` of each language."""
    ranges = [place for path in files for place in ranges_of(path)]
    available: list[Counter[str]] = []
    held_out: dict[str, list[str]] = {}
    kept: Counter[str] = Counter()
    for sizes, texts in _over(ranges, partial(_look_at, shares), "survey text"):
        available.append(sizes)
        for language, text in texts:
            if kept[language] < characters:
                held_out.setdefault(language, []).append(text)
                kept[language] += len(text)
    return Survey(ranges, available, held_out)


def ranges_of(path: Path) -> Iterator[Range]:
    """The file in ranges of about BLOCK_BYTES: the larger, the more of its words are repetitions."""
    start = 0
    for _, end in line_ranges(path):
        if end - start >= BLOCK_BYTES or end == path.stat().st_size:
            yield Range(path, start, end)
            start = end


def training_words(found: Survey, params: TrainTokenizer, shares: HeldOutShares) -> tuple[WordCounts, Learned]:
    """Count the words of the training share; raises DataError when there is no text.

    With `corpus`, each source gives its share of the bytes, from its first record on, until the first source has no
    more; a record that would exceed the share, and those after it, are left.
    """
    ranges = found.ranges
    if params.corpus is not None:
        ranges = with_quotas(ranges, found.available, params.corpus)
    table, learned = WordTable(params.max_words), Learned()
    for block, part in _over(ranges, partial(_count, shares), "count words"):
        table.add(block)
        learned.records += part.records
        learned.bytes_by_source += part.bytes_by_source
    if not learned.records:
        raise DataError("no training text", "section split", "lower the shares, or add data")
    words = table.finish()
    logger.info(
        "%d different words in %d records; forgotten: %d words that occurred %d times",
        len(words.counts),
        learned.records,
        words.forgotten_words,
        words.forgotten_occurrences,
    )
    return words, learned


def with_quotas(
    ranges: Sequence[Range], available: Sequence[Mapping[str, int]], shares: Mapping[str, float]
) -> list[Range]:
    """The ranges with what to take of each, so that the sources stand in `shares` of the bytes taken.

    `available`: bytes by source of each range. Raises DataError for a source without text.
    """
    totals = {source: sum(part.get(source, 0) for part in available) for source in shares}
    if empty := sorted(source for source, total in totals.items() if total == 0):
        raise DataError(f"no training text of {', '.join(empty)}", "tokenizer.corpus", "add data, or leave it out")
    whole = min(total / shares[source] for source, total in totals.items())
    left = {source: min(totals[source], round(whole * share)) for source, share in shares.items()}
    result = []
    for place, part in zip(ranges, available, strict=True):
        # A quota below what is there is the source's last: nothing of it is taken from later ranges.
        quotas = {source: min(left[source], part.get(source, 0)) for source in shares}
        for source, quota in quotas.items():
            left[source] = left[source] - quota if quota == part.get(source, 0) else 0
        if any(quotas.values()):
            result.append(Range(place.path, place.start, place.end, quotas))
    return result


def _over(ranges: Sequence[Range], function: Callable[[Range], Result], label: str) -> Iterator[Result]:
    total_bytes = sum(place.end - place.start for place in ranges)
    results = map(function, ranges) if total_bytes < PARALLEL_BYTES else ordered_map(function, ranges)
    with progress_bar(total_bytes, 0, "B", label) as bar:
        for place, result in zip(ranges, results, strict=True):
            yield result
            bar.update(place.end - place.start)


def _look_at(shares: HeldOutShares, place: Range) -> tuple[Counter[str], list[tuple[str, str]]]:
    sizes: Counter[str] = Counter()
    held_out = []
    for record in place.records():
        if is_learned(record, shares):
            sizes[record.source] += size_bytes(record.all_text())
        else:
            held_out.append((record.language or UNKNOWN, record.all_text()))
    return sizes, held_out


def _count(shares: HeldOutShares, place: Range) -> tuple[pyarrow.Table, Learned]:
    learned = Learned()
    records = (record for record in place.records() if is_learned(record, shares))
    return count_words(_taken(records, place.quotas, learned)), learned


def _taken(records: Iterable[Record], quotas: Mapping[str, int] | None, learned: Learned) -> Iterator[str]:
    closed: set[str] = set()
    for record in records:
        text = record.all_text()
        size = size_bytes(text)
        if quotas is not None:
            fits = learned.bytes_by_source[record.source] + size <= quotas.get(record.source, 0)
            if not fits or record.source in closed:
                closed.add(record.source)
                continue
        learned.records += 1
        learned.bytes_by_source[record.source] += size
        yield text


def is_learned(record: Record, shares: HeldOutShares) -> bool:
    """Whether a record is in the training share."""
    return assign(record.group, shares.validation_share, shares.test_share) == "train"


def size_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
