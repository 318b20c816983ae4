"""RunFacts -> what evaluation and export measured: base beside tuned, tasks, GGUF types, merge, prompt parity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from finetune.run_report.facts import RunFacts, entry, number
from finetune.run_report.formats import (
    NO_BREAK,
    NOT_MEASURED,
    bare_ratio,
    count,
    exact,
    interval,
    percent,
    ratio,
    significant,
    size,
)
from finetune.run_report.tables import Cell, Table, table
from finetune.sections import QuantizedType

SHARES = {"valid_json", "function_name", "arguments", "correct", "restraint", "accuracy", "macro_f1", "share"}
ASKED = {"questions", "answers"}
TASKS = {"tool_calls": "Function calls", "style": "Style", "labels": "Labels", "memorization": "Memorisation"}
LABELS = {
    "vocabulary_distance": "vocabulary distance, bits",
    "restraint": "rightly called none",
    "share": "share copied",
}
WHOLE = "all test rows"
QUANTIZATION_HEADINGS = (
    "type", "size", "perplexity / merged", "mean KL, nats a token", "same first choice", "bits per byte",
    "tokens/s, prompt / answer", "peak memory",
)  # fmt: skip


def ratios(facts: RunFacts) -> list[tuple[str, float, Mapping[str, float] | None]]:
    """Tuned perplexity over base with its 95 % interval, if there is one: of all test rows, then of each source."""
    whole = number(facts.metrics, "evaluate", "perplexity_ratio")
    rows = [(WHOLE, whole, facts.metrics["evaluate"].get("perplexity_ratio_interval"))]
    for source, both in sorted(entry(facts.metrics, "evaluate", "by_source").items()):
        keys = ("evaluate", "by_source", source)
        base, tuned = (number(facts.metrics, *keys, model, "perplexity") for model in ("base", "tuned"))
        rows.append((source, both.get("perplexity_ratio", tuned / base), both.get("perplexity_ratio_interval")))
    return rows


def comparison_table(facts: RunFacts) -> Table:
    """Perplexity, bits per byte and token accuracy of base and tuned, whole and by source."""
    headings = ("test rows", "perplexity", "tuned / base", "bits per byte", "next token right")
    return table(headings, (_comparison_row(facts, *row) for row in ratios(facts)))


def _comparison_row(
    facts: RunFacts, rows: str, change: float, bounds: Mapping[str, float] | None
) -> Iterator[Cell | str]:
    keys = ("evaluate",) if rows == WHOLE else ("evaluate", "by_source", rows)
    base, tuned = (entry(facts.metrics, *keys, model) for model in ("base", "tuned"))
    measured = [number(facts.metrics, *keys, "base", key) for key in ("tokens", "perplexity", "token_accuracy")]
    yield Cell(rows, f"{count(measured[0])}{NO_BREAK}tokens")
    yield f"{significant(measured[1], 4)} → {significant(number(facts.metrics, *keys, 'tuned', 'perplexity'), 4)}"
    yield Cell(ratio(change), interval(bounds, bare_ratio))
    yield _joined(" → ", [model.get("bits_per_byte") for model in (base, tuned)])
    yield f"{percent(measured[2])} → {percent(number(facts.metrics, *keys, 'tuned', 'token_accuracy'))}"


def _joined(between: str, values: Iterable[float | None]) -> str:
    """The values with three digits each, or that they were not measured if one was not."""
    texts = [None if value is None else significant(value) for value in values]
    return NOT_MEASURED if None in texts else between.join(filter(None, texts))


def tasks_tables(facts: RunFacts) -> dict[str, Table]:
    """One table for each task, by its name in words: its figures for base, tuned and every GGUF type."""
    tasks = facts.metrics["evaluate"].get("tasks", {})
    return {_task_name(task): _task_table(facts, task, both) for task, both in sorted(tasks.items())}


def _task_name(task: str) -> str:
    kind, _, part = task.partition(".")
    title = TASKS.get(kind, kind)
    return f"{title}: {part}" if part else title


def _task_table(facts: RunFacts, task: str, both: Mapping[str, Mapping[str, Any]]) -> Table:
    made = facts.metrics["quantize_gguf"]["types"]
    # Of a style, the held-out answers themselves: what the models are to come near to.
    models = {"held-out answers": both["held_out"]} if "held_out" in both else {}
    models |= {name: both.get(name, {}) for name in ("base", "tuned")}
    models |= {name: made[name].get("tasks", {}).get(task, {}) for name in facts.types}
    keys = dict.fromkeys(key for figures in models.values() for key in figures if not key.endswith("_interval"))
    # How many were asked comes first; the other keys stay as the stage sorted them.
    ordered = sorted(keys, key=lambda key: key not in ASKED)
    rows = [[Cell(label(key)), *(_figure(each, key) for each in models.values())] for key in ordered]
    return table(("figure", *models), rows)


def label(key: str) -> str:
    """A figure's name in words."""
    return LABELS.get(key, key.replace("_", " "))


def _figure(figures: Mapping[str, Any], key: str) -> Cell:
    value, bounds = figures.get(key), figures.get(f"{key}_interval")
    if value is None:
        return Cell(NOT_MEASURED)
    form = _form(key, value)
    return Cell(form(value), interval(bounds, form) if bounds else "")


def _form(key: str, value: Any) -> Callable[[Any], str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str
    if isinstance(value, int):
        return count
    return percent if key in SHARES or key.endswith(("_share", "_accuracy")) else significant


def budget_faults(facts: RunFacts) -> list[str]:
    """Every budget of quantize_gguf.types that its file exceeds, in words."""
    faults = []
    for budget in facts.params.quantize_gguf.types:
        cells = _budget_cells(facts, budget)
        faults += [f"{budget.type}: {key} {cell.text}, {cell.note}" for key, cell in cells.items() if not cell.kept]
    return faults


def _budget_cells(facts: RunFacts, budget: QuantizedType) -> dict[str, Cell]:
    def figure(key: str) -> float:
        return number(facts.metrics, "quantize_gguf", "types", budget.type, key)

    change, kl, same = figure("perplexity_ratio"), figure("mean_kl"), figure("top1_agreement")
    most, most_kl, least = budget.max_perplexity_ratio, budget.max_mean_kl, budget.min_top1_agreement
    return {
        "perplexity": Cell(ratio(change), f"at most {exact(most)}", change <= most),
        "KL": Cell(significant(kl), f"at most {exact(most_kl)}", kl <= most_kl),
        "same first choice": Cell(percent(same), f"at least {percent(least)}", same >= least),
    }


def quantization_table(facts: RunFacts) -> Table:
    """Each GGUF type: size, its losses to the merged model with their budgets, speed and memory on this machine."""
    budgets = {str(budget.type): budget for budget in facts.params.quantize_gguf.types}
    return table(QUANTIZATION_HEADINGS, (_quantization_row(facts, budgets[name]) for name in facts.types))


def _quantization_row(facts: RunFacts, budget: QuantizedType) -> Iterator[Cell | str]:
    figures = facts.metrics["quantize_gguf"]["types"][budget.type]
    kinds = ", ".join(f"{made}{NO_BREAK}{kind}" for kind, made in sorted(figures.get("tensor_types", {}).items()))
    fallback = figures.get("fallback_tensors", 0)
    yield Cell(budget.type, f"{kinds}; {count(fallback)} not as asked" if fallback else kinds)
    yield Cell(size(figures["size_bytes"]), "Pareto front" if budget.type in facts.pareto else "")
    yield from _budget_cells(facts, budget).values()
    speed = facts.speed.get(budget.type, {})
    yield _joined("", [figures.get("bits_per_byte")])
    yield _joined(" / ", [speed.get(key) for key in ("prompt_tokens_per_s", "new_tokens_per_s")])
    memory = speed.get("peak_rss_mib")
    yield NOT_MEASURED if memory is None else size(memory * 1024**2)


def machines(facts: RunFacts) -> list[str]:
    """The machines on which speed was measured."""
    return sorted({row["machine"] for row in facts.speed.values()})


def merge_table(facts: RunFacts) -> Table | None:
    """Merged onto the original weights beside the dequantised ones, each against the model of training; or None."""
    compared = facts.metrics["merge"].get("compare")
    if not compared:
        return None
    used = facts.params.merge.onto
    rows = (
        (
            Cell(onto, "the one that was exported" if onto == used else ""),
            significant(figures["mean_kl"]),
            percent(figures["top1_agreement"]),
        )
        for onto, figures in sorted(compared.items(), reverse=True)
    )
    return table(("merged onto", "mean KL to the model as trained, nats a token", "same first choice"), rows)


def merge_sentence(facts: RunFacts) -> str:
    """What the merge changed and how far its logits are from base + adapter."""
    changed, tensors = (number(facts.metrics, "merge", key) for key in ("changed_tensors", "tensors"))
    difference = significant(number(facts.metrics, "merge", "max_logit_difference"))
    allowed = exact(facts.params.merge.max_logit_difference)
    return (
        f"{count(changed)} of {count(tensors)} tensors changed; logits are within {difference} of base + adapter "
        f"(at most {allowed} allowed)."
    )


def parity_table(facts: RunFacts) -> Table:
    """What the served prompt was proven by, and what stops an answer."""
    served = facts.metrics["ollama_modelfile"]
    chats = number(facts.metrics, "ollama_modelfile", "chats")
    alike = round(number(facts.metrics, "ollama_modelfile", "parity") * chats)
    tools = served.get("tools")
    rows = [
        ("chats with equal token ids", f"{count(alike)} of {count(chats)}"),
        ("who builds the prompt", _renderer(served.get("renderer", facts.params.ollama_modelfile.renderer))),
        ("roles", ", ".join(served.get("roles", ())) or NOT_MEASURED),
        ("functions in the prompt", NOT_MEASURED if tools is None else "yes" if tools else "no"),
        ("answers stop at", "  ".join(served.get("stops", ())) or NOT_MEASURED),
        ("first token", "added by the server" if served.get("add_bos") else "written by the template"),
        ("context", f"{count(number(facts.metrics, 'ollama_modelfile', 'num_ctx'))} tokens"),
        ("Ollama serves", facts.params.ollama_modelfile.quantization),
    ]
    return table(("of the served prompt", "value"), rows)


def _renderer(name: str) -> str:
    kinds = {"go": "Ollama's Go TEMPLATE, derived from the chat template", "jinja": "the Jinja template in the GGUF"}
    return kinds.get(name, name)
