"""register: everything made -> one MLflow run and one registered version; models/registered.json."""

from __future__ import annotations

from pathlib import Path

from finetune.io import write_json
from finetune.lineage import Outputs, read_datasets, read_metrics, repository_root, run_params, version_tags
from finetune.log import logger
from finetune.params import load_params
from finetune.run_report.card import describe, render_card
from finetune.run_report.facts import RUN_CARD_FILE, SPEED_FILE, read_facts
from finetune.run_report.page import render_page
from finetune.sections import Register
from finetune.stages._main import stage_main
from finetune.tracking.client import PATIENT, connect, refusals
from finetune.tracking.registry import ALIAS, ensure_curves, find_or_create_run, log_outputs, register_version

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
    samples: Path,
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
    figures, datasets = read_metrics(metrics), read_datasets(raw_manifest)
    local = {"speed": repository_root() / SPEED_FILE, "run_card": repository_root() / RUN_CARD_FILE}
    facts = read_facts(outputs, params, samples=samples, quantized_samples=quantized_samples, tags=tags, **local)
    description, card = describe(facts, register.model_name), render_card(facts, register.model_name)
    texts = {"report/run.html": render_page(facts, data_page="index.html"), "report/README.md": card}
    artifacts = {samples: "", quantized_samples: "quantization", params_file: "", dvc_lock: "", dvc_yaml: ""}
    artifacts |= {file: "plots" for file in sorted(plots.glob("*.csv"))}
    artifacts |= {file: "report" for file in sorted(report.iterdir())}
    artifacts |= {file: "ollama" for file in sorted(ollama.iterdir())}
    artifacts |= {local["run_card"]: ""} if facts.run_card else {}
    with refusals():
        run_id = find_or_create_run(client, register.experiment, tags["adapter_sha256"], run_params(params))
        points = ensure_curves(client, run_id, facts.curves)
        run_tags = {**tags, "mlflow.note.content": description}
        log_outputs(client, run_id, metrics=figures, datasets=datasets, artifacts=artifacts, texts=texts, tags=run_tags)
        number = register_version(client, run_id, register, merged, tags, description, card)
    content = {"model_name": register.model_name, "alias": ALIAS, "content_sha256": tags["content_sha256"]}
    write_json(registered, content)
    message = "%s version %s as %s, %d metrics, %d curve points copied, content %s"
    logger.info(message, register.model_name, number, ALIAS, len(figures), points, tags["content_sha256"][:12])


if __name__ == "__main__":
    stage_main(run, PARAMS)
