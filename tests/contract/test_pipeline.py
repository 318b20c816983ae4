"""dvc.yaml, the stage modules and params.yaml say the same."""

from __future__ import annotations

import ast
import shlex
from typing import Any

import pytest
from pipeline_files import ROOT, SOURCE, code_deps, import_closure, module_file, pin_deps, stages

NAMES = [
    "fetch",
    "clean",
    "tokenizer",
    "base",
    "tokenize",
    "split",
    "train_qlora",
    "evaluate",
    "merge",
    "quantize_gguf",
    "ollama_modelfile",
    "register",
]
SHARED = {"recipe", "seed", "cpu_threads"}
LAYERS = {"data", "training", "evaluation", "export"}
LIGHT = ["finetune.params", "finetune.recipes", "finetune.export.modelfile", "finetune.export.template"]
HEAVY = {"torch", "transformers", "mlflow", "peft", "trl"}


def paths(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def declared_params(stage: str) -> tuple[str, ...]:
    tree = ast.parse((SOURCE / f"finetune/stages/{stage}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PARAMS":
            value: tuple[str, ...] = ast.literal_eval(node.value)
            return value
    raise AssertionError(f"{stage} declares no PARAMS")


def test_the_stages_are_the_twelve_in_order() -> None:
    assert list(stages()) == NAMES


@pytest.mark.parametrize("stage", NAMES)
def test_stage_module_block_and_metrics_have_one_name(stage: str) -> None:
    entry = stages()[stage]
    assert f"-m finetune.stages.{stage} " in entry["cmd"]
    assert entry["desc"]
    assert stage in entry["params"]
    assert (SOURCE / f"finetune/stages/{stage}.py").is_file()
    assert stage == "register" or paths(entry["metrics"]) == [f"metrics/{stage}.json"]


@pytest.mark.parametrize("stage", NAMES)
def test_stage_reads_the_params_that_it_declares(stage: str) -> None:
    assert set(declared_params(stage)) == set(stages()[stage]["params"])


@pytest.mark.parametrize("stage", NAMES)
def test_code_and_pins_of_a_stage_are_its_deps(stage: str) -> None:
    deps = stages()[stage]["deps"]
    assert [dep for dep in deps if dep.startswith("src/")] == code_deps(stage)
    assert sorted(dep for dep in deps if dep.startswith("requirements/")) == pin_deps(stage)


def test_what_is_imported_or_run_names_its_pins() -> None:
    assert pin_deps("split") == ["requirements/data.txt"]
    assert pin_deps("train_qlora") == ["requirements/data.txt", "requirements/train.txt"]
    assert {"requirements/llama-build.txt", "requirements/llama-sdist.txt"} < set(pin_deps("quantize_gguf"))
    assert "requirements/pipeline.txt" in pin_deps("register")
    assert "src/finetune/export/gotemplate/main.go" in code_deps("ollama_modelfile")


@pytest.mark.parametrize("stage", NAMES)
def test_paths_of_the_command_are_deps_or_outs_and_conversely(stage: str) -> None:
    entry = stages()[stage]
    given = shlex.split(entry["cmd"])[3:]
    outs = paths(entry["outs"]) + paths(entry.get("metrics", [])) + paths(entry.get("plots", []))
    # These describe the run that register records: the lock is written while it runs.
    described = {"params.yaml", "dvc.lock", "dvc.yaml"} if stage == "register" else set()
    inputs = [dep for dep in entry["deps"] if not dep.startswith(("src/", "requirements/", "${"))]
    assert sorted(given) == sorted([*inputs, *outs, *described])


@pytest.mark.parametrize("stage", NAMES)
def test_stages_do_not_import_stages(stage: str) -> None:
    others = {f"finetune.stages.{name}" for name in NAMES if name != stage}
    assert not import_closure(f"finetune.stages.{stage}") & others


def package_modules() -> list[str]:
    files = (SOURCE / "finetune").rglob("*.py")
    return sorted(".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in files)


def imports_of(module: str) -> set[str]:
    file = module_file(module.removesuffix(".__init__"))
    assert file
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", [name for name in package_modules() if name.split(".")[1] in LAYERS])
def test_domain_packages_import_neither_each_other_nor_stages(module: str) -> None:
    own = module.split(".")[1]
    for name in imports_of(module):
        parts = name.split(".")
        if parts[0] == "finetune" and len(parts) > 1:
            assert parts[1] not in {
                "stages",
                "tracking",
                "lineage",
                "params",
                "recipes",
                "summary",
                "chat",
                "serving",
                "serve",
                "ollama",
                "origin",
                "run_report",
            }, name
            assert parts[1] not in LAYERS - {own} or name.startswith("finetune.data.record"), name


def test_only_tracking_imports_mlflow() -> None:
    assert [m for m in package_modules() if any(n.split(".")[0] == "mlflow" for n in imports_of(m))] == [
        "finetune.tracking.client",
        "finetune.tracking.logged_model",
        "finetune.tracking.registry",
        "finetune.tracking.serving_model",
    ]
    # A training starts the process that sends; it must not import mlflow itself.
    assert "finetune.tracking.client" not in import_closure("finetune.tracking.mirror")


@pytest.mark.parametrize("module", [*LIGHT, *(m for m in package_modules() if m.startswith("finetune.data."))])
def test_light_modules_reach_no_heavy_library(module: str) -> None:
    reached = {
        name.split(".")[0] for part in import_closure(module.removesuffix(".__init__")) for name in imports_of(part)
    }
    assert not reached & HEAVY


def test_every_out_is_ignored_by_git_and_every_metric_is_not() -> None:
    import subprocess

    outs = [path for entry in stages().values() for path in paths(entry["outs"])]
    kept = [
        path for entry in stages().values() for path in paths(entry.get("metrics", [])) + paths(entry.get("plots", []))
    ]
    for path, code in [(path, 0) for path in outs] + [(path, 1) for path in [*kept, "dvc.lock"]]:
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == code, path
