"""training figures, stage outputs -> MLflow runs and registered versions; the only module that imports mlflow.

The pipeline's files are the truth: MLflow may be down while a model trains, and `make register` fills it from them.
"""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

# Read while mlflow is imported. Its check of requirements asks pip, which fails offline.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING"] = "false"
os.environ["MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from finetune.errors import FinetuneError, TrackingError
from finetune.lineage import DatasetFacts, artifact_folder, first_line, new_source, run_params, shown_uri, tracking_uri
from finetune.log import logger, setup_logging
from finetune.params import load_params
from finetune.runtime import pin_cpu_code_path
from finetune.sections import Register

# With mlflow's own limits (7 retries, growing pauses) a dead server holds each call for four minutes.
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
FAULTS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)
ADAPTER_TAG, CONTENT_TAG, MODE_TAG = "adapter_sha256", "content_sha256", "registry_mode"
ALIAS = "challenger"
MAX_DIGEST_CHARACTERS = 36
MAX_BATCH = {"metrics": 1000, "params": 100}
RUN_NAME = "train_qlora"
# The chat template writes the first token itself; the tokenizer must not add a second one.
CHAT_PIPELINE = {"add_special_tokens": False, "do_sample": False, "max_new_tokens": 128}
MAX_BLOCKED_S, SLOW_CALL_S = 10.0, 1.0


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what MLflow, its database or the network raise into one TrackingError with its remedy."""
    try:
        yield
    except FAULTS as fault:
        remedy = "start the server (`make mlflow`) or `unset MLFLOW_TRACKING_URI`, then `make register`"
        if isinstance(fault, ImportError):
            remedy = f"`{sys.executable} -m pip install {fault.name or 'PACKAGE'}` (the driver), then `make register`"
        raise TrackingError(f"MLflow failed: {first_line(fault)}", shown_uri(), remedy) from fault


def connect(limits: Mapping[str, str]) -> Any:
    """A client whose store has answered once; TrackingError after 10 s at most. Later calls keep to `limits`."""
    os.environ.update(QUICK)
    uri = tracking_uri()
    with refusals():
        if uri.startswith("sqlite:///"):
            # mlflow itself would try for 100 s to open a file in a folder that cannot be written.
            file = Path(uri.removeprefix("sqlite:///"))
            file.parent.mkdir(parents=True, exist_ok=True)
            sqlite3.connect(file).close()
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    os.environ.update(limits)
    return client


def _experiment_id(client: Any, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifact_folder()))


def _log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    _log_batches(client, run_id, "params", [Param(key, value) for key, value in sorted(params.items())])


def _log_metrics(client: Any, run_id: str, points: Sequence[tuple[int, str, float]]) -> None:
    now_ms = round(time.time() * 1000)
    _log_batches(client, run_id, "metrics", [Metric(key, value, now_ms, step) for step, key, value in points])


def _log_batches(client: Any, run_id: str, kind: str, entries: Sequence[Any]) -> None:
    for first in range(0, len(entries), MAX_BATCH[kind]):
        client.log_batch(run_id, **{kind: entries[first : first + MAX_BATCH[kind]]})


class TrainingMirror:
    """A live copy of a training's figures in MLflow, that can neither stop the training nor hold it up.

    Use it in a `with` block: `log` copies figures, `finish` names the result. The run ends FINISHED, FAILED on an
    exception, or KILLED on Ctrl-C, SystemExit and SIGTERM. When MLflow does not answer, one warning says so and only
    the end of the run is tried again; all waiting together stays near MAX_BLOCKED_S. `params_file` names the
    experiment and the params to record.
    """

    def __init__(self, params_file: Path = Path("params.yaml")) -> None:
        self.params_file, self.run_id, self.up = params_file, "", True
        self._client: Any = None
        self._blocked_s = 0.0
        self._adapter_sha256: str | None = None
        self._own_handler = self._warned = False

    def __enter__(self) -> Self:
        """Open the run, if MLflow answers."""
        # Without a handler SIGTERM ends the process at once, and the run would show as running for ever.
        self._own_handler = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._own_handler:
            signal.signal(signal.SIGTERM, _exit_on_sigterm)
        self._attempt(self._open, slow_s=math.inf)
        return self

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Copy the figures of one optimizer step."""
        points = [(step, key, value) for key, value in sorted(figures.items())]
        self._attempt(lambda: _log_metrics(self._client, self.run_id, points))

    def finish(self, adapter_sha256: str) -> None:
        """Name what was trained: `sha256_tree` of the adapter's folder, by which `register` finds the run."""
        self._adapter_sha256 = adapter_sha256

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run; the exception goes on."""
        if self._own_handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        # A server that refused quickly may be back by now; one that hung has used up its time.
        self.up = self.up or (self.run_id != "" and self._blocked_s < MAX_BLOCKED_S / 3)
        self._attempt(lambda: self._close(status))

    def _open(self) -> None:
        params = load_params(self.params_file)
        self._client = connect(QUICK)
        experiment_id = _experiment_id(self._client, params.registration.experiment)
        self.run_id = str(self._client.create_run(experiment_id, run_name=RUN_NAME).info.run_id)
        _log_params(self._client, self.run_id, run_params(params))

    def _close(self, status: str) -> None:
        if self._adapter_sha256 is not None:
            self._client.set_tag(self.run_id, ADAPTER_TAG, self._adapter_sha256)
        self._client.set_terminated(self.run_id, status)

    def _attempt(self, call: Callable[[], None], slow_s: float = SLOW_CALL_S) -> None:
        if not self.up:
            return
        started_s, reason = time.monotonic(), ""
        try:
            call()
        except (*FAULTS, FinetuneError) as fault:
            reason = first_line(fault)
        elapsed_s = time.monotonic() - started_s
        self._blocked_s += elapsed_s if reason or elapsed_s > slow_s else 0.0
        self.up = not reason and self._blocked_s < MAX_BLOCKED_S
        if not self.up and not self._warned:
            self._warned = True
            message = "MLflow at %s fails or is slow (%s): training goes on, `make register` copies the curves later"
            logger.warning(message, shown_uri(), reason or f"{self._blocked_s:.0f} s of waiting")


def _exit_on_sigterm(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def find_or_create_run(client: Any, experiment: str, adapter_sha256: str, params: Mapping[str, str]) -> str:
    """The newest finished run that trained this adapter under these `params`, completed by them, or a new one."""
    experiment_id = _experiment_id(client, experiment)
    condition = f"tags.{ADAPTER_TAG} = '{adapter_sha256}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment_id], condition, order_by=["attributes.start_time DESC"]):
        logged = run.data.params
        # mlflow refuses a second value for a param: a run with another value is of other settings.
        if all(logged[key] == value for key, value in params.items() if key in logged):
            _log_params(client, run.info.run_id, {key: params[key] for key in params.keys() - logged.keys()})
            return str(run.info.run_id)
    run_id = str(client.create_run(experiment_id, run_name=RUN_NAME, tags={ADAPTER_TAG: adapter_sha256}).info.run_id)
    _log_params(client, run_id, params)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def ensure_curves(client: Any, run_id: str, curves: Mapping[int, Mapping[str, float]]) -> int:
    """Log those points of `curves` ({step: {figure: value}}) that the run lacks; returns how many these were."""
    points = [(step, name, value) for step, figures in sorted(curves.items()) for name, value in figures.items()]
    names = {name for _, name, _ in points}
    known = {(entry.step, name) for name in names for entry in client.get_metric_history(run_id, name)}
    missing = [point for point in points if point[:2] not in known]
    _log_metrics(client, run_id, missing)
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
    _log_metrics(client, run_id, changed)
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


def main() -> None:
    """Print the answer of a registered version to one question."""
    setup_logging("tracking")
    pin_cpu_code_path()
    if len(sys.argv) != 4 or sys.argv[1] != "ask":
        raise SystemExit('usage: python -m finetune.tracking ask models:/name@alias "question"')
    try:
        sys.stdout.write(ask_registered(*sys.argv[2:]) + "\n")
    except TrackingError as error:
        raise SystemExit(f"TrackingError: {error}") from None


if __name__ == "__main__":
    main()
