"""packed rows + model -> trained weights: one run from its newest good checkpoint to its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from peft import PeftModel
from pyarrow import ArrowInvalid
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTConfig
from trl.trainer.utils import add_fused_lm_head

from finetune.errors import DataError, NotFiniteError, StoppedError
from finetune.log import logger
from finetune.training import checkpoint
from finetune.training.attention import selective_checkpointing
from finetune.training.batches import Windows, check_batches, measure_rows
from finetune.training.distribution import check_same_step
from finetune.training.interrupts import stop_wish
from finetune.training.journal import Journal, LogEntry, Seen, StepBar, best_validation
from finetune.training.layer_kernels import liger_arguments
from finetune.training.sharding import shard, unshard_trained
from finetune.training.state import restore_weights, trained_weights
from finetune.training.trainer import BEST, ExactTrainer, Run
from finetune.training_sections import TrainQlora

ROWS_FOLDER = "rows"


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: TrainQlora,
    *,
    seed: int,
    folder: Path,
    validate: Callable[[Any], float],
    begin: Callable[[int], None],
    seen: Seen,
) -> list[LogEntry]:
    """Train `model` in place and return the log of all steps, those before a resume included.

    `rows` are packed: input_ids, labels (-100 where untrained) and seq_lengths. `folder` keeps checkpoints and log.
    `settings.micro_batch_rows` and `gradient_checkpointing` are decided here, not `auto`. `begin` is told the step that
    the run goes on from, once the log holds nothing else; `seen` each logged step, and how many tokens went through
    the model so far. Raises StoppedError after SIGINT or SIGTERM, with a checkpoint written, and NotFiniteError when
    too many steps had to be skipped, also after a second try from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes, windows = measure_rows(rows), Windows(len(rows), settings.batch_rows, seed)
    if not sizes.trained.any():
        raise DataError("no token of the training rows is trained", "data/split/packed.parquet", "check tokenize.loss")
    check_lengths(int(sizes.longest.max()), model.config.max_position_embeddings)
    check_batches(windows, sizes.trained, settings.epochs)
    # Ahead of torch.distributed, which the trainer starts: only one process may write.
    writes = int(os.environ.get("RANK", "0")) == 0
    if writes:
        checkpoint.tidy(folder)
        checkpoint.begin(folder)
    newest = checkpoint.newest_intact(folder)
    done = checkpoint.step_of(newest) if newest else 0
    journal = Journal(folder, done, writes=writes)
    begin(done)
    with stop_wish() as wish:
        run = Run(settings, folder, windows, sizes, validate, seen, wish)
        trainer = make_trainer(run, model, tokenizer, rows, journal, seed)
        check_same_step(done)
        trainer.stopped_early = trainer.patience_is_over()
        if not trainer.stopped_early:
            _train(trainer, newest)
    if trainer.stopped and trainer.state.global_step < trainer.state.max_steps and not trainer.stopped_early:
        # Empty where the signal reached another process.
        name = wish.signal_name or "stopped"
        raise StoppedError(
            f"{name} at step {trainer.state.global_step} of {trainer.state.max_steps}; it is saved",
            folder,
            "`dvc repro` goes on from there, to the same bytes as if nothing had happened",
        )
    if settings.early_stopping is not None:
        _take_best(trainer, settings.early_stopping.min_improvement)
    if settings.distribution.strategy == "fsdp2":
        unshard_trained(trainer.model)
    return trainer.journal.entries


def make_trainer(
    run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, journal: Journal, seed: int
) -> ExactTrainer:
    """The trainer with its own row order and record, silent but for this package's log and bar."""
    args = sft_config(run.settings, seed, run.folder, model.config.model_type)
    if run.settings.gradient_checkpointing == "selective":
        selective_checkpointing(model.get_base_model() if isinstance(model, PeftModel) else model)
    if run.settings.distribution.strategy == "fsdp2":
        shard(model)
    # TRL rounds what trains on 4-bit layers to bfloat16. Reloaded, it would be float32, and a resumed run end in other
    # bytes; a whole table of `modules_to_save` would start from rounded values.
    values = {name: weight.data for name, weight in trained_weights(model).items()}
    trainer = ExactTrainer(run, rows, journal, model=model, args=args, processing_class=tokenizer)
    _score_labels_only(trainer.model)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    for name, weight in trained_weights(trainer.model).items():
        weight.data = values[name].to(weight.device)
    return trainer


def _score_labels_only(model: Any) -> None:
    """Let TRL's fused output layer leave out the entropy and the best token that it computes for its own metrics."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    del causal.forward
    add_fused_lm_head(causal)


def _train(trainer: ExactTrainer, newest: Path | None) -> None:
    rolled_back = False
    while True:
        done = checkpoint.step_of(newest) if newest else 0
        steps = trainer.run.windows.steps_per_epoch * trainer.run.settings.epochs
        if newest:
            logger.info("resuming from %s of %d steps", newest.name, steps)
        if trainer.args.process_index == 0:
            trainer.bar = StepBar(steps, done)
        try:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            return
        except NotFiniteError as fault:
            newest = checkpoint.newest_intact(trainer.run.folder)
            if rolled_back or newest is None:
                raise
            # A fault of the hardware does not come back; one of the data or the settings does, and then ends the run.
            logger.warning("%s; rolling back to %s for one more try", fault.what, newest.name)
            rolled_back = True
            trainer.rewind(checkpoint.step_of(newest))
        finally:
            if trainer.bar is not None:
                trainer.bar.close()


def _take_best(trainer: ExactTrainer, min_improvement: float) -> None:
    step, _ = best_validation(trainer.journal.entries, min_improvement)
    if step == trainer.state.global_step:
        return
    best = trainer.run.folder / BEST / f"checkpoint-{step}"
    if not checkpoint.is_intact(best):
        raise DataError("the weights of the best validation are damaged", best, "delete the folder, then `dvc repro`")
    restore_weights(trainer.model, checkpoint.load_tensors(best))
    logger.info("the weights of step %d are kept: the lowest validation loss", step)


def check_lengths(longest: int, max_positions: int) -> None:
    """Raise DataError for a document longer than the model has positions: a table of them ends in an index error."""
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


def sft_config(settings: TrainQlora, seed: int, folder: Path, model_type: str) -> SFTConfig:
    """The trainer's settings; rows come packed and tokenised, so that it prepares nothing itself."""
    micro_batch_rows = int(settings.micro_batch_rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SFTConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro_batch_rows,
        gradient_accumulation_steps=settings.batch_rows // (micro_batch_rows * settings.distribution.processes),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        optim=settings.optimizer,
        neftune_noise_alpha=settings.neftune_alpha,
        bf16=settings.compute_dtype == "bfloat16",
        fp16=settings.compute_dtype == "float16",
        # Selective checkpointing is switched on in make_trainer.
        gradient_checkpointing=settings.gradient_checkpointing == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing == "full" else None,
        # Every trained weight has a gradient in every step: DDP need not look for those without.
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        # padding_free makes each micro-batch one row with position ids: documents do not see each other.
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",
        **liger_arguments(settings, model_type, device),
    )
    if config.n_gpu > 1:
        # In one process the trainer would split each batch over all visible GPUs, and so train on larger batches.
        logger.info("%d GPUs are visible: training on the first", config.n_gpu)
        config._n_gpu = 1
    return config
