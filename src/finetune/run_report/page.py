"""RunFacts -> one HTML page: no script, no other file, no address; light and dark, phone and paper."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.run_report import learned, machine, measured, provenance, verdict
from finetune.run_report.charts import FUNNEL, curve_plot, funnel_bars, loss_plot, pareto_plot, ratio_ranges
from finetune.run_report.facts import RunFacts, entry
from finetune.run_report.formats import NOT_MEASURED, shorten, visible

MAX_SHOWN_CHARACTERS = 2000


def render_page(facts: RunFacts, data_page: str) -> str:
    """The page; `data_page` is where the data page lies beside it, as a relative address.

    Raises DataError that names a missing figure and the stage that makes it.
    """
    page = _environment().get_template("page.html.jinja")
    return page.render(
        data_page=data_page,
        recipe=facts.params.recipe,
        base=learned.base_name(facts),
        method=learned.method(facts),
        verdicts=verdict.verdicts(facts),
        licences=learned.licences(facts),
        funnel=funnel_bars({key: entry(facts.metrics, "clean", key) for key in FUNNEL}),
        funnel_sentence=learned.funnel_sentence(facts),
        split_sentence=learned.split_sentence(facts),
        sources=learned.sources_table(facts),
        training=learned.training_table(facts),
        loss=loss_plot(facts.curves),
        learning_rate=curve_plot(facts.curves, "learning_rate", "learning rate"),
        gradient_norm=curve_plot(facts.curves, "gradient_norm", "gradient norm"),
        machine=machine.machine_table(facts.run_card),
        telemetry=machine.telemetry_table(facts.run_card),
        ranges_drawn=ratio_ranges(measured.ratios(facts)),
        resamples=facts.params.evaluate.bootstrap_resamples,
        comparison=measured.comparison_table(facts),
        tasks=measured.tasks_tables(facts),
        pareto=pareto_plot(facts.metrics["quantize_gguf"]["types"], facts.pareto),
        quantization=measured.quantization_table(facts),
        importance_rows=facts.params.quantize_gguf.importance_matrix_rows,
        machines=measured.machines(facts),
        merge=measured.merge_table(facts),
        merge_sentence=measured.merge_sentence(facts),
        types=facts.types,
        samples=facts.samples,
        parity=measured.parity_table(facts),
        hashes=provenance.hashes_table(facts),
        origin=provenance.source_table(facts),
        rebuild_note=provenance.rebuild_note(facts),
        rebuild_commands=provenance.rebuild_commands(facts),
        parameters=provenance.parameters(facts),
        not_measured=NOT_MEASURED,
    )


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = lambda text: visible(shorten(text, MAX_SHOWN_CHARACTERS))
    return environment
