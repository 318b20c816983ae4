"""RunFacts -> what the model learned from and how it was trained: tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune.run_report.facts import RunFacts, entry, number
from finetune.run_report.formats import NOT_MEASURED, count, exact, percent, significant, size
from finetune.run_report.tables import Cell, Table, table

NOT_TRAINED = "—"
SOURCE_HEADINGS = (
    "source", "licence", "from", "files", "rows in", "kept", "training rows", "training tokens", "of the mix"
)  # fmt: skip


def base_name(facts: RunFacts) -> str:
    """The base model in words: its name on the Hub with the start of its revision, or its size."""
    if facts.base["kind"] == "hub":
        return f"{facts.base['repo_id']} at {facts.base['revision'][:12]}"
    return f"a Llama of {count(number(facts.metrics, 'base', 'parameters'))} parameters made from scratch"


def method(facts: RunFacts) -> str:
    """How the adapter was trained, in the field's words: `QLoRA (NF4, ...), rank 32, alpha 64`."""
    training = facts.params.train_qlora
    lora, form = training.lora, training.quantization
    held = f"base weights in {training.compute_dtype}"
    if lora is None:
        return f"full fine-tuning ({held})"
    name = "DoRA" if lora.use_dora else "LoRA"
    if form.format != "none":
        name = f"Q{name}"
        double = " with double quantisation" if form.double_quantization else ""
        held = f"base in {form.format.upper()}{double}, computed in {training.compute_dtype}"
    scaled = ", rank-stabilised" if lora.use_rslora else ""
    return f"{name} ({held}), rank {lora.rank}, alpha {lora.alpha}{scaled}"


def sources_table(facts: RunFacts) -> Table:
    """One row for each source: licence, origin, its rows through the funnel, its share of the training tokens."""
    return table(SOURCE_HEADINGS, (_source_row(facts, source) for source in facts.sources))


def _source_row(facts: RunFacts, source: Mapping[str, Any]) -> Iterator[Cell | str]:
    cleaned = entry(facts.metrics, "clean", "sources").get(source["name"], {})
    mixed = entry(facts.metrics, "split", "mix", "sources").get(source["name"], {})
    total_bytes = sum(file["size_bytes"] for file in source["files"])
    use = source["use"]
    yield Cell(source["name"], "" if use == "training" else f"for {use} only")
    yield source["license"]
    yield Cell(source["origin"], f"at {source['revision'][:12]}" if source["revision"] else "")
    yield Cell(f"{count(len(source['files']))}, {size(total_bytes)}", source["sha256"][:12])
    yield from (count(cleaned[key]) if key in cleaned else NOT_TRAINED for key in ("rows_in", "kept"))
    yield from (count(mixed[key]) if key in mixed else NOT_TRAINED for key in ("rows", "tokens"))
    yield percent(mixed["obtained_share"]) if "obtained_share" in mixed else NOT_TRAINED


def licences(facts: RunFacts) -> list[str]:
    """The licences of all sources that the model learned from, sorted."""
    return sorted({source["license"] for source in facts.sources if source["use"] != "decontamination"})


def funnel_sentence(facts: RunFacts) -> str:
    """What became of every row that came in, as an equation that the stage has checked."""
    names = ("rows_in", "kept", "duplicates", "near_duplicates")
    rows_in, kept, duplicates, near = (count(number(facts.metrics, "clean", name)) for name in names)
    lost = {key: sum(entry(facts.metrics, "clean", key).values()) for key in ("dropped", "quarantined")}
    return (
        f"{rows_in} rows in = {kept} kept + {count(lost['dropped'])} dropped by a rule + {duplicates} duplicates + "
        f"{near} near-duplicates + {count(lost['quarantined'])} that could not be read."
    )


def split_sentence(facts: RunFacts) -> str:
    """Rows of the three splits and tokens of the first."""
    names = ("train", "validation", "test")
    rows = [f"{count(number(facts.metrics, 'split', 'splits', name, 'rows'))} {name}" for name in names]
    tokens, trained = (number(facts.metrics, "split", "mix", key) for key in ("tokens", "trained_tokens"))
    return f"{', '.join(rows)} rows; an epoch is {count(tokens)} tokens, {count(trained)} of them trained."


def training_table(facts: RunFacts) -> Table:
    """The settings that people compare, and what training came to."""
    return table(("setting", "value"), _training_rows(facts))


def _training_rows(facts: RunFacts) -> Iterator[tuple[str, str]]:
    training, metrics = facts.params.train_qlora, facts.metrics
    lora = training.lora
    yield "base", base_name(facts)
    yield "method", method(facts)
    if lora is not None:
        yield "adapter on", f"{', '.join(lora.target_modules)}; dropout {lora.dropout:g}"
    yield "trainable parameters", count(number(metrics, "train_qlora", "trainable_parameters"))
    yield "epochs", f"{training.epochs}, {count(number(metrics, 'train_qlora', 'steps'))} optimizer steps"
    yield "batch", f"{training.batch_rows} packed rows of {facts.params.split.pack_tokens} tokens a step"
    warmup = f"{training.scheduler}, {percent(training.warmup_share)} warm-up"
    yield "learning rate", f"{exact(training.learning_rate)}, {warmup}"
    yield "optimizer", f"{training.optimizer}, weight decay {training.weight_decay:g}"
    yield "gradient norm", f"at most {training.max_gradient_norm:g}"
    yield "trained tokens", count(number(metrics, "train_qlora", "trained_tokens"))
    yield "last training loss", f"{significant(number(metrics, 'train_qlora', 'train_loss'), 4)} nats a token"
    held = metrics["train_qlora"].get("validation_loss")
    yield "last validation loss", NOT_MEASURED if held is None else f"{significant(held, 4)} nats a token"
    yield "seed", str(facts.params.seed)
