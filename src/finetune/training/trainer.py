"""TRL's SFTTrainer, made exact: own order of rows, own checkpoints, no step on NaN, no waiting for the host.

What it changes of its parent is said at each method; forward pass, fused output layer, optimizer, schedule, precision
and processes are the libraries' (trl 1.16, transformers 5.23, accelerate 1.15).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTTrainer

from finetune.errors import DeviceError
from finetune.io import read_json
from finetune.log import logger
from finetune.training.batches import PackedRows, ProcessBatches, RowSizes, Windows, trained_until
from finetune.training.checkpoint import drop_before, load_tensors, prune, save
from finetune.training.device import GIB
from finetune.training.guard import FiniteGuard, check_weights
from finetune.training.interrupts import StopWish
from finetune.training.journal import Journal, LogEntry, Seen, StepBar, best_validation, check_finite
from finetune.training.memory_faults import documents_in, split_documents
from finetune.training.sharding import whole
from finetune.training.state import capture, capture_generators, on_cpu, restore, restore_generators, trained_weights
from finetune.training_sections import TrainQlora

BEST = "best"
STATE, GENERATORS = "state.json", "generators"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training works on and reports to, beside model and rows; `micro_batch_rows` is a number here."""

    settings: TrainQlora
    folder: Path
    windows: Windows
    sizes: RowSizes
    validate: Callable[[Any], float]
    seen: Seen
    wish: StopWish


class ExactTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains on packed rows so that a run killed at any moment and started again ends in the same bytes."""

    # compute_loss divides by the trained tokens of the whole window: nothing is left to divide by its micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(self, run: Run, rows: Dataset, journal: Journal, **arguments: Any) -> None:
        super().__init__(train_dataset=rows, **arguments)
        self.run, self.journal = run, journal
        self.guard = FiniteGuard(run.windows, run.settings.max_skipped_steps)
        self.parts, self.tokens = 1, 0
        self.stopped_early = self.stopped = False
        self._window: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self._step_losses: list[tuple[int, torch.Tensor]] = []
        self._finished_step = -1
        self.batches = ProcessBatches(
            run.windows, int(run.settings.micro_batch_rows), self.args.process_index, self.args.world_size
        )
        self.bar: StepBar | None = None

    # Data: the order of rows is a pure function of the seed, the same for any number of processes.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this process; not prepared by accelerate, which would shard and repeat rows again."""
        return DataLoader(
            PackedRows(self.train_dataset),
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def _run_epoch(self, *, epoch: int, **others: Any) -> None:
        self.batches.epoch = epoch
        super()._run_epoch(epoch=epoch, **others)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], int]:
        """The micro-batches of the next step, and its trained tokens over all processes."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self._window, self._losses = [], []
        return batches, int(self.run.sizes.trained[self.run.windows.of_step(self.state.global_step)].sum())

    # One step: loss, gradient, guard. Nothing here reads a value from the device.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The negative log-likelihood over the trained tokens of the window; TRL's own metrics wait for the device."""
        outputs = model(**{**inputs, "use_cache": False}, fused_lm_head=True)
        # DDP takes the mean of the processes' gradients, where the sum is wanted.
        return -outputs.log_probs.sum() * (self.args.world_size / num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch; in smaller parts from the moment that memory does not hold it."""
        self._window.append(inputs)
        while True:
            # After a fault the whole window is done again: gradients of its earlier micro-batches may be half added.
            batches = self._window[len(self._losses) :]
            try:
                losses = [self._in_parts(model, each, num_items_in_batch) for each in batches]
            except torch.OutOfMemoryError as fault:
                message = str(fault).partition("\n")[0]
            else:
                self._losses += losses
                return losses[-1]
            # Outside the except block, whose traceback holds on to the activations.
            self._halve(model, message)

    def _in_parts(self, model: Any, inputs: dict[str, Any], items: Any) -> torch.Tensor:
        step = super().training_step
        return torch.stack([step(model, part, items) for part in split_documents(inputs, self.parts)]).sum()

    def _halve(self, model: Any, message: str) -> None:
        if self.args.world_size > 1 or self.parts >= max(documents_in(batch) for batch in self._window):
            raise DeviceError(
                f"memory ran out in a micro-batch of {self._window[-1]['input_ids'].shape[1]} tokens ({message})",
                "train_qlora.micro_batch_rows",
                "halve it, set gradient_checkpointing: full, or lower split.pack_tokens; `make doctor` says what fits",
            )
        self.parts *= 2
        self._losses = []
        model.zero_grad(set_to_none=True)
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory at step %d: micro-batches in %d parts from here", self._step(), self.parts)

    def _step(self) -> int:
        return int(self.state.global_step) + 1

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        scaled = self.accelerator.scaler is not None
        self.guard.watch(self._step(), norm, self.optimizer.optimizer, scaled=scaled)
        return norm

    def _prepare_for_training(self, *arguments: Any, **others: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **others)
        if self.args.device.type == "cuda":
            self.confirm_memory(prepared[0])
            peak_gib = torch.cuda.max_memory_allocated(self.args.device) / GIB
            logger.info("the largest micro-batch fits: %.1f GiB at its peak", peak_gib)
        return prepared

    def confirm_memory(self, model: Any) -> None:
        """One forward and backward on the largest micro-batch, before the first step; changes nothing else."""
        generators = capture_generators(self.args.device)
        largest = self.run.sizes.tokens.argsort(kind="stable")[-int(self.run.settings.micro_batch_rows) :]
        rows = PackedRows(self.train_dataset)
        self.training_step(model, self.data_collator([rows[row] for row in largest.tolist()]), 1)
        self._window, self._losses = [], []
        model.zero_grad(set_to_none=True)
        restore_generators(generators, self.args.device)

    # After a step: log, validate, save, stop. Replaces the parent's, which hides NaN and writes checkpoints in place.

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *_: Any, learning_rate: Any = None
    ) -> None:
        step, settings = int(self.state.global_step), self.run.settings
        if step == self._finished_step:
            return  # The parent calls once more at the end of an epoch.
        self._finished_step = step
        self._step_losses.append((step, torch.stack(self._losses).sum()))
        last = step == self.state.max_steps
        validates = last or step % settings.evaluate_every_steps == 0
        if validates or step % settings.log_every_steps == 0:
            self._log_step(float(grad_norm), float(learning_rate), validates)
        stops = self.stopped = self._wishes_to_stop()
        due = step % settings.save_every_steps == 0
        if due:
            self.guard.check()
        # One of several steps that are skipped in a row is no state to roll back to.
        if last or stops or self.stopped_early or (due and step not in self.guard.skipped):
            self._save_checkpoint(model, None)
        self.control.should_training_stop = stops or self.stopped_early

    def _wishes_to_stop(self) -> bool:
        wish = bool(self.run.wish.signal_name)
        if self.args.world_size > 1:
            # A signal reaches processes at different steps, and they have to stop at the same one.
            wish = bool(self.accelerator.reduce(torch.tensor(float(wish), device=self.args.device)).item())
        return wish

    def _log_step(self, gradient_norm: float, learning_rate: float, validates: bool) -> None:
        self.guard.check()
        # A checkpoint since the last entry may have asked the guard before.
        skipped = set(self.guard.skipped)
        losses = [loss for step, loss in self._unlogged() if step not in skipped]
        step, first = self._finished_step, self._step_losses[0][0]
        self._step_losses = []
        if not losses and not validates:
            return  # Every step since the last entry was skipped: there is no loss to speak of.
        entry: LogEntry = {
            "step": step,
            "train_loss": sum(losses) / len(losses) if losses else None,
            "validation_loss": self._validate() if validates else None,
            "learning_rate": learning_rate,
            "gradient_norm": None if step in skipped else gradient_norm,
            "trained_tokens": trained_until(self.run.windows, self.run.sizes.trained, step, self.guard.skipped),
            "skipped_steps": len(self.guard.skipped),
        }
        check_finite(entry)
        self.journal.append(entry)
        self._report(entry, first)
        if validates:
            self._judge_validation(step)

    def _unlogged(self) -> list[tuple[int, float]]:
        """Step and loss, over all processes, of the steps since the last entry."""
        if not self._step_losses:
            return []
        total = self.accelerator.reduce(torch.stack([loss for _, loss in self._step_losses]), "mean").tolist()
        return [(step, loss) for (step, _), loss in zip(self._step_losses, total, strict=True)]

    def _report(self, entry: LogEntry, first: int) -> None:
        step, windows = self._finished_step, self.run.windows
        tokens = sum(int(self.run.sizes.tokens[windows.of_step(each - 1)].sum()) for each in range(first, step + 1))
        self.tokens += tokens
        self.run.seen(step, self.tokens)
        if self.bar is not None:
            self.bar.show(step, float(entry["train_loss"] or 0), tokens)

    def _best_step(self) -> int:
        early = self.run.settings.early_stopping
        return best_validation(self.journal.entries, early.min_improvement)[0] if early is not None else 0

    def _validate(self) -> float:
        # One process decides for all: they must stop at the same step.
        loss = torch.tensor(self.run.validate(self.model), dtype=torch.float64, device=self.args.device)
        return float(broadcast(loss))

    def _judge_validation(self, step: int) -> None:
        if self._best_step() == step:
            # All processes: shards are put together.
            weights = {f"weights.{name}": on_cpu(value) for name, value in trained_weights(self.model).items()}
            if self.args.process_index == 0:
                save(self.run.folder / BEST, step, weights, {})
        self.stopped_early = self.patience_is_over()

    def patience_is_over(self) -> bool:
        """Whether the log so far ends a run with early stopping."""
        early = self.run.settings.early_stopping
        return early is not None and best_validation(self.journal.entries, early.min_improvement)[1] >= early.patience

    # Checkpoints: the project's own, in place of the parent's pickles.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.check()
        check_weights(self.model)
        generators = gather_object([capture_generators(self.args.device)])
        unlogged = [(step, loss) for step, loss in self._unlogged() if step not in self.guard.skipped]
        tensors, state = capture(self.model, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
        if self.args.process_index == 0:
            own = {"parts": self.parts, "skipped": self.guard.skipped, "unlogged": unlogged, GENERATORS: generators}
            content = {"state": {**state, **own}, "trainer_state": dataclasses.asdict(self.state)}
            save(self.run.folder, self.state.global_step, tensors, content)
            prune(self.run.folder, self.run.settings.keep_checkpoints)
            # Older best weights were kept until now: a run that went on from an older checkpoint needed them.
            drop_before(self.run.folder / BEST, self._best_step())
        self.accelerator.wait_for_everyone()

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, before training goes on from its checkpoint."""
        self.journal = Journal(self.run.folder, step, writes=self.journal.writes)
        self.guard = FiniteGuard(self.run.windows, self.run.settings.max_skipped_steps)
        self._step_losses, self._finished_step = [], -1

    # Nothing here: weights and gradient scaler come back together with the optimizer's state.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None: ...

    def _load_scaler(self, checkpoint: str | None) -> None: ...

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, state = load_tensors(Path(checkpoint)), read_json(Path(checkpoint) / STATE)
        restore(self.model, self.optimizer, self.lr_scheduler, self.accelerator.scaler, tensors, state)
        self.parts, self.guard.skipped = state["parts"], state["skipped"]
        self._step_losses = [(step, torch.tensor(loss, device=self.args.device)) for step, loss in state["unlogged"]]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = read_json(Path(checkpoint) / STATE)[GENERATORS]
            restore_generators(states[self.args.process_index], self.args.device)
