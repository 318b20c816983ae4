"""memory model + a card's memory -> micro-batch, accumulation and checkpointing, the same on every card of a kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from finetune.errors import DeviceError
from finetune.training.device import GIB
from finetune.training.memory_model import MemoryEstimate, MemoryModel, model_of, open_model
from finetune.training.vocabulary import Extension
from finetune.training_sections import Quantization, TrainQlora

# What torch's allocator may lose between blocks of different sizes. Not measured.
MARGIN_SHARE = 0.05
# Time per token beside no checkpointing, and the tokens whose time it takes to unpack all 4-bit weights once a
# micro-batch: arithmetic for an 8B Llama on an H200, documents of 2k tokens (23.8k, 17.1k and 16.5k tokens/s; 9 ms).
TIME_PER_TOKEN = {"none": 1.0, "selective": 1.39, "full": 1.44}
UNPACKING_TOKENS = 215
# Above this unpacking takes less than 1.4 % of the time: larger micro-batches only risk memory.
ENOUGH_TOKENS = 16_384
PACK_STEP = 64
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of an optimizer step are cut in one process.

    `estimate` is what its largest forward and backward takes on one card; None on a CPU, where nothing depends on it.
    """

    micro_batch_rows: int
    accumulation_steps: int
    gradient_checkpointing: str
    estimate: MemoryEstimate | None


def choose(
    base: Path,
    settings: TrainQlora,
    extension: Extension,
    *,
    pack_tokens: int,
    longest_document_tokens: int,
    attention: str,
    card_bytes: int | None,
) -> BatchPlan:
    """The fastest plan that fits: what the settings fix stays, what they leave to `auto` is chosen.

    `card_bytes`: the card's whole memory, whatever is free at the moment: the same card gets the same plan. None stands
    for a CPU: one row, nothing computed twice. Raises DeviceError where nothing fits, with what would.
    """
    rows = settings.batch_rows // settings.distribution.processes
    asked_rows, asked_mode = settings.micro_batch_rows, settings.gradient_checkpointing
    if card_bytes is None:
        micro = 1 if asked_rows == "auto" else asked_rows
        return BatchPlan(micro, rows // micro, "none" if asked_mode == "auto" else asked_mode, None)
    model = open_model(base, settings, extension, attention)
    return choose_for(model, row_tokens=max(pack_tokens, longest_document_tokens), card_bytes=card_bytes)


def choose_for(model: MemoryModel, *, row_tokens: int, card_bytes: int) -> BatchPlan:
    """`choose` for a memory model at hand, on a card."""
    rows = model.settings.batch_rows // model.settings.distribution.processes
    for micro, mode in _by_time(model.settings, row_tokens):
        estimate = model.estimate(micro * row_tokens, mode)
        if estimate.total <= usable_bytes(model.settings, card_bytes):
            return BatchPlan(micro, rows // micro, mode, estimate)
    raise _refusal(model, row_tokens, card_bytes)


def usable_bytes(settings: TrainQlora, card_bytes: int) -> int:
    """What of a card's memory a plan may fill: the share that the allocator may take, less a margin."""
    return int(card_bytes * settings.cuda_memory.fraction * (1 - MARGIN_SHARE))


def longest_row_tokens(
    base: Path, settings: TrainQlora, extension: Extension, *, attention: str, card_bytes: int
) -> int:
    """The most tokens of a row that a card holds under full checkpointing; 0 where even the model does not fit."""
    return most_tokens(open_model(base, settings, extension, attention), "full", card_bytes)


def _by_time(settings: TrainQlora, row_tokens: int) -> list[tuple[int, str]]:
    """Every (rows of a micro-batch, checkpointing) that the settings allow, the fastest first."""
    rows = settings.batch_rows // settings.distribution.processes
    sizes = [
        size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * row_tokens <= ENOUGH_TOKENS)
    ]
    if settings.micro_batch_rows != "auto":
        sizes = [settings.micro_batch_rows]
    asked = settings.gradient_checkpointing
    modes = list(TIME_PER_TOKEN) if asked == "auto" else [asked]

    def time(plan: tuple[int, str]) -> float:
        return TIME_PER_TOKEN[plan[1]] * (1 + UNPACKING_TOKENS / (plan[0] * row_tokens))

    return sorted(((size, mode) for size in sizes for mode in modes), key=time)


def most_tokens(model: MemoryModel, checkpointing: str, card_bytes: int) -> int:
    """The most tokens of a micro-batch that a card holds; 0 where even the model does not fit."""
    usable, low, high = usable_bytes(model.settings, card_bytes), 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if model.estimate(middle, checkpointing).total <= usable:
            low = middle
        else:
            high = middle - 1
    return low


def _refusal(model: MemoryModel, row_tokens: int, card_bytes: int) -> DeviceError:
    usable, (rows, mode) = usable_bytes(model.settings, card_bytes), _least(model.settings)
    need = model.estimate(rows * row_tokens, mode).total
    remedies = _changes_that_fit(model, row_tokens, usable)
    if tokens := most_tokens(model, mode, card_bytes) // rows // PACK_STEP * PACK_STEP:
        remedies.append(f"set split.pack_tokens: {tokens}, and tokenize.max_tokens no higher")
    return DeviceError(
        f"a micro-batch of {rows * row_tokens} tokens with gradient_checkpointing {mode} takes {need / GIB:.1f} GiB, "
        f"and {usable / GIB:.1f} of the card's {card_bytes / GIB:.1f} GiB are usable",
        "train_qlora",
        "; or ".join(remedies or [f"take a card of {ceil(need / usable * card_bytes / GIB)} GiB"]),
    )


def _least(settings: TrainQlora) -> tuple[int, str]:
    """The rows of a micro-batch and the checkpointing that take the least memory under these settings."""
    rows, mode = settings.micro_batch_rows, settings.gradient_checkpointing
    return (1 if rows == "auto" else rows), ("full" if mode == "auto" else mode)


def _changes_that_fit(model: MemoryModel, row_tokens: int, usable: int) -> list[str]:
    """Each single change of the settings that is enough, as what to type; else all of them, where that is."""
    settings, four_bit = model.settings, Quantization(format="nf4", double_quantization=True)
    changes: list[tuple[str, dict[str, Any]]] = []
    if settings.micro_batch_rows not in (1, "auto"):
        changes.append(("micro_batch_rows: auto", {"micro_batch_rows": "auto"}))
    if settings.gradient_checkpointing not in ("full", "auto"):
        changes.append(("gradient_checkpointing: full", {"gradient_checkpointing": "full"}))
    if settings.method == "lora" and settings.quantization != four_bit:
        text = "quantization.format: nf4 with quantization.double_quantization: true"
        changes.append((text, {"quantization": four_bit}))
    if settings.optimizer != "paged_adamw_8bit":
        changes.append(("optimizer: paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}))

    def fits(change: dict[str, Any]) -> bool:
        changed = settings.model_copy(update=change)
        rows, mode = _least(changed)
        resized = model_of(model.config, changed, model.extension, model.attention)
        if changed.quantization == settings.quantization:
            resized = replace(resized, rehearsals=model.rehearsals)
        return resized.estimate(rows * row_tokens, mode).total <= usable

    enough = [f"set train_qlora.{text}" for text, change in changes if fits(change)]
    if (
        not enough
        and len(changes) > 1
        and fits({name: value for _, change in changes for name, value in change.items()})
    ):
        enough = [f"set train_qlora.{' and train_qlora.'.join(text for text, _ in changes)}"]
    return enough
