"""train_qlora: packed rows and base -> models/adapter; crash-safe, resumed where it stopped."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer

from finetune.evaluation.perplexity import mean_loss
from finetune.io import sha256_tree, write_csv, write_json
from finetune.log import logger
from finetune.sections import TrainQlora
from finetune.stages._main import stage_main
from finetune.tracking import TrainingMirror
from finetune.training import loop
from finetune.training.checkpoint import run_key
from finetune.training.device import check_hardware, choose_device, dtype_named, make_deterministic
from finetune.training.model import add_adapter, four_bit_layers, load_extended
from finetune.training.trained_on import describe, save_with_base
from finetune.training.vocabulary import read_extension, unmoved_tokens

PARAMS = ("seed", "cpu_threads", "train_qlora")
CHECKPOINTS = Path(".cache/checkpoints")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def run(
    split: Path,
    tokenizer: Path,
    base: Path,
    target: Path,
    metrics: Path,
    log: Path,
    *,
    seed: int,
    cpu_threads: int,
    train_qlora: TrainQlora,
) -> None:
    """Train the adapter; checkpoints are keyed by data, base, settings, seed and library versions."""
    make_deterministic(seed, cpu_threads)
    check_hardware(train_qlora, device := choose_device())
    extension = read_extension(tokenizer)
    model = load_extended(base, extension, train_qlora.quantization, dtype_named(train_qlora.compute_dtype), device)
    trained_on = describe(base, model)
    model = add_adapter(model, train_qlora.lora, extension)
    determinants = {
        "inputs": [sha256_tree(path) for path in (split, base, tokenizer)],
        "params": [train_qlora.model_dump(), seed, cpu_threads, device.type],
        "libraries": {name: version(name) for name in LIBRARIES},
        "code": loop.code_hash(),
    }
    folder = CHECKPOINTS / run_key(determinants)
    validate = partial(mean_loss, rows=loop.open_rows(split / "validation.parquet", folder))
    rows = loop.open_rows(split / "packed.parquet", folder)
    words = AutoTokenizer.from_pretrained(tokenizer)
    with TrainingMirror() as mirror:
        entries = loop.train(
            model, words, rows, train_qlora, seed=seed, folder=folder, validate=validate, mirror=mirror.log
        )
        unmoved = unmoved_tokens(model)
        save_with_base(model, trained_on, target)
        mirror.finish(sha256_tree(target))
    write_csv(log, loop.LOG_COLUMNS, loop.log_rows(entries))
    numbers = {
        "steps": entries[-1]["step"],
        **{name: entries[-1][name] for name in ("train_loss", "validation_loss", "trained_tokens")},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "four_bit_layers": four_bit_layers(model),
        "unmoved_tokens": unmoved,
    }
    write_json(metrics, numbers)
    shutil.rmtree(folder)
    logger.info(loop.SUMMARY, numbers)


if __name__ == "__main__":
    stage_main(run, PARAMS)
