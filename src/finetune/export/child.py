"""A module of this package as a child process: its lines as they come, and an end that leaves nothing running.

llama.cpp's long work can neither be asked how far it is nor be stopped, and a fault in it ends the process. So it runs
in a process of its own: Ctrl-C and SIGTERM end the child before they end the caller, a caller that is killed takes the
child along, and what the child writes is its progress and the reason of its failure.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ExportError

LOG_LINES = 15
STOP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)
EXIT_BY_SIGTERM = 128 + signal.SIGTERM


def run_module(module: str, arguments: Sequence[object], where: Path, on_line: Callable[[str], None]) -> None:
    """Run `python -m module arguments` and hand each line that it writes to `on_line`.

    Raises ExportError with the end of the child's log when its exit code is not 0.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid()), module, *map(str, arguments)]
    tail: deque[str] = deque(maxlen=LOG_LINES)
    # A converter's bar ends its lines with \r, which text mode reads as the end of a line.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                if line.strip():
                    tail.append(line.rstrip())
                    on_line(line)
            code = process.wait()
        finally:
            _end(process)
    if code != 0:
        lines = "\n".join(tail)
        raise ExportError(f"{module} ended with code {code}:\n{lines}", where, "mend what the log names")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit inside the block, so that temporary files are removed, as after Ctrl-C.

    A handler that somebody else has set stays.
    """
    own = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(EXIT_BY_SIGTERM))
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(caller: int, module: str, arguments: Sequence[str]) -> None:
    """Become `module`, in a process that ends when the process `caller` does, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != caller:
        raise SystemExit(EXIT_BY_SIGTERM)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
