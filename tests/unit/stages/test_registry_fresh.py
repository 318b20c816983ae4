"""A new, empty MLflow server: `register` alone restores all that stages skipped by DVC's cache would have logged."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry_server import mlflow_server
from run_files import metrics, register_argv, write_run

from finetune.io import read_csv, write_text
from finetune.lineage import read_metrics
from finetune.params import load_params
from finetune.stages import register as stage
from finetune.tracking.client import PATIENT, connect
from finetune.tracking.promotion import promote


def test_register_fills_an_empty_server_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "clone"
    write_run(root, metrics())
    for name in ("base", "merged"):
        write_text(root / "models" / name / "model.bin", name)
    argv = register_argv(root)
    settings = load_params(argv[4]).registration.model_copy(update={"mode": "reference"})
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "server").mkdir()
    with mlflow_server(tmp_path / "server") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        stage.run(*argv, register=settings)
        client = connect(PATIENT)
        version = client.get_model_version_by_alias("finetune-smoke", "challenger")
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        logged = read_csv(root / "plots/train_log.csv")
        for column in ("train_loss", "validation_loss", "learning_rate", "gradient_norm", "trained_tokens"):
            points = {point.step: point.value for point in client.get_metric_history(version.run_id, column)}
            assert points == {int(row["step"]): float(row[column]) for row in logged if row[column]}
        assert {key: run.data.metrics[key] for key in read_metrics(root / "metrics")} == read_metrics(root / "metrics")
        assert run.data.params["train_qlora.epochs"] == "5"
        assert sorted(entry.dataset.name for entry in run.inputs.dataset_inputs) == ["chat", "tweets"]
        folders = ("", "evaluation", "metrics", "ollama", "plots", "quantization", "report")
        held = {file.path for folder in folders for file in client.list_artifacts(version.run_id, folder)}
        wanted = {"samples.jsonl", "params.yaml", "dvc.lock", "dvc.yaml", "ollama/Modelfile"}
        wanted |= {"evaluation/test_scores.csv", "metrics/evaluate.json", "plots/train_log.csv", "report/run.html"}
        assert wanted <= held
        assert version.description.startswith("×")
        # A new server has no champion: the version is judged as the first one, and nothing of it is lost.
        assert promote(client, "finetune-smoke").decision == "promoted"
        stage.run(*argv, register=settings)
        assert len(client.search_model_versions("name = 'finetune-smoke'")) == 1
        assert client.get_model_version_by_alias("finetune-smoke", "champion").description.startswith("Promoted on 20")
