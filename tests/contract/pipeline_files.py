"""What the contract tests read: dvc.yaml, and the modules of this package that a stage reaches by import."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

TRACKING_PARTS = ("client", "gate", "logged_model", "mirror", "promotion", "registry", "sender", "tail", "versions")
TRACKING = {"finetune.tracking", *(f"finetune.tracking.{name}" for name in TRACKING_PARTS)}
# Modules that cannot change a result: messages, and params, whose values DVC tracks by themselves.
EXEMPT = {
    "finetune",
    "finetune.errors",
    "finetune.log",
    "finetune.params",
    "finetune.sections",
    "finetune.data_sections",
    "finetune.mix_sections",
    "finetune.source_sections",
    "finetune.training_sections",
    # MLflow mirrors results and makes none, but for the stage that registers them.
    *TRACKING,
    "finetune.lineage",
    # What is read from a registry is judged, and no out is made of it.
    "finetune.transfer",
    "finetune.transfer.limits",
    # What the machine was and did while it trained.
    "finetune.hardware",
    "finetune.machine_card",
    "finetune.telemetry",
    "finetune.stages._main",
    "finetune.data",
    "finetune.training",
    "finetune.evaluation",
    "finetune.export",
}
MIRROR = {*TRACKING, "finetune.lineage"}
# Runs llama.cpp's converter, which comes out of the source archive.
CONVERTER = SOURCE / "finetune/export/converter.py"
PIN_FILES = ("data", "train", "export", "pipeline")
# Progress bars.
SHOWING = {"tqdm"}
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def stages() -> dict[str, Any]:
    """The stages of dvc.yaml in their order."""
    content: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    return dict(content["stages"])


def module_file(module: str) -> Path | None:
    """The file of a module of this package, or None for any other name."""
    path = SOURCE.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if module.split(".")[0] == "finetune" and candidate.is_file():
            return candidate
    return None


def imported(file: Path) -> set[str]:
    """Every module of this package that a file imports, at any depth, with the packages above it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    with_packages = {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)}
    return {name for name in with_packages if module_file(name)}


def import_closure(module: str) -> set[str]:
    """All modules of this package that a module reaches, itself and its packages included."""
    pending = {module, *(".".join(module.split(".")[:end]) for end in range(1, module.count(".") + 1))}
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        file = module_file(name)
        if file is None or name in reached:
            continue
        reached.add(name)
        pending |= imported(file) - reached
    return reached


def code_deps(stage: str) -> list[str]:
    """The files of this package that decide a stage's result, as paths from the repository root.

    A package reached by import counts with what lies beside its `__init__.py`, such as Go sources.
    """
    files = reached_files(stage, EXEMPT)
    for folder in [file.parent for file in files if file.name == "__init__.py"]:
        files |= {file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def reached_files(stage: str, exempt: set[str]) -> set[Path]:
    """The files of all modules of this package that a stage reaches by import, without `exempt` ones."""
    files = (module_file(name) for name in import_closure(f"finetune.stages.{stage}") - exempt)
    return {file for file in files if file}


def pin_deps(stage: str) -> list[str]:
    """The files of requirements/ that pin what the code of a stage imports, or runs as a program."""
    files = reached_files(stage, EXEMPT - MIRROR if stage == "register" else EXEMPT)
    libraries = {name for file in files for name in first_names(file)} - SHOWING
    distributions = {canonicalize_name(found) for name in libraries for found in DISTRIBUTIONS.get(name, [])}
    needed = {name for name in PIN_FILES if distributions & pinned(name)}
    if "llama-cpp-python" in distributions:
        needed |= {"llama-sdist", "llama-build"}
    if CONVERTER in files:
        needed.add("llama-sdist")
    return sorted(f"requirements/{name}.txt" for name in needed)


def first_names(file: Path) -> set[str]:
    """The first names of all modules that a file imports, whoever they belong to."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def pinned(name: str) -> set[str]:
    """The distributions that a file of requirements/ names."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
