"""a trained model and its log -> the figures of metrics/train_qlora.json, and the run card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.machine_card import RUN_CARD_FILE, Trained, write_run_card
from finetune.training.journal import LogEntry
from finetune.training.model import four_bit_layers
from finetune.training.preparation import Prepared
from finetune.training.vocabulary import unmoved_tokens

FIGURES = ("train_loss", "validation_loss", "trained_tokens", "skipped_steps")
SUMMARY = (
    "%(steps)d steps (%(skipped_steps)d skipped), %(trained_tokens)d trained tokens, loss %(train_loss).3f, "
    "validation %(validation_loss).3f, %(trainable_parameters)d trainable parameters, "
    "%(four_bit_layers)d layers in 4 bit"
)


def summarise(model: Any, entries: Sequence[LogEntry]) -> dict[str, Any]:
    """Steps, last losses, counts; raises DataError when rows of new tokens were to be trained and none moved."""
    return {
        "steps": entries[-1]["step"],
        # The last entry has no loss where its steps were skipped.
        **{name: _last(entries, name) for name in FIGURES},
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "four_bit_layers": four_bit_layers(model),
        "unmoved_tokens": unmoved_tokens(model),
    }


def _last(entries: Sequence[LogEntry], name: str) -> float | None:
    return next((entry[name] for entry in reversed(entries) if entry[name] is not None), None)


def write_card(
    prepared: Prepared, numbers: Mapping[str, Any], seed: int, hashes: Mapping[str, str], telemetry: Path
) -> None:
    """Write what this machine did for the run to .cache/run_card.json, which is no result of the pipeline."""
    settings = prepared.settings
    trained = Trained(
        steps=numbers["steps"],
        trained_tokens=numbers["trained_tokens"],
        skipped_steps=numbers["skipped_steps"],
        processes=settings.distribution.processes,
        micro_batch_rows=int(settings.micro_batch_rows),
        attention=prepared.attention,
        deterministic=settings.deterministic,
        device=str(prepared.device),
    )
    params = settings.model_dump()
    write_run_card(RUN_CARD_FILE, trained, seed=seed, params=params, hashes=hashes, telemetry=telemetry, root=Path())
