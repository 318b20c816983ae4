"""The smoke pipeline in a container: from a fresh clone to its end, again, stopped, killed, and beside another one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from clones import changed, copy_clone, hashes, make_clone, owners
from engine import Engine, say
from jobs import Job, run, start, stop, wait_until

UID, OTHER_UID = 12345, 54321
STAGES = 12
TRAIN = ("python", "-m", "finetune.doctor.repro", "--force", "--single-item", "train_qlora")
# The exit code of finetune.doctor.repro after a stop, and of a process that SIGKILL ended.
STOPPED, KILLED = 75, 137
STOP_AFTER_STEPS, KILL_AFTER_STEPS = 20, 90
IMPORTS = (
    "import os, subprocess, sys; assert subprocess.call(['getent', 'passwd', str(os.getuid())]) == 2; "
    "sys.path.insert(0, '/opt/finetune/tools/convert'); "
    "import convert_hf_to_gguf, llama_cpp, torch, bitsandbytes, trl, mlflow; print(llama_cpp.__version__)"
)

Record = Callable[[str, bool, str], None]


def refusals(engine: Engine, image: str, clone: Path, record: Record) -> None:
    """UID 0, a folder that is no repository, and one that another user owns."""
    empty = clone.parent / "empty"
    empty.mkdir(exist_ok=True)
    cases = {
        "uid_0_is_refused": (Job(image, uid=0, folder=clone), "refusing to run as root"),
        "a_foreign_folder_is_refused": (Job(image, uid=UID, folder=empty), "is not the repository"),
        "another_uid_is_refused": (Job(image, uid=OTHER_UID, folder=clone), f"cannot be written by UID {OTHER_UID}"),
    }
    for name, (job, answer) in cases.items():
        done = run(engine, job)
        record(name, done.returncode == 1 and answer in done.stdout, done.stdout[-300:])


def tools(engine: Engine, image: str, clone: Path, record: Record) -> None:
    """Imports, converter and `make doctor`'s program, as a user without a passwd entry."""
    for name, arguments in (
        ("imports_without_a_passwd_entry", ("python", "-c", IMPORTS)),
        ("doctor", ("python", "-m", "finetune.doctor")),
    ):
        done = run(engine, Job(image, arguments, UID, clone))
        record(name, done.returncode == 0, done.stdout[-3000:])


def whole_pipeline(engine: Engine, image: str, clone: Path, record: Record) -> dict[str, float]:
    """The image's own command in a fresh clone, twice; returns the seconds of each."""
    make_clone(clone, UID)
    began = time.monotonic()
    first = run(engine, Job(image, uid=UID, folder=clone))
    middle = time.monotonic()
    (clone.parent / "pipeline.log").write_text(first.stdout)
    ran = first.stdout.count("Running stage '")
    record("pipeline_runs_to_its_end", (first.returncode, ran) == (0, STAGES), f"{ran} stages\n{first.stdout[-3000:]}")
    record("committed_bytes_come_out", changed(clone) == "", changed(clone))
    found = owners(clone)
    record("everything_belongs_to_the_uid", set(found) == {UID}, str(found))
    second = run(engine, Job(image, uid=UID, folder=clone))
    quiet = second.returncode == 0 and "Running stage '" not in second.stdout
    record("second_run_does_nothing", quiet and "up to date" in second.stdout, second.stdout[-2000:])
    return {"pipeline_s": round(middle - began, 1), "second_run_s": round(time.monotonic() - middle, 1)}


def steps_done(folder: Path) -> int:
    """How many steps the log of the running training holds."""
    return sum(len(log.read_text().splitlines()) for log in folder.glob(".cache/checkpoints/*/train_log.jsonl"))


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints, lowest first."""
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob(".cache/checkpoints/*/checkpoint-*"))


def interrupted(engine: Engine, image: str, clone: Path, record: Record, *, kill: bool) -> None:
    """Train in a copy of the clone, end the container in the middle, and train on: the adapter has the same bytes."""
    name = "killed" if kill else "stopped"
    folder, log = clone.parent / name, clone.parent / f"{name}.log"
    copy_clone(clone, folder)
    job = Job(image, TRAIN, UID, folder, name=f"finetune-check-{name}")
    process = start(engine, job, log)
    enough = KILL_AFTER_STEPS if kill else STOP_AFTER_STEPS
    wait_until(lambda: steps_done(folder) >= enough and (not kill or bool(checkpoints(folder))), "training", process)
    if not kill:
        beside = run(engine, Job(image, uid=UID, folder=folder))
        refused = beside.returncode == 1 and "another container is running the pipeline here" in beside.stdout
        record("a_second_container_is_refused", refused, beside.stdout[-300:])
    code, saved = stop(engine, job, process, kill=kill), checkpoints(folder)
    if not kill:
        record("stop_ends_with_exit_code_75", code == STOPPED, f"exit code {code}\n{log.read_text()[-2000:]}")
        rwlock = folder / ".dvc/tmp/rwlock"
        record("stop_leaves_no_lock", not rwlock.exists() or rwlock.read_text() in ("", "{}"), str(rwlock))
    record(f"{name}_run_has_a_checkpoint", bool(saved) and saved[-1] >= (1 if kill else enough), str(saved))
    again = run(engine, Job(image, TRAIN, UID, folder))
    resumed = re.findall(r"resuming from checkpoint-(\d+) of", again.stdout)
    goes_on = again.returncode == 0 and bool(saved) and resumed == [str(saved[-1])]
    record(f"{name}_run_goes_on_there", goes_on, f"resumed at {resumed} of {saved}\n{again.stdout[-2000:]}")
    same = hashes(folder / "models/adapter") == hashes(clone / "models/adapter")
    record(f"{name}_run_ends_in_the_same_bytes", same, "")
    say(f"{name} with exit code {code} at a checkpoint of step {saved}, resumed at {resumed}")
