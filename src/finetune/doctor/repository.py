"""The repository -> whether its parameters, inputs, DVC files, locks and tools let a run start and end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.fetching.sources import local_files
from finetune.doctor import lock_file
from finetune.doctor.locks import DVC_RWLOCK, RUN_LOCK, ReadWriteLock, living_run, read_rwlock, try_lock
from finetune.doctor.processes import Process, holders, orphaned_stages
from finetune.doctor.result import Result, fault, ok, warning
from finetune.errors import DataError, ExportError, ParamsError
from finetune.params import Params, load_params
from finetune.source_sections import LocalOrigin
from finetune.tools import GOTEMPLATE, tool_path

REPRO = "make repro"
TOOLS = ("convert/convert_hf_to_gguf.py", GOTEMPLATE)


def read_params(root: Path) -> tuple[Result, Params | None]:
    """The result for params.yaml, and what it says where it is valid."""
    try:
        params = load_params(root / "params.yaml")
    except ParamsError as error:
        return fault("params.yaml", error.what, error.remedy), None
    return ok("params.yaml", f"valid, recipe {params.recipe}"), params


def inputs_result(root: Path, params: Params) -> Result:
    """Whether every file that a run reads is there, also those that it reads after hours of training."""
    faults, count = [], 0
    for source in params.fetch.sources:
        if isinstance(source.origin, LocalOrigin):
            try:
                count += len(local_files(root / params.fetch.local_dir, source.origin.files, source.name))
            except DataError as error:
                faults.append((f"{error.where}: {error.what}", error.remedy))
    for file, key in _named_files(params):
        count += 1
        if not (root / file).is_file():
            faults.append((f"{key}: {file} is missing", f"put the file there, or mend {key} in params.yaml"))
    if faults:
        return fault("input files", "\n".join(what for what, _ in faults), "\n".join(remedy for _, remedy in faults))
    return ok("input files", f"{count} files are there")


def dvc_lock_result(content: bytes | None) -> Result:
    """Whether DVC can read this content of dvc.lock; None where there is no file."""
    if content is None:
        return ok("dvc.lock", "none yet: every stage runs")
    if (line := lock_file.merge_line(content)) is not None:
        return fault("dvc.lock", f"merge marks in line {line}", f"git checkout HEAD -- dvc.lock && {REPRO}")
    if (torn := lock_file.tear(content)) is not None:
        return warning("dvc.lock", f"cut while DVC wrote it: {torn}", f"{REPRO}, which restores it")
    return ok("dvc.lock", "whole")


def locks_result(running: list[Process], rwlock: ReadWriteLock, orphans: list[Process]) -> Result:
    """Whether this folder is free for a run. `running`: living runs; `orphans`: stages whose DVC was killed."""
    if running:
        first = running[0]
        remedy = f"wait: tail --pid={first.pid} -f /dev/null; or stop it: kill -INT {first.pid}"
        return fault("locks", f"a run is at work here: {', '.join(each.shown() for each in running)}", remedy)
    if orphans:
        found = f"stage {orphans[0].stage} of a killed run is still at work: {orphans[0].shown()}"
        return warning("locks", found, f"{REPRO}, which asks it to save and stop, and goes on from there")
    if rwlock.torn or rwlock.pids:
        held = "cut while it was written" if rwlock.torn else f"of dead PID {', '.join(map(str, rwlock.pids))}"
        return warning("locks", f"{DVC_RWLOCK}, {held}", f"{REPRO}, which removes it")
    return ok("locks", "free")


def tools_result(missing: list[str]) -> Result:
    """Whether `make setup` has made the external programs."""
    if missing:
        return fault("tools", f"missing: {', '.join(missing)}", "make setup")
    return ok("tools", "GGUF converter, quantiser and template renderer are there")


def check_repository(root: Path) -> tuple[list[Result], Params | None]:
    """All results of this module, and the parameters where they are valid."""
    result, params = read_params(root)
    results = [result]
    if params is not None:
        results.append(inputs_result(root, params))
    lock = root / lock_file.NAME
    results.append(dvc_lock_result(lock.read_bytes() if lock.is_file() else None))
    results.append(locks_result(_running(root), read_rwlock(root), orphaned_stages(root)))
    results.append(tools_result(list(_missing_tools())))
    return results, params


def _named_files(params: Params) -> Iterator[tuple[str, str]]:
    yield params.tokenizer.chat_template, "tokenizer.chat_template"
    calls = params.evaluate.tool_calls
    for entry in calls.sets:
        for file in (entry.questions, entry.answers):
            if file is not None:
                yield f"{calls.folder}/{file}", f"evaluate.tool_calls.{entry.name}"


def _running(root: Path) -> list[Process]:
    """Who has this folder: the holders of the run lock where it is taken, else a DVC that was started by hand."""
    path = root / RUN_LOCK
    if path.is_file():
        with path.open("r+b") as handle:
            if not try_lock(handle.fileno()):
                return holders(path) or [Process(0, "in another container or of another user", None)]
    return living_run(root)


def _missing_tools() -> Iterator[str]:
    from importlib.util import find_spec

    for name in TOOLS:
        try:
            tool_path(name)
        except ExportError as error:
            yield error.where
    if find_spec("llama_cpp") is None:
        yield "llama_cpp"
