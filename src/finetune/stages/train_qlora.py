"""train_qlora: packed rows and base -> models/adapter; crash-safe, resumed where it stopped."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from finetune.evaluation.perplexity import mean_loss
from finetune.hardware import gpu_uuids
from finetune.io import sha256_tree, write_csv, write_json
from finetune.log import logger
from finetune.stages._main import stage_main
from finetune.telemetry import TELEMETRY_FILE, Telemetry
from finetune.tracking import TrainingMirror
from finetune.training import checkpoint, journal, loop, method, outcome, preparation
from finetune.training.batches import measure_rows
from finetune.training.device import make_deterministic
from finetune.training.distribution import relaunch_if_needed, writes_files
from finetune.training.model import load_extended
from finetune.training.trained_on import describe
from finetune.training.vocabulary import read_extension
from finetune.training_sections import TrainQlora

PARAMS = ("seed", "cpu_threads", "train_qlora")
CACHE = Path(".cache")


def run(
    split: Path, tokenizer: Path, base: Path, target: Path, metrics: Path, log: Path,
    *, seed: int, cpu_threads: int, train_qlora: TrainQlora,
) -> None:  # fmt: skip
    """Train the adapter; checkpoints are keyed by data, base, settings, seed, machine and library versions."""
    ended = relaunch_if_needed(train_qlora.distribution, "finetune.stages.train_qlora", sys.argv[1:], cpu_threads)
    if ended is not None:
        sys.exit(ended)
    make_deterministic(seed, cpu_threads)
    hashes = {path.name: sha256_tree(path) for path in (split, tokenizer, base)}
    store = CACHE / "rows" / hashes[split.name][:16]
    rows = loop.open_rows(split / "packed.parquet", store)
    validate = partial(mean_loss, rows=loop.open_rows(split / "validation.parquet", store))
    extension = read_extension(tokenizer)
    ready = preparation.prepare(base, extension, train_qlora, measure_rows(rows))
    folder = CACHE / "checkpoints" / preparation.key_of(ready, hashes, seed, cpu_threads)
    writes = writes_files()
    if writes:
        checkpoint.remove_finished(folder.parent, but=folder.name)
    telemetry = Telemetry(folder / TELEMETRY_FILE, gpu_uuids(), active=writes)
    with TrainingMirror(folder / journal.LOG_FILE, telemetry.path, active=writes) as mirror, telemetry:
        form, dtype = train_qlora.quantization, method.loading_dtype(train_qlora)
        model = load_extended(base, extension, form, dtype, ready.loading_device, ready.attention)
        trained_on = describe(base, model)
        model = method.make_trainable(model, train_qlora, extension)
        words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        entries = loop.train(
            model, words, rows, ready.settings, seed=seed, folder=folder, validate=validate,
            begin=mirror.begin, seen=lambda _, tokens: telemetry.seen(tokens),
        )  # fmt: skip
        if not writes:
            return
        numbers = outcome.summarise(model, entries)
        method.save_trained(model, trained_on, target)
        hashes["adapter"] = sha256_tree(target)
        mirror.finish(hashes["adapter"])
    write_csv(log, journal.LOG_COLUMNS, journal.log_rows(entries))
    write_json(metrics, numbers)
    outcome.write_card(ready, numbers, seed, hashes, telemetry.path)
    shutil.rmtree(store)
    checkpoint.finish(folder)
    logger.info(outcome.SUMMARY, numbers)


if __name__ == "__main__":
    stage_main(run, PARAMS)
