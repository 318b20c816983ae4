from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from huggingface_hub import ModelCard
from run_files import metrics, register_argv, write_run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finetune.errors import DataError, TrackingError
from finetune.io import read_json, sha256_file, sha256_tree, write_json, write_text
from finetune.params import load_params
from finetune.run_report.facts import RUN_CARD_FILE
from finetune.stages import register as stage
from finetune.tracking.client import QUICK, connect, find_experiment
from finetune.tracking.registry import ADAPTER_TAG, ask_registered

WORDS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", *"abcdefghijklmnopqrstuvwx"]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
QUESTION = "a b c"


def save_merged(folder: Path, base: Path) -> None:
    shutil.copytree(base, folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As many Hub tokenizers do: special tokens asked for put a second <s> before the template's own.
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIALS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_outputs(root: Path, base: Path) -> list[Path]:
    """A finished pipeline below `root`; returns the stage's argv."""
    save_merged(root / "models/merged", base)
    shutil.copytree(base, root / "models/base")
    write_run(root, metrics())
    card = read_json(root / RUN_CARD_FILE)
    card["sha256"]["adapter"] = sha256_tree(root / "models/adapter")
    write_json(root / RUN_CARD_FILE, card)
    return register_argv(root)


def register(argv: list[Path], **changes: str) -> dict[str, str]:
    settings = load_params(argv[4]).registration
    stage.run(*argv, register=settings.model_copy(update=changes))
    return dict(read_json(argv[5]))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, untied_base: Path) -> Iterator[list[Path]]:
    """A finished pipeline, trained under the mirror, in a folder with a blank, registered twice."""
    root = tmp_path_factory.mktemp("a clone")
    argv = make_outputs(root, untied_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("FINETUNE_IMAGE", "image@sha256:12")
        # What the mirror leaves of a training that lost its MLflow after the first step.
        client = connect(QUICK)
        run_id = client.create_run(
            find_experiment(client, "finetune"), tags={ADAPTER_TAG: sha256_tree(argv[0])}
        ).info.run_id
        for name in ("train_loss", "learning_rate", "gradient_norm", "trained_tokens"):
            client.log_metric(run_id, name, 4.0, step=1)
        client.set_terminated(run_id, "FINISHED")
        first = register(argv)
        assert register(argv) == first
        yield argv


def only_version() -> Any:
    versions = mlflow.MlflowClient().search_model_versions("name = 'finetune-smoke'")
    assert len(versions) == 1
    return versions[0]


def test_registering_twice_makes_one_version_under_the_alias(outputs: list[Path]) -> None:
    version = mlflow.MlflowClient().get_model_version_by_alias("finetune-smoke", "challenger")
    assert str(version.version) == str(only_version().version) == "1"
    registered = read_json(outputs[5])
    assert registered == {
        "alias": "challenger",
        "content_sha256": version.tags["content_sha256"],
        "model_name": "finetune-smoke",
    }


def test_the_version_names_what_it_was_made_of(outputs: list[Path]) -> None:
    tags = only_version().tags
    assert tags["adapter_sha256"] == sha256_tree(outputs[0])
    assert tags["merged_sha256"] == sha256_tree(outputs[1])
    assert (tags["recipe"], tags["licenses"], tags["base.kind"]) == ("smoke", '["CC-BY-4.0", "MIT"]', "scratch")
    assert (tags["git.commit"], tags["container_image"]) == ("none", "image@sha256:12")
    assert tags["package.mlflow"] == mlflow.__version__
    assert tags["served_gguf"] == "model-Q8_0.gguf"
    assert tags["served_gguf_sha256"] == sha256_file(outputs[2] / "model-Q8_0.gguf")
    assert tags["modelfile_sha256"] == sha256_file(outputs[3] / "Modelfile")
    description = only_version().description
    cells = [" ".join(line.split()) for line in description.splitlines()]
    assert "| all test rows (2,080 tokens) | 65.65 → 29.85 | × 0.4546 (0.4313 to 0.4781) | 1.23" in "\n".join(cells)
    assert "Licences: CC-BY-4.0, MIT." in description


def test_the_run_holds_the_page_and_the_uploaded_model_the_card(outputs: list[Path]) -> None:
    run_id = only_version().run_id
    page = mlflow.artifacts.load_text(f"runs:/{run_id}/report/run.html")
    assert "QLoRA (base in NF4 with double quantisation" in page
    assert '<a href="index.html">the data page</a>' in page
    card = mlflow.artifacts.load_text(f"runs:/{run_id}/report/README.md")
    assert ModelCard(card).data.to_dict()["license_name"] == "of-base-and-data"
    assert "# finetune-smoke" in card
    # mlflow keeps the text and the head of the card in two files of the model.
    (text,) = (outputs[4].parent / "mlartifacts").rglob("model_card.md")
    assert text.read_text(encoding="utf-8").strip() == ModelCard(card).text.strip()
    (head,) = (outputs[4].parent / "mlartifacts").rglob("model_card_data.yaml")
    assert "license_name: of-base-and-data\n" in head.read_text(encoding="utf-8")


def test_the_pages_of_model_version_and_run_are_written_and_a_persons_text_stays(outputs: list[Path]) -> None:
    client = mlflow.MlflowClient()
    assert client.get_registered_model("finetune-smoke").description.startswith("**finetune-smoke** is fine-tuned")
    description = only_version().description
    assert client.get_run(only_version().run_id).data.tags["mlflow.note.content"] == description
    for told in ("There was no champion when this version was registered.", "make pull NAME=finetune-smoke/1"):
        assert told in description
    # Written once: a version that never got its page, as of a register that was killed, gets it now.
    client.update_registered_model("finetune-smoke", "Ours.")
    client.update_model_version("finetune-smoke", "1", "")
    register(outputs)
    assert only_version().description == description
    assert client.get_registered_model("finetune-smoke").description == "Ours."


def test_the_trained_run_is_completed_not_doubled(outputs: list[Path]) -> None:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("finetune")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train_loss")]
    assert sorted(steps) == [1, 2, 3, 4]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation_loss")] == [2, 4]
    assert run.data.metrics["clean.dropped.retweet"] == 100.0
    assert run.data.metrics["evaluate.tasks.tool_calls.simple.tuned.correct"] == 0.625
    assert run.data.params["train_qlora.lora.rank"] == "32"
    assert run.data.params["fetch.sources.0.name"] == "chat_fr"
    datasets = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert sorted((dataset.name, len(dataset.digest)) for dataset in datasets) == [("chat", 36), ("tweets", 36)]
    names = {
        entry.path
        for folder in ("", "evaluation", "gguf", "metrics", "ollama", "plots", "quantization", "report")
        for entry in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"samples.jsonl", "dvc.lock", "dvc.yaml", "params.yaml", "ollama/Modelfile", "plots/train_log.csv"} <= names
    assert "run_card.json" in names
    assert {"evaluation/test_scores.csv", "metrics/quantize_gguf.json", "gguf/model-Q8_0.gguf"} <= names
    assert "Test GPU" in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report/run.html")
    assert {"report/index.html", "report/run.html", "report/README.md", "quantization/samples.jsonl"} <= names


def test_the_registry_answers_as_the_merged_model_does(outputs: list[Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(outputs[1], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(outputs[1])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert prompt["input_ids"].tolist() == [[1, 3, 5, 6, 7, 4]]
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=128)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.strip()
    assert ask_registered("finetune-smoke@challenger", QUESTION) == expected


def test_nothing_of_this_machine_is_uploaded(outputs: list[Path]) -> None:
    root = outputs[4].parent
    texts = [file.read_text() for file in (root / "mlartifacts").rglob("MLmodel")]
    assert len(texts) == 1
    assert str(root / "models") not in texts[0]


def test_reference_mode_registers_hashes_without_the_weights(
    outputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    register(outputs, model_name="referred", mode="reference")
    register(outputs, model_name="referred", mode="reference")
    versions = mlflow.MlflowClient().search_model_versions("name = 'referred'")
    assert len(versions) == 1
    assert versions[0].tags["merged_sha256"] == sha256_tree(outputs[1])
    with pytest.raises(TrackingError, match="MLflow failed"):
        ask_registered("referred@challenger", QUESTION)
    # mlflow puts what belongs to no run into ./mlruns.
    assert list(tmp_path.iterdir()) == []


def test_other_params_for_the_same_adapter_get_a_run_of_their_own(outputs: list[Path], tmp_path: Path) -> None:
    changed = tmp_path / "params.yaml"
    write_text(changed, outputs[4].read_text().replace("max_new_tokens: 48", "max_new_tokens: 50"))
    register(
        [*outputs[:4], changed, tmp_path / "registered.json", *outputs[6:]], model_name="referred", mode="reference"
    )
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("finetune").experiment_id])
    assert sorted(run.data.params["evaluate.max_new_tokens"] for run in runs) == ["48", "50"]
    assert {len(client.get_metric_history(run.info.run_id, "train_loss")) for run in runs} == {4}


def test_the_card_of_another_adapter_is_not_uploaded(outputs: list[Path], tmp_path: Path) -> None:
    root = outputs[4].parent
    card = read_json(root / RUN_CARD_FILE)
    write_json(root / RUN_CARD_FILE, {**card, "sha256": {"adapter": "0" * 64}})
    changed = tmp_path / "params.yaml"
    write_text(changed, outputs[4].read_text().replace("max_new_tokens: 48", "max_new_tokens: 51"))
    argv = [*outputs[:4], changed, tmp_path / "registered.json", *outputs[6:]]
    register(argv, model_name="referred", mode="reference")
    write_json(root / RUN_CARD_FILE, card)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("finetune").experiment_id
    (run,) = client.search_runs([experiment], "params.`evaluate.max_new_tokens` = '51'")
    assert "run_card.json" not in {entry.path for entry in client.list_artifacts(run.info.run_id)}


def test_changed_content_is_a_second_version(outputs: list[Path], tmp_path: Path) -> None:
    gguf = tmp_path / "gguf"
    write_text(gguf / "model-Q8_0.gguf", "other")
    argv = [*outputs[:2], gguf, *outputs[3:5], tmp_path / "registered.json", *outputs[6:]]
    register(outputs, model_name="changing", mode="reference")
    register(argv, model_name="changing", mode="reference")
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("changing", "challenger")
    assert str(version.version) == "2"
    # Each is judged by the figures of its own run: those of the first are not written over.
    assert version.run_id != client.get_model_version("changing", "1").run_id
    assert client.get_run(version.run_id).data.tags["gguf_sha256"] == version.tags["gguf_sha256"]


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_a_version_from_changed_files_gets_the_clean_commit_and_keeps_it(
    outputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(outputs[4].parent, tmp_path / "clone"))
    argv = [root / path.relative_to(outputs[4].parent) for path in outputs]
    monkeypatch.setenv("DVC_ROOT", str(root))
    git(root, "init", "-q")
    write_text(root / ".gitignore", "*\n!code.py\n")
    write_text(root / "code.py", "1\n")
    seen = []
    for commands in ((), (("add", "."), ("commit", "-qm", "x")), ()):
        for command in commands:
            git(root, *command)
        register(argv, model_name="sourced", mode="reference")
        version = mlflow.MlflowClient().get_model_version_by_alias("sourced", "challenger")
        seen.append((str(version.version), version.tags["git.dirty"], "no command" in version.description))
        write_text(root / "code.py", f"{len(seen)}\n")
    assert seen == [("1", "true", True), ("1", "false", False), ("1", "false", False)]
    assert len(version.tags["git.commit"]) == 40
    assert version.tags["git.commit"] in version.description


def test_a_missing_figure_names_its_stage(outputs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    shutil.copytree(outputs[9], folder)
    write_json(folder / "evaluate.json", {**metrics()["evaluate"], "tuned": {"tokens": 1}})
    with pytest.raises(DataError, match=r"tuned\.perplexity is missing(.|\n)*--single-item evaluate"):
        register([*outputs[:9], folder, *outputs[10:]])


def test_an_unreachable_server_is_an_error_within_seconds(outputs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    started_s = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLflow failed(.|\n)*make register"):
        register(outputs)
    assert time.monotonic() - started_s < 12
