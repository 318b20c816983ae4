"""RunFacts -> a model card: Hugging Face's YAML head and Markdown; its sections are also those of a version's page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from ruamel.yaml import YAML

from finetune.run_report import learned, measured, provenance, verdict
from finetune.run_report.facts import RunFacts, number
from finetune.run_report.formats import visible
from finetune.run_report.tables import Cell, Table, table

# Licences that the Hub knows by these names and that data is published under; another one is `other` with its name.
HUB_LICENCES = {
    "mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0", "odc-by", "odbl",
    "bsd-3-clause", "gpl-3.0",
}  # fmt: skip
MAIN_FIGURES = ("correct", "restraint", "accuracy", "share", "vocabulary_distance")


def render_card(facts: RunFacts, model_name: str) -> str:
    """The card as README.md of a model on the Hub: https://huggingface.co/docs/hub/model-cards."""
    head = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(front_matter(facts, model_name), head)
    return f"---\n{head.getvalue()}---\n\n" + "\n".join(card_sections(facts, model_name).values())


def front_matter(facts: RunFacts, model_name: str) -> dict[str, Any]:
    """The card's metadata; what does not apply, such as `base_model` of a model from scratch, is not there."""
    learned_from = [source for source in facts.sources if source["use"] != "decontamination"]
    datasets = [source["origin"] for source in learned_from if source["revision"]]
    languages = facts.metrics["clean"].get("languages", {})
    quantized = facts.params.train_qlora.quantization.format != "none"
    metrics = {"perplexity": "perplexity", "accuracy": "token_accuracy"}
    figures = [
        {"type": kind, "name": key.replace("_", " "), "value": number(facts.metrics, "evaluate", "tuned", key)}
        for kind, key in metrics.items()
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": facts.params.recipe, "name": f"held-out test rows of the recipe {facts.params.recipe}"},
        "metrics": figures,
    }
    head: dict[str, Any] = {
        **_licence(facts),
        "language": sorted(languages, key=lambda code: (-languages[code], code)),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [facts.params.recipe, "qlora" if quantized else "lora", "gguf", "ollama"],
        "metrics": list(metrics),
        "model-index": [{"name": model_name, "results": [result]}],
    }
    if facts.base["kind"] == "hub":
        head["base_model"] = facts.base["repo_id"]
    if datasets:
        # `hub:owner/name/glob of files`
        head["datasets"] = sorted({"/".join(origin.partition(":")[2].split("/")[:2]) for origin in datasets})
    return head


def _licence(facts: RunFacts) -> dict[str, str]:
    """One licence where all data has it and no base adds its own; else where to look."""
    names = {name.lower() for name in learned.licences(facts)}
    if facts.base["kind"] != "hub" and len(names) == 1 and names <= HUB_LICENCES:
        return {"license": names.pop()}
    head = {"license": "other", "license_name": "of-base-and-data"}
    if facts.base["kind"] == "hub":
        head["license_link"] = f"https://huggingface.co/{facts.base['repo_id']}"
    return head


def card_sections(facts: RunFacts, model_name: str) -> dict[str, str]:
    """Title -> Markdown, in reading order."""
    findings = "\n".join(f"- {each.title}: **{each.figure}**, {each.text}." for each in verdict.verdicts(facts))
    base = _plain(learned.base_name(facts))
    head = f"# {model_name}\n\nRecipe `{facts.params.recipe}`: {learned.method(facts)}, on {base}."
    rebuild = indented(provenance.rebuild_commands(facts))
    merged = measured.merge_table(facts)
    licences = ", ".join(learned.licences(facts))
    return {
        "head": f"{head}\n\n{findings}\n",
        "sources": f"## Learned from\n\n{learned.funnel_sentence(facts)} {learned.split_sentence(facts)} "
        f"Licences: {_plain(licences)}.\n\n{markdown(_short_sources(facts))}",
        "base beside tuned": f"## Base beside tuned\n\nOn held-out test rows, base → tuned, with 95 % intervals.\n\n"
        f"{markdown(measured.comparison_table(facts))}",
        "tasks": f"## Tasks\n\n{markdown(_short_tasks(facts))}",
        "quantisation": f"## Quantisation\n\nBeside the merged model; in brackets the budget.\n\n"
        f"{markdown(_short_quantization(facts))}",
        "merge": f"## Merge\n\n{measured.merge_sentence(facts)}\n" + (f"\n{markdown(merged)}" if merged else ""),
        "served": f"## Served = trained\n\n{markdown(measured.parity_table(facts))}",
        "rebuild": f"## Make it again\n\n{provenance.rebuild_note(facts)}\n" + (f"\n{rebuild}" if rebuild else ""),
    }


def _short_sources(facts: RunFacts) -> Table:
    whole = learned.sources_table(facts)
    wanted = [whole.headings.index(name) for name in ("source", "licence", "files", "kept", "training tokens")]
    return table((whole.headings[at] for at in wanted), ([row[at] for at in wanted] for row in whole.rows))


def _short_quantization(facts: RunFacts) -> Table:
    whole = measured.quantization_table(facts)
    return table(whole.headings[:5], ((Cell(row[0].text), *row[1:5]) for row in whole.rows))


def _short_tasks(facts: RunFacts) -> Table:
    """The figure by which each task is judged, for base and tuned."""
    return table(("task", "figure", "base", "tuned"), _main_figures(facts))


def _main_figures(facts: RunFacts) -> Iterator[list[Cell | str]]:
    labels = {measured.label(key) for key in MAIN_FIGURES}
    for task, content in measured.tasks_tables(facts).items():
        columns = [content.headings.index(name) for name in ("base", "tuned")]
        for row in content.rows:
            if row[0].text in labels:
                yield [task, row[0].text, *(row[at] for at in columns)]


def markdown(content: Table) -> str:
    """A Table in Markdown; notes in brackets. Text of the data can neither end a cell nor become HTML."""
    lines = ["| " + " | ".join(content.headings) + " |", "|" + "---|" * len(content.headings)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in content.rows]
    return "\n".join(lines) + "\n"


def indented(commands: Sequence[str]) -> str:
    """Lines to type, as a block of code."""
    return "".join(f"    {command}\n" for command in commands)


def _cell(cell: Cell) -> str:
    mark = "" if cell.kept is None else " ✓" if cell.kept else " ✗"
    return _plain(f"{cell.text}{mark} ({cell.note})" if cell.note else f"{cell.text}{mark}")


def _plain(text: str) -> str:
    shown = visible(text).replace("\n", " ")
    for sign, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("[", "\\[")):
        shown = shown.replace(sign, escaped)
    return shown
