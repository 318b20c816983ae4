"""run card -> on what a model was trained and what that took; empty cards give no table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.run_report.formats import NOT_MEASURED, count, significant, size
from finetune.run_report.tables import Table, table

UNITS = {"percentage": "%", "megabytes": "MB", "watts": "W", "celsius": "°C"}


def machine_table(card: Mapping[str, Any]) -> Table | None:
    """Hardware, software, time, speed and energy of the training; None without a card."""
    return table(("what", "this training"), _machine_rows(card)) if card else None


def _machine_rows(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    hardware = card["hardware"]
    cpu = hardware["cpu"]
    yield "processor", f"{cpu['model']}, {cpu['usable_threads']} threads, {size(hardware['memory_bytes'])}"
    for gpu in hardware["gpus"]:
        held = f"{size(gpu['peak_allocated_bytes'])} held at most"
        yield "GPU", f"{gpu['name']}, {size(gpu['memory_bytes'])}, {held}"
    if hardware["gpus"]:
        yield "driver, CUDA", f"{hardware['driver'] or NOT_MEASURED}, {hardware['cuda']}"
    yield "libraries", ", ".join(f"{name} {text}" for name, text in card["libraries"].items())
    mode = "refusing kernels that depend on timing" if card["deterministic"] else "fastest kernels"
    yield "kernels", f"attention {card['attention']}, {mode}"
    each = f" on each of {card['processes']} processes" if card["processes"] > 1 else ""
    yield "micro-batch", f"{card['micro_batch_rows']} packed rows{each}"
    yield "started, ended", f"{card['started'] or NOT_MEASURED}, {card['ended'] or NOT_MEASURED}"
    yield "time", _with_unit(card["seconds"], "s")
    yield "speed", _with_unit(card["tokens_per_s"], "tokens/s")
    yield "energy of the GPUs", _with_unit(card["energy_wh"], "Wh")
    yield "resumed, steps skipped", f"{_plain(card['resumes'])}, {card['skipped_steps']}"
    yield "commit", card["git_commit"] + (" and changes" if card["git_dirty"] == "true" else "")


def telemetry_table(card: Mapping[str, Any]) -> Table:
    """Mean, p95 and max of every figure that was sampled, with its unit."""
    figures = card.get("telemetry", {})
    rows = ((_name(name), *(significant(figures[name][key]) for key in ("mean", "p95", "max"))) for name in figures)
    return table(("figure", "mean", "p95", "max"), rows)


def _name(figure: str) -> str:
    if figure == "tokens_per_second":
        return "speed, tokens/s"
    words, _, unit = figure.rpartition("_")
    return f"{words.replace('_', ' ').replace('cpu', 'CPU').replace('gpu', 'GPU')}, {UNITS[unit]}"


def _with_unit(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{significant(value)} {unit}"


def _plain(value: float | None) -> str:
    return NOT_MEASURED if value is None else count(value)
