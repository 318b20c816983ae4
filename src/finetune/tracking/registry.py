"""stage outputs -> the run of an adapter, completed; a registered version, and its answer to a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

from finetune.lineage import DatasetFacts, Outputs, new_source
from finetune.run_report.version_page import model_head
from finetune.sections import Register
from finetune.tracking.client import PATIENT, connect, find_experiment, log_now, log_params, refusals
from finetune.tracking.logged_model import log_reference, log_serving, log_upload
from finetune.tracking.mirror import RUN_NAME
from finetune.tracking.promotion import CHALLENGER

ADAPTER_TAG, CONTENT_TAG, MODE_TAG = "adapter_sha256", "content_sha256", "registry_mode"
ALIAS = CHALLENGER
MAX_DIGEST_CHARACTERS = 36


def find_or_create_run(client: Any, experiment: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """The newest finished run of this adapter (`tags`) under these `params`, completed by them, or a new one.

    A run that holds the figures of other content belongs to another version, which is judged by them: it stays.
    """
    experiment_id = find_experiment(client, experiment)
    condition = f"tags.{ADAPTER_TAG} = '{tags[ADAPTER_TAG]}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment_id], condition, order_by=["attributes.start_time DESC"]):
        logged = run.data.params
        other_content = run.data.tags.get(CONTENT_TAG, tags[CONTENT_TAG]) != tags[CONTENT_TAG]
        # mlflow refuses a second value for a param: a run with another value is of other settings.
        if not other_content and all(logged[key] == value for key, value in params.items() if key in logged):
            log_params(client, run.info.run_id, {key: params[key] for key in params.keys() - logged.keys()})
            return str(run.info.run_id)
    known = {ADAPTER_TAG: tags[ADAPTER_TAG]}
    run_id = str(client.create_run(experiment_id, run_name=RUN_NAME, tags=known).info.run_id)
    log_params(client, run_id, params)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def ensure_curves(client: Any, run_id: str, curves: Mapping[int, Mapping[str, float]]) -> int:
    """Log those points of `curves` ({step: {figure: value}}) that the run lacks; returns how many these were."""
    points = [(step, name, value) for step, figures in sorted(curves.items()) for name, value in figures.items()]
    names = {name for _, name, _ in points}
    known = {(entry.step, name) for name in names for entry in client.get_metric_history(run_id, name)}
    missing = [point for point in points if point[:2] not in known]
    log_now(client, run_id, missing)
    return len(missing)


@dataclass(frozen=True)
class Recorded:
    """What a run holds of its stages: metrics, data sets, files ({file: folder}), texts ({path: content}) and tags."""

    metrics: Mapping[str, float]
    datasets: Sequence[DatasetFacts]
    artifacts: Mapping[Path, str]
    texts: Mapping[str, str]
    tags: Mapping[str, str]


def log_outputs(client: Any, run_id: str, recorded: Recorded) -> None:
    """Log all of it; of the metrics those that changed."""
    logged = client.get_run(run_id).data.metrics
    changed = [(0, key, value) for key, value in sorted(recorded.metrics.items()) if logged.get(key) != value]
    log_now(client, run_id, changed)
    client.log_inputs(run_id, [_dataset_input(dataset) for dataset in recorded.datasets])
    for path, folder in recorded.artifacts.items():
        client.log_artifact(run_id, str(path), folder or None)
    for place, text in recorded.texts.items():
        client.log_text(run_id, text, place)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in sorted(recorded.tags.items())])


def _dataset_input(facts: DatasetFacts) -> Any:
    digest = facts.sha256[:MAX_DIGEST_CHARACTERS]
    dataset = Dataset(facts.name, digest, source_type="finetune", source=facts.source, profile=facts.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def register_version(
    client: Any, run_id: str, register: Register, outputs: Outputs, tags: Mapping[str, str], card: str
) -> tuple[str, bool]:
    """Number of this content's version, made now or known (then with `new_source`), as ALIAS; `card`: its README.md.

    Also whether its page is to be written: a new version, one of a better known source, or one that never got a page.
    """
    name, mode = register.model_name, register.mode
    condition = f"name = '{name}' and tags.{CONTENT_TAG} = '{tags[CONTENT_TAG]}' and tags.{MODE_TAG} = '{mode}'"
    found = sorted((int(entry.version) for entry in client.search_model_versions(condition)), reverse=True)
    if found:
        number = str(found[0])
        known = client.get_model_version(name, number)
        source = new_source(known.tags, tags)
        for key, value in source.items():
            client.set_model_version_tag(name, number, key, value)
        unwritten = bool(source) or not known.description
    else:
        with mlflow.start_run(run_id=run_id):
            if mode == "upload":
                for file in sorted(outputs.gguf.glob("*.gguf")):
                    client.log_artifact(run_id, str(file), "gguf")
                model_id = log_upload(name, outputs.merged, tags, card)
            elif mode == "serving":
                model_id = log_serving(name, outputs.ollama / "Modelfile", tags)
            else:
                model_id = log_reference(tags)
        number = str(mlflow.register_model(f"models:/{model_id}", name, tags={**tags, MODE_TAG: mode}).version)
        unwritten = True
    client.set_registered_model_alias(name, ALIAS, number)
    return number, unwritten


def write_pages(client: Any, name: str, number: str, description: str, model_description: str) -> None:
    """Describe a version, its run, and the registered model unless a person has written something else there."""
    client.update_model_version(name, number, description)
    client.set_tag(client.get_model_version(name, number).run_id, "mlflow.note.content", description)
    present = client.get_registered_model(name).description
    if not present or present.startswith(model_head(name)):
        client.update_registered_model(name, model_description)


def ask_registered(name: str, question: str) -> str:
    """The greedy answer of a registered version (`name@alias`, `name/number` or a models:/ URI) to one question."""
    again = f'python -m finetune.tracking ask {name} "question"'
    connect(PATIENT, again)
    with refusals(again):
        model = mlflow.pyfunc.load_model(name if name.startswith("models:/") else f"models:/{name}")
        answer = model.predict({"messages": [{"role": "user", "content": question}]})
    return str(answer[0]["choices"][0]["message"]["content"])
