"""gradient norms -> which optimizer steps are skipped, and when a run is stopped: no step is taken on NaN or infinity.

The trainer of transformers hides a NaN behind the mean of earlier losses and takes the step
(https://github.com/huggingface/trl/issues/6702). Here the optimizer leaves weights and moments as they are on such a
step. With a fused optimizer the decision stays on the device, so that no step waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune.errors import NotFiniteError
from finetune.log import logger
from finetune.training.batches import Windows
from finetune.training.sharding import whole

SHOWN_ROWS = 8
# torch's gradient scaler starts at 65,536 and halves with each step that overflows: so many until it is one.
SCALE_SEARCH_STEPS = 16


class FiniteGuard:
    """Counts skipped steps. `skipped`: of the whole run, those before a resume included, as steps from 1."""

    def __init__(self, windows: Windows, max_skipped_steps: int) -> None:
        self.windows, self.max_skipped_steps = windows, max_skipped_steps
        self.skipped: list[int] = []
        self._flags: list[tuple[int, torch.Tensor]] = []
        self._allowed = max_skipped_steps

    def watch(self, step: int, gradient_norm: torch.Tensor | float, optimizer: Any, *, scaled: bool) -> None:
        """Note whether the gradients of `step` are finite, and make the optimizer leave the step out if not.

        `scaled`: a gradient scaler skips float16 steps by itself. Optimizers that take no flag are told by gradients
        that are None, for which the host has to know: one wait per optimizer step.
        """
        finite = torch.isfinite(torch.as_tensor(gradient_norm))
        self._flags.append((step, finite))
        if scaled:
            self._allowed = self.max_skipped_steps + SCALE_SEARCH_STEPS
            return
        if takes_flag(optimizer):
            optimizer.found_inf = (~finite).to(torch.float32)
        elif not bool(finite):
            optimizer.zero_grad(set_to_none=True)

    def check(self) -> list[int]:
        """The steps since the last check that were skipped; raises NotFiniteError when too many follow each other."""
        flags = torch.stack([finite.cpu() for _, finite in self._flags]).tolist() if self._flags else []
        found = [step for (step, _), finite in zip(self._flags, flags, strict=True) if not finite]
        self._flags.clear()
        for step in found:
            rows = self.windows.of_step(step - 1).tolist()
            more = ", ..." if len(rows) > SHOWN_ROWS else ""
            shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + more
            logger.warning("step %d: its gradient is not finite, skipped; packed rows %s", step, shown)
            self.skipped.append(step)
            if self._in_a_row() > self._allowed:
                raise NotFiniteError(
                    f"{self._in_a_row()} steps in a row had no finite gradient, the last is step {step} (rows {shown})",
                    "train_qlora",
                    "lower train_qlora.learning_rate, set compute_dtype: bfloat16 in place of float16, or look at "
                    "these rows of data/split/packed.parquet; the last good checkpoint is kept",
                )
        return found

    def _in_a_row(self) -> int:
        last = self.skipped[-1]
        return next(count for count in range(1, len(self.skipped) + 1) if last - count not in self.skipped)


def takes_flag(optimizer: Any) -> bool:
    """Whether the optimizer reads `found_inf` itself, on its device: torch's fused ones do."""
    return bool(optimizer.defaults.get("fused"))


def check_weights(model: Any) -> None:
    """Raise NotFiniteError when a trained weight is not finite: such a state must never be saved as a good one."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(whole(torch.isfinite(weight).all())):
            raise NotFiniteError(
                f"the weight {name} is not finite",
                "train_qlora",
                "lower train_qlora.learning_rate; the last good checkpoint is kept",
            )
