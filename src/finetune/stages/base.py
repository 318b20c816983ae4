"""base: manifest and tokenizer -> models/base, the pinned Hub model or a small Llama pre-trained here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from finetune.data import splits
from finetune.data.record import Record
from finetune.io import read_json, read_jsonl, write_json
from finetune.log import logger
from finetune.sections import Base
from finetune.stages._main import stage_main
from finetune.training.device import choose_device, make_deterministic
from finetune.training.model import BASE_FILE, check_needs_no_code, verify_base
from finetune.training.pretrain import choose_texts, make_llama, pretrain, to_rows

PARAMS = ("seed", "cpu_threads", "base", "split.validation_share", "split.test_share")


def run(
    clean: Path,
    manifest: Path,
    tokenizer: Path,
    target: Path,
    metrics: Path,
    *,
    seed: int,
    cpu_threads: int,
    base: Base,
    validation_share: float,
    test_share: float,
) -> None:
    """Make or name the model to adapt; held-out records are kept out of the pre-training text."""
    make_deterministic(seed, cpu_threads)
    target.mkdir(parents=True, exist_ok=True)
    source = read_json(manifest)
    write_json(target / BASE_FILE, source)
    if base.scratch is None:
        verify_base(target)
        check_needs_no_code(target, tokenizer)
        size_bytes = sum(file["size_bytes"] for file in source["files"])
        write_json(metrics, {"files": len(source["files"]), "size_bytes": size_bytes})
        logger.info(
            "base: %s at %s, %s bytes in the Hub cache", source["repo_id"], source["revision"], f"{size_bytes:,}"
        )
        return
    needed_tokens = base.scratch.pretrain_steps * base.scratch.batch_rows * base.scratch.row_tokens
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    texts = choose_texts(partial(_read, clean, validation_share, test_share), needed_tokens)
    rows = to_rows(texts, words, base.scratch.row_tokens, target)
    model = make_llama(base.scratch, words).to(choose_device())
    losses = pretrain(model, rows, base.scratch, seed)
    model.to("cpu", torch.bfloat16).save_pretrained(target)
    for file in sorted(tokenizer.iterdir()):
        shutil.copyfile(file, target / file.name)
    numbers = {"parameters": model.num_parameters(), "text_tokens": rows.numel(), "steps": len(losses)}
    numbers |= {"first_loss": losses[0], "last_loss": losses[-1]}
    write_json(metrics, numbers)
    summary = "%(parameters)s parameters, %(steps)d steps on %(text_tokens)s tokens, loss %(first_loss).2f -> "
    logger.info(summary + "%(last_loss).2f", numbers)


def _read(clean: Path, validation_share: float, test_share: float) -> Iterator[Record]:
    """The training share of the records, then the tokenizer's own sources, whose text is in no split."""
    for row in read_jsonl(clean / "records.jsonl"):
        record = Record.from_row(row)
        if splits.assign(record.group, validation_share, test_share) == "train":
            yield record
    if (clean / "corpus.jsonl").is_file():
        yield from map(Record.from_row, read_jsonl(clean / "corpus.jsonl"))


if __name__ == "__main__":
    stage_main(run, PARAMS)
