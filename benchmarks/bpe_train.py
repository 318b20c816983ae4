"""BPE training against the `tokenizers` library's BpeTrainer on the same text: `python benchmarks/bpe_train.py FOLDER`.

Makes the text in FOLDER (deterministic, see word_corpus.py), trains on it in a process of its own per side and round,
sides in turn, and compares vocabularies, merges and held-out bytes per token. Then trains on a larger text with fewer
words in the table than it has. Writes bpe_train.json; 7 GB of disk and half an hour.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from process_tree import machine, run_measured
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from word_corpus import records

from finetune.data.encoding.tokenizing import read_range
from finetune.data.splits import HeldOutShares
from finetune.data.vocabulary.bpe import special_tokens, train, train_on_words
from finetune.data.vocabulary.tokenizer_corpus import Survey, is_learned, ranges_of, survey, training_words
from finetune.data.vocabulary.tokenizer_report import fertility
from finetune.data.workers import ordered_map
from finetune.data_sections import TrainTokenizer
from finetune.io import read_json, write_json

RESULT = Path(__file__).with_suffix(".json")
ROUNDS = 3
BATCH_TEXTS = 1_000
# Blocks of word_corpus.py, about 2.2 MB each.
COMPARED_BLOCKS = 110
BOUNDED_BLOCKS = (450, 2300)
BOUNDED_WORDS = 1_000_000
SPLIT = HeldOutShares(0.01, 0.01)
PARAMS = TrainTokenizer(
    strategy="train",
    chat_template="",
    vocab_size=32_000,
    min_frequency=2,
    max_words=5_000_000,
    corpus=None,
    bos_token="<s>",  # noqa: S106 (a token of text)
    eos_token="</s>",  # noqa: S106
    pad_token="<pad>",  # noqa: S106
    unk_token="<unk>",  # noqa: S106
    role_markers=["<|user|>", "<|assistant|>"],
    special_tokens=["<search>", "</search>"],
)


def main(folder: Path) -> None:
    """Run every comparison and write the result."""
    text = made(folder, COMPARED_BLOCKS)
    runs: dict[str, list[dict[str, Any]]] = {"finetune": [], "tokenizers": []}
    for _ in range(ROUNDS):
        for side in runs:
            runs[side].append(measured(side, text, folder))
    seconds = {side: statistics.median(run["wall_s"] for run in own) for side, own in runs.items()}
    result = {
        **machine(),
        "text_bytes": text.stat().st_size,
        "vocab_size": PARAMS.vocab_size,
        "runs": runs,
        "median_wall_s": seconds,
        "times_as_fast": round(seconds["tokenizers"] / seconds["finetune"], 2),
        **compared(folder, text),
        "bounded": [bounded(folder, blocks) for blocks in BOUNDED_BLOCKS],
    }
    write_json(RESULT, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def made(folder: Path, blocks: int) -> Path:
    """The text of that many blocks, written unless it is there."""
    target = folder / f"text_{blocks}.jsonl"
    if not target.exists():
        with target.with_suffix(".partial").open("w", encoding="utf-8") as out:
            out.writelines(ordered_map(block_text, range(blocks)))
        target.with_suffix(".partial").rename(target)
    return target


def block_text(block: int) -> str:
    """One block of the text."""
    return "".join(records(block))


def measured(side: str, text: Path, folder: Path, max_words: int = PARAMS.max_words) -> dict[str, Any]:
    """Train in a process of its own, and what that cost with the processes that it starts."""
    cpu_s = children_cpu_s()
    command = [sys.executable, __file__, str(folder), side, str(text), str(max_words)]
    cost = run_measured(command, {"TOKENIZERS_PARALLELISM": "true"})
    return {
        **read_json(folder / f"{side}_numbers.json"),
        "wall_s": round(cost.wall_s, 1),
        "cpu_s": round(children_cpu_s() - cpu_s, 1),
        "peak_process_gib": round(cost.peak_process_bytes / 2**30, 3),
        "peak_tree_gib": round(cost.peak_tree_bytes / 2**30, 3),
    }


def children_cpu_s() -> float:
    """Processor seconds of this process's ended children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train_here(side: str, text: Path, folder: Path, max_words: int) -> None:
    """Train one side in this process and write its own numbers."""
    params = PARAMS.model_copy(update={"max_words": max_words})
    started = time.monotonic()
    if side == "finetune":
        words, learned = training_words(Survey(list(ranges_of(text)), [], {}), params, SPLIT)
        counted_s = time.monotonic() - started
        tokenizer = train_on_words(words, params)
        numbers = {
            "count_s": round(counted_s, 1),
            "merge_s": round(time.monotonic() - started - counted_s, 1),
            "words": len(words.counts),
            "forgotten_words": words.forgotten_words,
            "forgotten_share": round(
                words.forgotten_occurrences / (words.counts.sum() + words.forgotten_occurrences), 6
            ),
            "learned_bytes": learned.bytes_by_source.total(),
        }
    else:
        tokenizer, numbers = train_by_library(text, params)
    tokenizer.save(str(folder / f"{side}.json"))
    write_json(folder / f"{side}_numbers.json", numbers)


def train_by_library(text: Path, params: TrainTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """BpeTrainer fed with batches of texts, which it splits in parallel: its fastest way."""
    started = time.monotonic()
    fed: list[float] = []
    # Of no text: only the parts around the model, which are the same.
    tokenizer = train([], params.model_copy(update={"vocab_size": 300}))
    trainer = BpeTrainer(
        vocab_size=params.vocab_size,
        min_frequency=params.min_frequency,
        special_tokens=special_tokens(params),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )

    def batches() -> Iterator[Sequence[str]]:
        batch: list[str] = []
        for record in read_range(text, 0, text.stat().st_size):
            if is_learned(record, SPLIT):
                batch.append(record.all_text())
            if len(batch) == BATCH_TEXTS:
                yield batch
                batch = []
        yield batch
        fed.append(time.monotonic() - started)

    tokenizer.train_from_iterator(batches(), trainer=trainer)
    merge_s = time.monotonic() - started - fed[0]
    return tokenizer, {"count_s": round(fed[0], 1), "merge_s": round(merge_s, 1), "words": trainer.get_word_count()}


def compared(folder: Path, text: Path) -> dict[str, Any]:
    """Whether both sides learned the same, and what they make of held-out text."""
    own, library = (json.loads((folder / f"{side}.json").read_text())["model"] for side in ("finetune", "tokenizers"))
    held_out = survey([text], SPLIT).held_out
    report = {
        side: fertility(held_out, Tokenizer.from_file(str(folder / f"{side}.json")))
        for side in ("finetune", "tokenizers")
    }
    return {
        "same_vocabulary": own["vocab"] == library["vocab"],
        "same_merges": own["merges"] == library["merges"],
        "held_out_bytes_per_token": {
            side: {language: numbers["bytes_per_token"] for language, numbers in by_language.items()}
            for side, by_language in report.items()
        },
    }


def bounded(folder: Path, blocks: int) -> dict[str, Any]:
    """Train on a larger text with a table that is too small for it."""
    text = made(folder, blocks)
    return {"text_bytes": text.stat().st_size, **measured("finetune", text, folder, BOUNDED_WORDS)}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        train_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[1]), int(sys.argv[4]))
