"""models/base, train_qlora, the card, the last run's speed -> what training takes of memory, and how long it lasts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.doctor.accelerator import Accelerators
from finetune.doctor.disk import BYTES
from finetune.doctor.result import GIB, Result, fault, gib, ok, warning
from finetune.errors import DataError, DeviceError
from finetune.params import Params
from finetune.training_sections import TrainQlora

if TYPE_CHECKING:
    from finetune.training.batch_plan import BatchPlan
    from finetune.training.memory_model import StillBytes

BASE, TOKENIZER = Path("models/base"), Path("models/tokenizer")
MEMORY, TIME, MERGE = "memory of training", "time of training", "memory of merge"
SHOWN_GIB = 0.005
MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True)
class TrainingPlan:
    """How training is cut, what no batch changes, and the longest packed row that the card holds (None: a CPU)."""

    chosen: BatchPlan
    still: StillBytes
    longest_tokens: int | None


def plan(root: Path, params: Params, card_bytes: int | None) -> TrainingPlan:
    """How training is cut for a card of so many bytes, or for a CPU where it is None.

    Imports torch and transformers. Raises DataError where the base is not made yet, DeviceError where nothing fits.
    """
    base = root / BASE
    if not base.is_dir():
        raise DataError("the base is not made", BASE, "python -m finetune.doctor.repro base")
    from finetune.training.batch_plan import choose, longest_row_tokens
    from finetune.training.memory_model import open_model
    from finetune.training.vocabulary import read_extension

    settings, extension = params.train_qlora, read_extension(root / TOKENIZER)
    attention = planned_attention(base, settings, on_card=card_bytes is not None)
    chosen = choose(
        base,
        settings,
        extension,
        pack_tokens=params.split.pack_tokens,
        # No document is longer than this, and whether one is that long is not known before `tokenize`.
        longest_document_tokens=params.tokenize.max_tokens,
        attention=attention,
        card_bytes=card_bytes,
    )
    still = open_model(base, settings, extension, attention).still
    if card_bytes is None:
        return TrainingPlan(chosen, still, None)
    longest = longest_row_tokens(base, settings, extension, attention=attention, card_bytes=card_bytes)
    return TrainingPlan(chosen, still, longest)


def planned_attention(base: Path, settings: TrainQlora, *, on_card: bool) -> str:
    """The attention to count with: the one that this machine would take, or that a card of capability 8.0 would.

    Raises DeviceError for one that was asked for by name and that this machine's card does not have.
    """
    import torch
    from transformers import AutoConfig

    from finetune.training.attention import VARLEN, choose_attention, mask_attention
    from finetune.training.device import dtype_named
    from finetune.training.model import locate_base

    config = AutoConfig.from_pretrained(locate_base(base), trust_remote_code=False, local_files_only=True)
    if on_card and torch.cuda.is_available():
        return choose_attention(settings.attention, config, torch.device("cuda:0"), dtype_named(settings.compute_dtype))
    possible = on_card and settings.compute_dtype != "float32" and settings.attention != "sdpa"
    return VARLEN if possible else mask_attention(config)


def memory_result(plan: TrainingPlan, limit_bytes: int, place: str) -> Result:
    """The plan's terms as a table. `limit_bytes`: of the card, or of the machine's free memory."""
    chosen, estimate = plan.chosen, plan.chosen.estimate
    cut = (
        f"{chosen.micro_batch_rows} rows x {chosen.accumulation_steps} a step, "
        f"gradient checkpointing {chosen.gradient_checkpointing}"
    )
    if estimate is None:
        # On a CPU nothing depends on the activations, and they are not modelled.
        held = {field.name: getattr(plan.still, field.name) for field in fields(plan.still) if field.name != "layer"}
        total, what = sum(held.values()), "without activations"
        terms = [(name.replace("_", " "), size_bytes / GIB) for name, size_bytes in held.items()]
    else:
        total, what, terms = estimate.total, "at the fullest moment", estimate.table()
    lines = [f"{gib(total)} {what}, of {gib(limit_bytes)} ({place}): {cut}"]
    lines += [f"{size_gib:6.2f} GiB  {name}" for name, size_gib in terms if size_gib >= SHOWN_GIB]
    if plan.longest_tokens is not None:
        lines.append(f"a packed row may have {plan.longest_tokens:,} tokens at most, with full checkpointing")
    if total > limit_bytes:
        return fault(MEMORY, "\n".join(lines), "use a machine with more memory, or a smaller base model")
    return ok(MEMORY, "\n".join(lines))


def unknown_memory(reason: DataError | DeviceError) -> Result:
    """What is said where no plan can be made: the base is not there yet, or nothing fits."""
    if isinstance(reason, DeviceError):
        return fault(MEMORY, f"{reason.where}: {reason.what}", reason.remedy)
    return warning(MEMORY, f"not known yet: {reason.what} ({reason.where})", reason.remedy)


def merge_result(params: Params, parameters: int | None, free_bytes: int, *, on_card: bool) -> Result:
    """Whether the machine's memory holds the models that merge and quantize_gguf compare, after training."""
    if parameters is None:
        return ok(MERGE, "not known: the base's size is not")
    # Trained in 4 bit, the model of training is held beside it: a byte for each parameter, as the stage counts.
    beside_bytes = 0 if params.train_qlora.quantization.format == "none" else 1
    needed = {"merge.compare_dtype": parameters * (BYTES[params.merge.compare_dtype] + beside_bytes)}
    if not on_card:
        needed["quantize_gguf"] = parameters * BYTES["float32"]
    key = max(needed, key=lambda name: needed[name])
    found = f"{key} holds {gib(needed[key])} of the {gib(free_bytes)} that are free now"
    if needed[key] <= free_bytes:
        return ok(MERGE, found)
    remedy = "stop other programs, or use a machine with more memory"
    if key == "merge.compare_dtype" and params.merge.compare_dtype == "float32":
        remedy = f"set merge.compare_dtype: bfloat16, {remedy}"
    return fault(MERGE, found, remedy)


def steps_of(split_metrics: Mapping[str, Any], settings: TrainQlora) -> tuple[int, int]:
    """Optimizer steps and tokens of all epochs, from metrics/split.json."""
    steps = math.ceil(split_metrics["packed"]["rows"] / settings.batch_rows) * settings.epochs
    return steps, split_metrics["splits"]["train"]["tokens"] * settings.epochs


def time_result(counted: tuple[int, int] | None, tokens_per_s: float | None) -> Result:
    """Steps, tokens and hours; `counted` is None before the split is made, the speed where none was measured here."""
    if counted is None:
        return ok(TIME, "not known yet: metrics/split.json comes with the split")
    steps, tokens = counted
    amount = f"{steps:,} steps, {tokens:,} tokens"
    if not tokens_per_s:
        return ok(TIME, f"{amount}; speed of this machine: not measured")
    return ok(
        TIME, f"{amount}: about {_duration(tokens / tokens_per_s)} at {tokens_per_s:,.0f} tokens/s, the last run's"
    )


def measured_speed(card: Mapping[str, Any], found: Accelerators, cpu: str) -> float | None:
    """The tokens/s of the last run's card, where it ran on what this machine has."""
    hardware = card.get("hardware", {})
    names = [gpu["name"] for gpu in hardware.get("gpus", [])]
    alike = names == [gpu.name for gpu in found.gpus] and hardware.get("cpu", {}).get("model") == cpu
    speed = card.get("tokens_per_s")
    return float(speed) if alike and speed else None


def _duration(seconds: float) -> str:
    if seconds < HOUR_S:
        return f"{max(1, round(seconds / MINUTE_S))} min"
    return f"{seconds / HOUR_S:.1f} h"
