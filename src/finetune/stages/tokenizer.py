"""Clean text or the base model's tokenizer -> models/tokenizer with both forms of the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.splits import HeldOutShares
from finetune.data.vocabulary.bpe import train_on_words
from finetune.data.vocabulary.extension import extend_base
from finetune.data.vocabulary.tokenizer_corpus import survey, training_words
from finetune.data.vocabulary.tokenizer_files import (
    choose_pad_token,
    copy_base_tokenizer,
    install_templates,
    load_chat,
    write_trained,
)
from finetune.data.vocabulary.tokenizer_report import (
    check_markers,
    check_round_trip,
    describe,
    fertility,
    training_numbers,
)
from finetune.data_sections import ExtendTokenizer, KeepTokenizer, TrainTokenizer
from finetune.io import fresh_folder, read_json, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("tokenizer", "split.validation_share", "split.test_share", "split.pack_tokens")


def run(
    cleaned: Path,
    base_manifest: Path,
    folder: Path,
    metrics: Path,
    *,
    tokenizer: KeepTokenizer | ExtendTokenizer | TrainTokenizer,
    validation_share: float,
    test_share: float,
    pack_tokens: int,
) -> None:
    """Train on the training share only, or keep or extend the base's; then check and measure it on held-out text."""
    fresh_folder(folder)
    files = [cleaned / "records.jsonl"]
    if isinstance(tokenizer, TrainTokenizer) and tokenizer.corpus is not None:
        files.append(cleaned / "corpus.jsonl")
    found = survey(files, shares := HeldOutShares(validation_share, test_share))
    numbers: dict[str, Any] = {"strategy": tokenizer.strategy, "role_markers": 0, "trained_on_records": 0}
    base = None
    if isinstance(tokenizer, TrainTokenizer):
        words, learned = training_words(found, tokenizer, shares)
        numbers |= training_numbers(words, learned)
        write_trained(train_on_words(words, tokenizer), tokenizer, pack_tokens, folder)
    else:
        base = copy_base_tokenizer(read_json(base_manifest), folder)
    install_templates(Path(tokenizer.chat_template), folder)
    if isinstance(tokenizer, ExtendTokenizer):
        numbers["new_tokens"] = extend_base(folder, tokenizer.tokens, read_json(base_manifest))
    if base is not None:
        choose_pad_token(folder)
    chat = load_chat(folder)
    check_round_trip(chat.tokenizer)
    if isinstance(tokenizer, TrainTokenizer):
        check_markers(chat.tokenizer, tokenizer.role_markers)
        numbers["role_markers"] = len(tokenizer.role_markers)
    extended_base = base if isinstance(tokenizer, ExtendTokenizer) else None
    numbers |= describe(chat)
    numbers["held_out"] = fertility(found.held_out, chat.tokenizer)
    numbers["held_out_by_base"] = None if extended_base is None else fertility(found.held_out, extended_base)
    write_json(metrics, numbers)
    summary = "%(vocab_size)d tokens, trained on %(trained_on_records)d records; held-out text %(held_out)s"
    logger.info(summary, numbers)


if __name__ == "__main__":
    stage_main(run, PARAMS)
