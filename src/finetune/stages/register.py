"""register: everything made -> one MLflow run and one registered version; models/registered.json."""

from __future__ import annotations

from pathlib import Path

from finetune.io import write_json
from finetune.lineage import (
    Outputs,
    read_datasets,
    read_metrics,
    repository_root,
    run_params,
    served_tags,
    version_tags,
)
from finetune.log import logger
from finetune.params import load_params
from finetune.run_report.card import render_card
from finetune.run_report.facts import RUN_CARD_FILE, SPEED_FILE, read_facts
from finetune.run_report.page import render_page
from finetune.run_report.version_page import Registered, describe, describe_model
from finetune.sections import Register
from finetune.stages._main import stage_main
from finetune.tracking import registry
from finetune.tracking.client import PATIENT, connect, refusals
from finetune.tracking.promotion import beside_champion

PARAMS = ("register",)


def run(
    adapter: Path,
    merged: Path,
    gguf: Path,
    ollama: Path,
    params_file: Path,
    registered: Path,
    base: Path,
    base_manifest: Path,
    raw_manifest: Path,
    metrics: Path,
    plots: Path,
    evaluation: Path,
    quantized_samples: Path,
    report: Path,
    dvc_lock: Path,
    dvc_yaml: Path,
    *,
    register: Register,
) -> None:
    """Fill the run of this adapter and register the merged model; equal content only moves the alias."""
    client = connect(PATIENT)
    outputs = Outputs(adapter, merged, gguf, ollama, base, base_manifest, raw_manifest, metrics, plots, dvc_lock)
    params = load_params(params_file)
    tags = version_tags(outputs, params.recipe, repository_root())
    tags |= served_tags(gguf, ollama, params.ollama_modelfile.quantization)
    figures, datasets, samples = read_metrics(metrics), read_datasets(raw_manifest), evaluation / "samples.jsonl"
    local = {"speed": repository_root() / SPEED_FILE, "run_card": repository_root() / RUN_CARD_FILE}
    facts = read_facts(outputs, params, samples=samples, quantized_samples=quantized_samples, tags=tags, **local)
    name, card = register.model_name, render_card(facts, register.model_name)
    texts = {"report/run.html": render_page(facts, data_page="index.html"), "report/README.md": card}
    artifacts = {samples: "", quantized_samples: "quantization", params_file: "", dvc_lock: "", dvc_yaml: ""}
    folders = [(evaluation, "*_scores.csv"), (metrics, "*.json"), (plots, "*.csv"), (report, "*"), (ollama, "*")]
    artifacts |= {file: folder.name for folder, names in folders for file in sorted(folder.glob(names))}
    artifacts |= {local["run_card"]: ""} if facts.run_card else {}
    with refusals():
        run_id = registry.find_or_create_run(client, register.experiment, tags, run_params(params))
        points = registry.ensure_curves(client, run_id, facts.curves)
        registry.log_outputs(client, run_id, registry.Recorded(figures, datasets, artifacts, texts, tags))
        number, unwritten = registry.register_version(client, run_id, register, outputs, tags, card)
        if unwritten:
            page = describe(facts, name, Registered(number, register.mode, beside_champion(client, name, number)))
            registry.write_pages(client, name, number, page, describe_model(name, params.recipe))
    write_json(registered, {"model_name": name, "alias": registry.ALIAS, "content_sha256": tags["content_sha256"]})
    logger.info("%s version %s as %s, %d curve points copied", name, number, registry.ALIAS, points)


if __name__ == "__main__":
    stage_main(run, PARAMS)
