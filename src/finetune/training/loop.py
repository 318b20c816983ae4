"""packed rows + model -> trained adapter, on TRL's SFTTrainer; logged locally, resumable to the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid, compute
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune.errors import DataError
from finetune.io import sha256_file, sha256_text, write_text
from finetune.log import logger, progress_bar
from finetune.sections import TrainQlora
from finetune.training.checkpoint import newest_intact, seal
from finetune.training.model import keep_adapter_float32

LOG_FILE = "train_log.jsonl"
ROWS_FOLDER = "rows"
ROWS_PER_BATCH = 1000
LOG_COLUMNS = ("step", "train_loss", "validation_loss", "learning_rate", "gradient_norm", "trained_tokens")
SUMMARY = (
    "%(steps)d steps, %(trained_tokens)d trained tokens, loss %(train_loss).3f, validation %(validation_loss).3f, "
    "%(trainable_parameters)d trainable parameters, %(four_bit_layers)d layers in 4 bit"
)
LogEntry = dict[str, float | None]
Mirror = Callable[[int, dict[str, float]], None]
Validate = Callable[[Any], float]


class LocalLog(TrainerCallback):  # type: ignore[misc]
    """The run's own record: one JSON line per logged step, flushed to disk, mirrored elsewhere afterwards."""

    def __init__(self, path: Path, settings: TrainQlora, validate: Validate, mirror: Mirror, tokens: int) -> None:
        self.path, self.settings, self.validate, self.mirror = path, settings, validate, mirror
        self.tokens_per_epoch = tokens
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_others: Any) -> None:
        """Open the progress bar, at the step that a resumed run starts from."""
        self.bar = progress_bar(state.max_steps, state.global_step, "step", "train")

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _validates(self, state: Any) -> bool:
        return bool(state.global_step % self.settings.evaluate_every_steps == 0 or state.global_step == state.max_steps)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Log the steps that are validated, whatever `log_every_steps` is: the last step is always among them."""
        control.should_log = control.should_log or self._validates(state)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **others: Any) -> None:
        """Append the entry of a step; the last call of a run, which only sums up, has no loss and is left out."""
        if "loss" not in logs:
            return
        step = state.global_step
        entry: LogEntry = {
            "step": step,
            "train_loss": float(logs["loss"]),
            "validation_loss": self.validate(others["model"]) if self._validates(state) else None,
            "learning_rate": float(logs["learning_rate"]),
            "gradient_norm": float(logs["grad_norm"]),
            "trained_tokens": round(self.tokens_per_epoch * state.epoch),
        }
        _check_finite(entry)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {entry['train_loss']:.3f}, {entry['trained_tokens']:,} trained tokens")
        self.mirror(step, {name: value for name, value in entry.items() if value is not None and name != "step"})

    def on_save(self, args: Any, state: Any, _control: Any, **_others: Any) -> None:
        """Seal the checkpoint that the trainer has just written."""
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: TrainQlora,
    *,
    seed: int,
    folder: Path,
    validate: Validate,
    mirror: Mirror,
) -> list[LogEntry]:
    """Train the adapter of `model` in place and return the log of all steps, those before a resume included.

    `rows` are packed: input_ids, labels (-100 where untrained) and seq_lengths. `folder` keeps checkpoints and log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained_tokens = count_trained_tokens(rows)
    if trained_tokens == 0:
        raise DataError("no token of the training rows is trained", "data/split/packed.parquet", "check tokenize.loss")
    check_lengths(rows, model.config.max_position_embeddings)
    checkpoint = newest_intact(folder)
    _truncate_log(folder / LOG_FILE, int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    log = LocalLog(folder / LOG_FILE, settings, validate, mirror, trained_tokens)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(settings, seed, folder),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[log],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    keep_adapter_float32(trainer.model)
    if checkpoint:
        logger.info("resuming from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return list(read_log(folder / LOG_FILE))


def check_lengths(rows: Dataset, max_positions: int) -> None:
    """Raise DataError for a document longer than the model has positions: a table of them ends in an index error."""
    longest = max(max(row["seq_lengths"]) for row in rows.select_columns("seq_lengths"))
    if longest > max_positions:
        raise DataError(
            f"a document has {longest} tokens, the base model has {max_positions} positions",
            "tokenize.max_tokens",
            f"set tokenize.max_tokens to {max_positions} at most",
        )


def open_rows(path: Path, folder: Path) -> Dataset:
    """The rows of a Parquet file, read from disk as they are asked for; `folder` keeps them uncompressed.

    Raises DataError when the file is missing or damaged.
    """
    if not path.is_file():
        raise DataError("file is missing", path, "run `dvc repro`, which makes it")
    disable_progress_bars()
    try:
        return Dataset.from_parquet(str(path), cache_dir=str(folder / ROWS_FOLDER), keep_in_memory=False)
    except (ArrowInvalid, DatasetGenerationError) as fault:
        raise DataError(
            f"not a Parquet file: {fault.__cause__ or fault}", path, "delete the file and run `dvc repro`"
        ) from fault


def count_trained_tokens(rows: Dataset) -> int:
    """How many labels are not -100, over all rows; counted in Arrow, a batch at a time."""
    batches = rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=ROWS_PER_BATCH)
    return sum(
        compute.sum(compute.not_equal(compute.list_flatten(batch["labels"]), -100)).as_py() or 0 for batch in batches
    )


def sft_config(settings: TrainQlora, seed: int, folder: Path) -> SFTConfig:
    """The trainer's settings; rows come packed and tokenised, so that it prepares nothing itself."""
    config = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_rows,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        optim=settings.optimizer,
        bf16=settings.compute_dtype == "bfloat16",
        fp16=settings.compute_dtype == "float16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        logging_steps=settings.log_every_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every_steps,
        # The trainer drops old checkpoints before the new one is sealed: one more than asked for bridges that moment.
        save_total_limit=settings.keep_checkpoints + 1,
        report_to="none",
        # padding_free makes each micro-batch one row with position ids: documents do not see each other.
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",
        dataloader_num_workers=0,
    )
    if config.n_gpu > 1:
        # In one process the trainer would split each batch over all visible GPUs, and so train on larger batches.
        logger.info("%d GPUs are visible: training on the first", config.n_gpu)
        config._n_gpu = 1
    return config


def code_hash() -> str:
    """Hash of this package's source: other code never resumes a run."""
    return sha256_text("".join(sha256_file(file) for file in sorted(Path(__file__).parent.glob("*.py"))))


def read_log(path: Path) -> Iterator[LogEntry]:
    """The entries of a log; a last line torn by a crash is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def log_rows(entries: list[LogEntry]) -> list[list[object]]:
    """The entries as CSV rows in the order of LOG_COLUMNS; empty where a step was not validated."""
    return [["" if entry[name] is None else entry[name] for name in LOG_COLUMNS] for entry in entries]


def _truncate_log(path: Path, step: int) -> None:
    kept = [entry for entry in read_log(path) if (entry["step"] or 0) <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _check_finite(entry: LogEntry) -> None:
    if bad := [name for name, value in entry.items() if value is not None and not -1e30 < value < 1e30]:
        raise DataError(
            f"{', '.join(bad)} is not a finite number at step {entry['step']}",
            "train_qlora",
            "lower train_qlora.learning_rate or max_gradient_norm; the last good checkpoint is kept",
        )
