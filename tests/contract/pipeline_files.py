"""What the contract tests read: dvc.yaml, and the modules of this package that a stage reaches by import."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

# Modules that cannot change a result: messages, and params, whose values DVC tracks by themselves.
EXEMPT = {
    "finetune",
    "finetune.errors",
    "finetune.log",
    "finetune.params",
    "finetune.sections",
    "finetune.data_sections",
    # MLflow mirrors results and makes none.
    "finetune.tracking",
    "finetune.lineage",
    "finetune.stages._main",
    "finetune.data",
    "finetune.training",
    "finetune.evaluation",
    "finetune.export",
}


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
    """The files of this package that decide a stage's result, as paths from the repository root."""
    modules = import_closure(f"finetune.stages.{stage}") - EXEMPT
    files = [module_file(name) for name in modules]
    return sorted(file.relative_to(ROOT).as_posix() for file in files if file)
