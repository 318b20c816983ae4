"""Real processes: what a child says arrives, and no end of the caller leaves it or a half-written file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ExportError
from finetune.export.child import run_module, sigterm_as_exit

# A caller that writes a file by a child, which says its process id and then sleeps in one statement.
CALLER = """
import sys
from pathlib import Path
from finetune.export.child import run_module, sigterm_as_exit
from finetune.io import replacing
target = Path(sys.argv[1])
said = "import os; print(os.getpid(), flush=True)"
with sigterm_as_exit(), replacing(target) as partial:
    partial.write_text("half")
    show = lambda line: print(line, end="", flush=True)
    run_module("timeit", ["-n", "1", "-r", "1", "-s", said, "import time; time.sleep(60)"], target, show)
"""


def start(target: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", CALLER, str(target)]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert caller.stdout
    return caller, int(caller.stdout.readline())


def is_gone(process: int) -> bool:
    """Whether the process has ended within ten seconds; one that nobody has waited for yet counts as ended."""
    for _ in range(100):
        status = Path(f"/proc/{process}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def terminate(caller: subprocess.Popen[str]) -> None:
    caller.terminate()


def press_ctrl_c(caller: subprocess.Popen[str]) -> None:
    os.killpg(caller.pid, signal.SIGINT)


@pytest.mark.parametrize(("end", "code"), [(terminate, 143), (press_ctrl_c, -signal.SIGINT)])
def test_a_stopped_caller_ends_its_child_and_leaves_no_file(
    tmp_path: Path, end: Callable[[subprocess.Popen[str]], None], code: int
) -> None:
    caller, child = start(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == [".file.partial"]
    end(caller)
    assert caller.wait(20) == code
    assert is_gone(child)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_caller_takes_its_child_along(tmp_path: Path) -> None:
    caller, child = start(tmp_path / "file")
    caller.kill()
    caller.wait(20)
    assert is_gone(child)


def test_lines_arrive_one_by_one_and_without_the_empty_ones(tmp_path: Path) -> None:
    lines: list[str] = []
    said = "import sys; sys.stdout.write('10%\\r20%\\r\\n\\nend\\n'); sys.stderr.write('both\\n')"
    run_module("timeit", ["-n", "1", "-r", "1", "-s", said, "1"], tmp_path, lines.append)
    assert [line.strip() for line in lines[:4]] == ["10%", "20%", "end", "both"]


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    said = "for number in range(40): print(f'line {number}', flush=True)\nimport os; os._exit(7)"
    with pytest.raises(ExportError) as caught:
        run_module("timeit", ["-n", "1", "-s", said, "1"], tmp_path / "target", lambda _: None)
    assert caught.value.what.splitlines()[0] == "timeit ended with code 7:"
    assert caught.value.what.splitlines()[1:] == [f"line {number}" for number in range(25, 40)]
    assert caught.value.where == str(tmp_path / "target")


def test_a_handler_of_somebody_else_stays() -> None:
    def other(_number: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, other)
    try:
        with sigterm_as_exit():
            assert signal.getsignal(signal.SIGTERM) is other
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with sigterm_as_exit():
            assert signal.getsignal(signal.SIGTERM) not in (other, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
