"""docker/entrypoint.sh as a process, without a container: whom it refuses, its lock, and how it becomes its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).resolve().parents[2] / "docker/entrypoint.sh"
# Tests run as root here and as a user elsewhere; the lock and the signals are the same for both.
AS_ANYONE = {"FINETUNE_ALLOW_ROOT": "1"}
# Stands for the trainer under DVC: it takes one SIGINT, saves, and ends with the code for "go on later".
TRAINER = """
import os, signal, sys, time
def save(number, frame):
    open("saved", "w").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGINT, save)
open("ready", "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository, as far as the entrypoint looks."""
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **AS_ANYONE, **variables}
    return subprocess.Popen(
        [str(ENTRYPOINT), *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(folder: Path, *command: str, **variables: str) -> tuple[int, str, str]:
    process = start(folder, *command, **variables)
    out, error = process.communicate(timeout=30)
    return process.returncode, out, error


def wait_for(path: Path) -> str:
    end = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"{path.name} was not written"
        time.sleep(0.02)
    return path.read_text()


@pytest.fixture
def trainer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command at work under the lock."""
    process = start(folder, sys.executable, "-c", TRAINER)
    wait_for(folder / "ready")
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be refused as root: sudo make test")
@pytest.mark.parametrize(("allowed", "code"), [("", 1), ("0", 1), ("1", 0)])
def test_root_is_refused_unless_it_is_allowed(folder: Path, allowed: str, code: int) -> None:
    answer, _, error = run(folder, "true", FINETUNE_ALLOW_ROOT=allowed)
    assert (answer, "refusing to run as root" in error) == (code, code == 1)
    assert (folder / ".dvc/tmp").exists() is (code == 0)


def test_a_folder_that_is_no_repository_is_refused_with_the_mount_to_type(tmp_path: Path) -> None:
    code, _, error = run(tmp_path, "true")
    assert code == 1
    assert error == (
        f"finetune: {tmp_path} is not the repository\n"
        '  remedy: docker run -v "$PWD:$PWD" -w "$PWD" ...\n'
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can become another user: sudo make test")
def test_a_repository_of_another_user_is_refused_before_anything_runs() -> None:
    # Not pytest's folder, which is closed to everybody else.
    with tempfile.TemporaryDirectory(prefix="finetune-entrypoint-") as name:
        Path(name).chmod(0o755)
        (Path(name) / ".dvc").mkdir(mode=0o755)
        done = subprocess.run(
            [str(ENTRYPOINT), "true"], cwd=name, env=os.environ, capture_output=True, text=True, user=54321, group=54321
        )
    assert done.returncode == 1, done.stderr
    assert "cannot be written by UID 54321" in done.stderr
    assert "docker run --user 0:0" in done.stderr


def test_a_second_one_is_refused_while_the_first_works_and_let_in_after(
    folder: Path, trainer: subprocess.Popen[str]
) -> None:
    code, _, error = run(folder, "true")
    assert code == 1
    assert "another container is running the pipeline here" in error
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait(timeout=30)
    # The lock goes with the process, however that ended: no file has to be removed.
    assert run(folder, "true")[0] == 0


def test_a_shell_is_let_in_beside_a_run(folder: Path, trainer: subprocess.Popen[str]) -> None:
    assert run(folder, "bash", "-c", "echo $PYTHONPATH", PYTHONPATH="")[:2] == (0, f"{folder}/src\n")


@pytest.mark.parametrize(
    ("command", "lets_in"),
    [
        ("finetune.doctor", True),
        ("finetune.doctor --json", True),
        ("finetune.doctor.repro", False),
        ("dvc repro", False),
    ],
)
def test_doctor_looks_at_a_run_and_takes_no_lock(
    folder: Path, trainer: subprocess.Popen[str], command: str, lets_in: bool
) -> None:
    python = folder / "programs" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    assert (run(folder, "python", "-m", *command.split(), PATH=path)[0] == 0) is lets_in


def test_the_command_takes_the_place_of_the_script_and_keeps_its_number(
    folder: Path, trainer: subprocess.Popen[str]
) -> None:
    assert wait_for(folder / "ready") == str(trainer.pid)


def test_a_stop_reaches_the_command_once_and_its_exit_code_comes_out(
    folder: Path, trainer: subprocess.Popen[str]
) -> None:
    """As `tini -g` passes the image's stop signal on: to the group."""
    os.killpg(trainer.pid, signal.SIGINT)
    assert trainer.wait(timeout=30) == 75
    assert (folder / "saved").read_text() == "SIGINT"
    assert run(folder, "true")[0] == 0


def test_a_run_of_the_doctor_takes_the_lock_of_the_entrypoint_as_its_own(folder: Path) -> None:
    program = "from pathlib import Path; from finetune.doctor.locks import sole_run\nwith sole_run(Path()): print(1)"
    source = str(ENTRYPOINT.parents[1] / "src")
    assert run(folder, sys.executable, "-c", program, PYTHONPATH=source)[:2] == (0, "1\n")


def test_code_of_the_repository_comes_first_and_hashes_are_kept_in_it(folder: Path) -> None:
    shown = "import os; print(os.environ['PYTHONPATH'], os.environ['DVC_SITE_CACHE_DIR'], oct(os.umask(0)))"
    code, out, _ = run(folder, sys.executable, "-c", shown, PYTHONPATH="/other", DVC_SITE_CACHE_DIR="")
    assert (code, out.split()) == (0, [f"{folder}/src:/other", f"{folder}/.dvc/site", "0o2"])
    assert (folder / ".dvc/site").is_dir()


@pytest.mark.parametrize(("command", "code"), [(("false",), 1), (("no-such-program",), 127)])
def test_the_exit_code_is_the_commands(folder: Path, command: tuple[str, ...], code: int) -> None:
    assert run(folder, *command)[0] == code
