"""stage outputs -> the run of an adapter, completed; a registered version, and its answer to a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

from finetune.lineage import DatasetFacts, new_source
from finetune.sections import Register
from finetune.tracking.client import PATIENT, connect, find_experiment, log_now, log_params, refusals
from finetune.tracking.mirror import RUN_NAME

ADAPTER_TAG, CONTENT_TAG, MODE_TAG = "adapter_sha256", "content_sha256", "registry_mode"
ALIAS = "challenger"
MAX_DIGEST_CHARACTERS = 36
# The chat template writes the first token itself; the tokenizer must not add a second one.
CHAT_PIPELINE = {"add_special_tokens": False, "do_sample": False, "max_new_tokens": 128}


def find_or_create_run(client: Any, experiment: str, adapter_sha256: str, params: Mapping[str, str]) -> str:
    """The newest finished run that trained this adapter under these `params`, completed by them, or a new one."""
    experiment_id = find_experiment(client, experiment)
    condition = f"tags.{ADAPTER_TAG} = '{adapter_sha256}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment_id], condition, order_by=["attributes.start_time DESC"]):
        logged = run.data.params
        # mlflow refuses a second value for a param: a run with another value is of other settings.
        if all(logged[key] == value for key, value in params.items() if key in logged):
            log_params(client, run.info.run_id, {key: params[key] for key in params.keys() - logged.keys()})
            return str(run.info.run_id)
    run_id = str(client.create_run(experiment_id, run_name=RUN_NAME, tags={ADAPTER_TAG: adapter_sha256}).info.run_id)
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


def log_outputs(
    client: Any,
    run_id: str,
    *,
    metrics: Mapping[str, float],
    datasets: Sequence[DatasetFacts],
    artifacts: Mapping[Path, str],
    texts: Mapping[str, str],
    tags: Mapping[str, str],
) -> None:
    """Log stage metrics that changed, dataset inputs, artifacts ({file: folder}), texts ({path: content}) and tags."""
    logged = client.get_run(run_id).data.metrics
    changed = [(0, key, value) for key, value in sorted(metrics.items()) if logged.get(key) != value]
    log_now(client, run_id, changed)
    client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])
    for path, folder in artifacts.items():
        client.log_artifact(run_id, str(path), folder or None)
    for place, text in texts.items():
        client.log_text(run_id, text, place)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in sorted(tags.items())])


def _dataset_input(facts: DatasetFacts) -> Any:
    digest = facts.sha256[:MAX_DIGEST_CHARACTERS]
    dataset = Dataset(facts.name, digest, source_type="finetune", source=facts.source, profile=facts.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def register_version(
    client: Any, run_id: str, register: Register, merged: Path, tags: Mapping[str, str], description: str, card: str
) -> str:
    """Number of this content's version, made now or known (then with `new_source`), as ALIAS; `card`: its README.md."""
    name, mode = register.model_name, register.mode
    condition = f"name = '{name}' and tags.{CONTENT_TAG} = '{tags[CONTENT_TAG]}' and tags.{MODE_TAG} = '{mode}'"
    found = sorted((int(entry.version) for entry in client.search_model_versions(condition)), reverse=True)
    if found:
        number = str(found[0])
        if source := new_source(client.get_model_version(name, number).tags, tags):
            for key, value in source.items():
                client.set_model_version_tag(name, number, key, value)
            client.update_model_version(name, number, description)
    else:
        with mlflow.start_run(run_id=run_id):
            if mode == "upload":
                model_id = _upload(name, merged, tags, card)
            else:
                model_id = mlflow.create_external_model("merged", model_type="llm", tags=dict(tags)).model_id
        entry = mlflow.register_model(f"models:/{model_id}", name, tags={**tags, MODE_TAG: mode})
        number = str(entry.version)
        client.update_model_version(name, number, description)
    client.set_registered_model_alias(name, ALIAS, number)
    return number


def _upload(model_name: str, merged: Path, tags: Mapping[str, str], card: str) -> str:
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", local_files_only=True)
    # mlflow looks this name up on the Hub and stores it: no path of this machine, and no name the Hub could have.
    model.name_or_path = f"{model_name}@{tags[CONTENT_TAG][:12]}"
    requirements = [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "transformers")]
    logged = mlflow.transformers.log_model(
        {"model": model, "tokenizer": AutoTokenizer.from_pretrained(merged, local_files_only=True)},
        name="merged",
        task="llm/v1/chat",
        pip_requirements=requirements,
        model_config=CHAT_PIPELINE,
        model_card=ModelCard(card),
    )
    return str(logged.model_id)


def ask_registered(name: str, question: str) -> str:
    """The greedy answer of a registered version (`name@alias`, `name/number` or a models:/ URI) to one question."""
    connect(PATIENT)
    with refusals():
        model = mlflow.pyfunc.load_model(name if name.startswith("models:/") else f"models:/{name}")
        answer = model.predict({"messages": [{"role": "user", "content": question}]})
    return str(answer[0]["choices"][0]["message"]["content"])
