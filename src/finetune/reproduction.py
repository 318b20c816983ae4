"""dvc.lock against the committed one -> which stage gave other bytes from equal inputs, and what differs here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

LOCK = "dvc.lock"
SHOWN_DIGITS = 12
CONSTRAINTS = Path("requirements/lock.txt")
# Written by scripts/setup_environment.py into the virtual environment.
COMPILERS = "llama-compilers.txt"
Stages = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ComparedOut:
    """An out of a stage, by its hash in two files dvc.lock; "" where one of them does not have it."""

    stage: str
    path: str
    recorded: str
    found: str

    @property
    def equal(self) -> bool:
        """Whether both have the same bytes."""
        return self.recorded == self.found


def committed_stages(root: Path) -> Stages | None:
    """The stages of the dvc.lock that git holds at HEAD, or None outside git or before the first lock."""
    command = ["git", "show", f"HEAD:{LOCK}"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return read_stages(found.stdout) if found.returncode == 0 else None


def unreproduced(committed: Stages, present: Stages) -> dict[str, list[str]]:
    """Stage -> outs with other bytes, for stages that had the committed command, parameters and inputs.

    A stage that follows such a one has other inputs, so only the places where bytes first part are named.
    """
    parted = {}
    for name, stage in present.items():
        before = committed.get(name)
        if before is None or any(stage.get(key) != before.get(key) for key in ("cmd", "params", "deps")):
            continue
        hashes = {out["path"]: out["md5"] for out in before["outs"]}
        if paths := [out["path"] for out in stage["outs"] if hashes.get(out["path"]) != out["md5"]]:
            parted[name] = paths
    return parted


def compare_outs(recorded: Stages, present: Stages) -> list[ComparedOut]:
    """Every out that either of the two names, in the order of the first."""
    compared = []
    for name in [*recorded, *(name for name in present if name not in recorded)]:
        before, after = (
            {out["path"]: out["md5"] for out in stages.get(name, {}).get("outs", [])} for stages in (recorded, present)
        )
        paths = [*before, *(path for path in after if path not in before)]
        compared += [ComparedOut(name, path, before.get(path, ""), after.get(path, "")) for path in paths]
    return compared


def comparison_table(compared: Sequence[ComparedOut], taken: Sequence[str]) -> list[str]:
    """One line for each out; those of the stages in `taken` were not computed, so that they prove nothing."""
    rows: list[tuple[str, ...]] = [("stage", "out", "recorded", "rebuilt", "")]
    for out in compared:
        verdict = "DIFFERENT" if not out.equal else "taken from the cache" if out.stage in taken else "equal"
        hashes = (digest[:SHOWN_DIGITS] or "none" for digest in (out.recorded, out.found))
        rows.append((out.stage, out.path, *hashes, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]


def explain(root: Path) -> str:
    """Lines for a person: nothing where no committed lock exists, a confirmation, or the difference and its causes."""
    committed = committed_stages(root)
    if committed is None:
        return ""
    present = read_stages((root / LOCK).read_text(encoding="utf-8"))
    parted = unreproduced(committed, present)
    if not parted:
        same = sum(committed.get(name, {}).get("outs") == stage["outs"] for name, stage in present.items())
        others = "" if same == len(present) else "; the others had other inputs, or are not in the committed lock"
        return f"reproduced: {same} of {len(present)} stages gave the committed bytes{others}\n"
    lines = [
        f"not reproduced: {name} had the committed inputs and gave other bytes: {', '.join(parted[name])}"
        for name in parted
    ]
    return "\n".join([*lines, *machine_facts(root), "see `Bit-exact` in README.md; `git diff metrics` shows how far\n"])


def machine_facts(root: Path) -> list[str]:
    """What can make bytes differ: processor, its instruction set, a GPU, compilers, versions other than the lock's."""
    processor, flags = read_processor()
    facts = [f"  processor: {processor}, {'with' if 'avx2' in flags else 'WITHOUT'} AVX2"]
    if Path("/proc/driver/nvidia/version").is_file():
        facts.append("  an NVIDIA driver is present: training on a GPU gives other bytes than on a CPU")
    compilers = Path(sys.prefix) / COMPILERS
    if compilers.is_file():
        facts += [f"  llama.cpp was built with {line}" for line in compilers.read_text(encoding="utf-8").splitlines()]
    facts += [f"  {name} is {found}, locked: {wanted}" for name, wanted, found in _other_versions(root / CONSTRAINTS)]
    return facts


def read_stages(text: str) -> Stages:
    """The stages of a dvc.lock."""
    stages: Stages = YAML(typ="safe", pure=True).load(text)["stages"]
    return stages


def read_processor() -> tuple[str, set[str]]:
    """The model of this machine's processor, and the names of its instruction sets and features."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", "unknown"), set(fields.get("flags", "").split())


def _other_versions(constraints: Path) -> Iterable[tuple[str, str, str]]:
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, _, wanted = line.partition("==")
        if not wanted or line.startswith("#"):
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found.partition("+")[0] != wanted:
            yield name, wanted, found
