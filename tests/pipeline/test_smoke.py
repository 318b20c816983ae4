"""The smoke recipe from raw text to the registry, in clones, as a person runs it.

Covered: all stages run; a second run does nothing; a changed evaluate parameter leaves training alone; a training
parameter changed and changed back comes from the run cache; two clones under different conditions give equal bytes,
and those bytes are the committed ones; perplexities, quantisation losses, parity; chat and registry answer.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from clone import ROOT, clone, core_count, git, out_hashes, repro, run, stages_run, usable_cores

from finetune.data.cleaning.language import identify
from finetune.io import sha256_file

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = clone(tmp_path_factory.mktemp("one"))
    output = repro(folder, cores=usable_cores())
    assert core_count(output) == len(usable_cores())
    assert len(stages_run(output)) == 12
    return folder


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"metrics/{stage}.json").read_text(encoding="utf-8"))
    return content


def rebuild_commands(lineage: str) -> list[str]:
    _, _, commands = lineage.partition("make it again, and compare:\n")
    # Under `make test`, make says behind them that it leaves the folder.
    return [line.strip() for line in commands.splitlines() if line.startswith("    ")]


def change_params(folder: Path, old: str, new: str) -> None:
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / "params.yaml").write_text(text.replace(old, new), encoding="utf-8")


def test_the_committed_bytes_come_out_again(first: Path) -> None:
    assert out_hashes(first) == out_hashes(ROOT)
    assert git(first, "status", "--porcelain") == ""


def test_tuning_lowers_held_out_perplexity_by_three_tenths_at_least(first: Path) -> None:
    evaluated, quantised = metrics(first, "evaluate"), metrics(first, "quantize_gguf")
    assert evaluated["perplexity_ratio"] <= 0.7
    assert quantised["types"]["Q8_0"]["perplexity"] <= 0.7 * evaluated["base"]["perplexity"]
    assert 0.99 <= quantised["types"]["Q8_0"]["perplexity_ratio"] <= 1.01


def test_quantised_types_are_real(first: Path) -> None:
    types = metrics(first, "quantize_gguf")["types"]
    assert list(types) == ["F16", "Q4_K_M", "Q8_0"]
    assert set(types["Q8_0"]["tensor_types"]) == {"F32", "Q8_0"}
    assert set(types["Q4_K_M"]["tensor_types"]) == {"F32", "Q4_K", "Q6_K"}
    assert types["Q4_K_M"]["size_bytes"] < types["Q8_0"]["size_bytes"] < types["F16"]["size_bytes"]


def test_every_fixture_chat_is_served_as_it_was_trained(first: Path) -> None:
    assert metrics(first, "ollama_modelfile")["parity"] == 1.0
    assert metrics(first, "ollama_modelfile")["chats"] >= 20


def test_rows_are_accounted_for(first: Path) -> None:
    clean = metrics(first, "clean")
    lost = {name: sum(clean[name].values()) for name in ("dropped", "quarantined")}
    twice = clean["duplicates"] + clean["near_duplicates"]
    assert clean["rows_in"] == clean["kept"] + twice + lost["dropped"] + lost["quarantined"] == 848
    assert lost == {"dropped": 78, "quarantined": 11}
    assert (clean["duplicates"], clean["near_duplicates"]) == (21, 4)
    assert clean["dropped"]["contaminated_by_held_out"] == 46
    assert clean["repaired_texts"] == {"html_entities": 10, "mojibake": 8}


def test_a_second_run_does_nothing_and_leaves_git_clean(first: Path) -> None:
    assert stages_run(repro(first)) == []
    assert git(first, "status", "--porcelain") == ""


def test_the_summary_ends_with_the_command_to_type(first: Path) -> None:
    finished = run([sys.executable, "-m", "finetune.summary"], first)
    assert finished.returncode == 0, finished.stderr
    assert "ollama create finetune-smoke -f models/ollama/Modelfile" in finished.stdout


def test_the_model_answers_in_french_without_markers(first: Path) -> None:
    questions = "Bonjour, quels sont vos horaires ?\nPouvez-vous réparer mon vélo ?\nQuels sont vos tarifs ?\n/exit\n"
    # Under an outer make, its own English lines would be judged with the answers.
    command = ["make", "--no-print-directory", "--old-file", "setup", "chat"]
    finished = run(command, first, typed=questions)
    assert finished.returncode == 0, finished.stderr
    assert len([line for line in finished.stdout.splitlines() if len(line.split()) >= 3]) == 3
    assert "<|" not in finished.stdout
    language, confidence = identify(finished.stdout, ["fr", "en"])
    assert (language, confidence > 0.9) == ("fr", True), finished.stdout


def test_the_registered_version_answers(first: Path) -> None:
    registered = json.loads((first / "models/registered.json").read_text(encoding="utf-8"))
    assert registered["model_name"] == "finetune-smoke"
    address = "models:/finetune-smoke@challenger"
    finished = run(
        [sys.executable, "-m", "finetune.tracking", "ask", address, "Bonjour, quels sont vos horaires ?"], first
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()


def test_lineage_of_a_copied_file_names_the_commit_and_the_commands(first: Path, tmp_path: Path) -> None:
    copied = tmp_path / "found.gguf"
    copied.write_bytes((first / "models/gguf/model-Q8_0.gguf").read_bytes())
    commit = git(first, "log", "-1", "--format=%H", "--", "metrics/quantize_gguf.json").strip()
    finished = run(["make", "--old-file", "setup", "lineage", f"FILE={copied}"], first)
    assert finished.returncode == 0, finished.stderr
    assert f"commit      {commit}" in finished.stdout
    assert "tree        clean" in finished.stdout
    assert re.search(r"chat_fr +training +MIT +1 +60,225 +26314b0b1a4a", finished.stdout)
    assert "train_qlora.lora.rank                         32" in finished.stdout
    assert rebuild_commands(finished.stdout)[1:] == [
        "cd rebuilt",
        f"git checkout {commit}",
        "make repro",
        f'echo "{sha256_file(copied)}  models/gguf/model-Q8_0.gguf" | sha256sum --check',
    ]
    version = run(["make", "--old-file", "setup", "lineage", "VERSION=finetune-smoke@challenger"], first)
    assert version.returncode == 0, version.stderr
    assert git(first, "rev-parse", "HEAD").strip() in version.stdout


def test_the_run_has_its_page(first: Path) -> None:
    finished = run(["make", "--old-file", "setup", "report"], first)
    assert finished.returncode == 0, finished.stderr
    page = (first / "report/index.html").read_text(encoding="utf-8")
    assert "Run of the recipe smoke" in page
    assert "not measured on this machine" not in page


def test_plots_are_drawn(first: Path) -> None:
    finished = run([sys.executable, "-m", "dvc", "plots", "show"], first)
    assert finished.returncode == 0, finished.stderr
    page = (first / "dvc_plots/index.html").read_text(encoding="utf-8")
    for name in ("train_log", "funnel", "sources", "lengths", "mix", "perplexity", "perplexity_ratio", "quantization"):
        assert f"plots/{name}.csv" in page


def test_other_conditions_give_the_same_bytes(first: Path, tmp_path: Path) -> None:
    lineage = run(["make", "--old-file", "setup", "lineage", "FILE=models/gguf/model-Q8_0.gguf"], first)
    clone_it, _, check_out, _, compare = rebuild_commands(lineage.stdout)
    second = tmp_path / "a clone with spaces"
    git(tmp_path, *shlex.split(clone_it)[1:3], str(second))
    git(second, *shlex.split(check_out)[1:])
    environment = {"PYTHONHASHSEED": "12345", "TZ": "Asia/Kolkata", "LC_ALL": "C", "LANG": "C"}
    output = repro(second, cores=usable_cores()[:1], **environment)
    assert core_count(output) == 1
    assert len(stages_run(output)) == 12
    assert out_hashes(second) == out_hashes(first)
    assert run(["sh", "-c", compare], second).stdout == "models/gguf/model-Q8_0.gguf: OK\n"


def test_an_evaluate_parameter_leaves_training_alone(first: Path) -> None:
    change_params(first, "samples_per_source: 2", "samples_per_source: 1")
    assert stages_run(repro(first)) == ["evaluate", "quantize_gguf", "register"]
    change_params(first, "samples_per_source: 1", "samples_per_source: 2")
    repro(first)
    assert git(first, "status", "--porcelain") == ""


def test_a_training_parameter_changed_back_comes_from_the_run_cache(first: Path) -> None:
    change_params(first, "warmup_share: 0.05", "warmup_share: 0.1")
    assert stages_run(repro(first, "train_qlora")) == ["train_qlora"]
    change_params(first, "warmup_share: 0.1", "warmup_share: 0.05")
    output = repro(first)
    assert "Stage 'train_qlora' is cached - skipping run" in output
    assert stages_run(output) == []
    assert git(first, "status", "--porcelain") == ""


def test_the_commands_of_the_page_on_experiments(first: Path) -> None:
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
        git(first, "config", key, value)
    git(first, "branch", "--move", "main")
    shown = {}
    for command in commands:
        done = run([sys.executable, "-m", *shlex.split(command)], first)
        assert done.returncode == 0, command + done.stdout[-2000:] + done.stderr[-2000:]
        shown[command] = done.stdout
    assert stages_run(shown[commands[0]]) == ["quantize_gguf", "ollama_modelfile", "register"]
    assert [line for line in shown["dvc exp show --md --only-changed"].splitlines() if "imatrix-16" in line]
    assert "types.Q4_K_M.mean_kl" in shown["dvc exp diff --md"]
    assert "imatrix-16" in shown["dvc exp list"]
    git(first, "checkout", "--", ".")
    assert run([sys.executable, "-m", "dvc", "checkout"], first).returncode == 0
    assert git(first, "status", "--porcelain") == ""
    assert git(first, "branch", "--list", "tried-imatrix").strip() == "tried-imatrix"
