"""Clean text or the base model's tokenizer -> models/tokenizer with both forms of the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.bpe import check_markers, check_round_trip, fertility, texts_of, train
from finetune.data.record import Record
from finetune.data.splits import assign
from finetune.data.tokenizer_files import copy_base_tokenizer, install_templates, load_chat, write_trained
from finetune.data_sections import KeepTokenizer, Split, TrainTokenizer
from finetune.errors import DataError
from finetune.io import fresh_folder, read_json, read_jsonl, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("tokenizer", "split")


def run(
    cleaned: Path,
    base_manifest: Path,
    folder: Path,
    metrics: Path,
    *,
    tokenizer: KeepTokenizer | TrainTokenizer,
    split: Split,
) -> None:
    """Train on the training share only, or keep the base's tokenizer; then check and measure it on held-out text."""
    fresh_folder(folder)
    records = [Record.from_row(row) for row in read_jsonl(cleaned / "records.jsonl")]
    shares = (split.validation_share, split.test_share)
    learned = [record for record in records if assign(record.group, *shares) == "train"]
    held_out = [record for record in records if assign(record.group, *shares) != "train"]
    if isinstance(tokenizer, TrainTokenizer):
        if not learned:
            raise DataError("no training text", "section split", "lower the shares, or add data")
        write_trained(train(texts_of(learned), tokenizer), tokenizer, split.pack_tokens, folder)
    else:
        copy_base_tokenizer(read_json(base_manifest), folder)
    install_templates(Path(tokenizer.chat_template), folder)
    chat = load_chat(folder)
    check_round_trip(chat.tokenizer)
    markers = tokenizer.role_markers if isinstance(tokenizer, TrainTokenizer) else []
    check_markers(chat.tokenizer, markers)
    numbers: dict[str, Any] = {
        "vocab_size": chat.ids.vocab_size,
        "role_markers": len(markers),
        "special_ids": {"bos": chat.ids.bos, "eos": chat.ids.eos, "pad": chat.ids.pad},
        "trained_on_records": len(learned) if isinstance(tokenizer, TrainTokenizer) else 0,
        "held_out": fertility(held_out, chat.tokenizer),
    }
    write_json(metrics, numbers)
    logger.info(
        "%d tokens, %d role markers of one token each, trained on %d records; on held-out text: %s",
        numbers["vocab_size"],
        numbers["role_markers"],
        numbers["trained_on_records"],
        numbers["held_out"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
