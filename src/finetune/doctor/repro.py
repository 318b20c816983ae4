"""`python -m finetune.doctor.repro [arguments of dvc repro]`: DVC alone in this folder, begun clean, stopped in order.

`make repro` and `make register` call it. A stop (Ctrl-C, SIGTERM, a lost terminal) reaches the stage as one SIGINT, and
DVC, which SIGTERM would end at once and without its stage, waits for it. Exit code 75: stopped, run again to go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetune.doctor import lock_file
from finetune.doctor.locks import heal, sole_run, stop_orphans
from finetune.doctor.processes import has_ended
from finetune.errors import FinetuneError
from finetune.log import logger, setup_logging

# EX_TEMPFAIL of sysexits.h, which the trainer gives too.
STOPPED = 75
EVERYBODY_S = 0.5
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stops:
    """Signals to this process -> SIGINT to the group of DVC and its stage; `asked` says that there was one."""

    def __init__(self) -> None:
        self.asked, self._group = False, 0

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Pass a stop on, at once or as soon as there is a DVC."""
        if number != signal.SIGINT:
            # systemd and SLURM send it to every process, and the trainer takes a second signal for a wish to end at
            # once. DVC, which has no handler, is dead by then, and the stage stops already.
            time.sleep(EVERYBODY_S)
        logger.warning("%s: the stage saves what it has and ends; please wait", signal.Signals(number).name)
        self.asked = True
        self._pass_on()

    def pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: stop with DVC and its stage, which are a group of their own, and go on with them."""
        os.killpg(self._group or os.getpgrp(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._group:
            os.killpg(self._group, signal.SIGCONT)

    def reach(self, group: int) -> None:
        """From now on stops go to `group`."""
        self._group = group
        if self.asked:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._group and not has_ended(self._group):
            try:
                os.killpg(self._group, signal.SIGINT)
            except ProcessLookupError:
                return


@contextmanager
def _taking_stops() -> Iterator[Stops]:
    stops = Stops()
    # `nohup` has SIGHUP ignored, and means it. SIGINT is ignored in a script's background job, whose SIGTERM must work.
    numbers = [number for number in STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stops.take) for number in numbers}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, stops.pause)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(root: Path, arguments: list[str]) -> int:
    """`dvc repro` in `root`, alone; returns its exit code, 75 after a stop, or 128 + n where signal n killed DVC.

    Raises what `sole_run` and `heal` raise.
    """
    with _taking_stops() as stops, sole_run(root) as descriptor:
        for line in heal(root):
            logger.warning("%s", line)
        if stops.asked:
            return STOPPED
        lock_file.remember(root)
        # Without --wait-for-lock, a `dvc plots` of more than 3 s at the end of a stage makes DVC fail after hours.
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *arguments]
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, process_group=0, pass_fds=(descriptor,))
        stops.reach(process.pid)
        code = process.wait()
        if code == 0:
            lock_file.remember(root)
            return 0
        stop_orphans(root, ask=not stops.asked)
        if stops.asked:
            heal(root)
            logger.warning("stopped; `make repro` goes on from what was saved")
            return STOPPED
        if code < 0:
            heal(root)
            logger.error("DVC was killed (%s); `make repro` goes on from what was saved", signal.Signals(-code).name)
            return 128 - code
        return code


def main(arguments: list[str]) -> int:
    """Run `dvc repro` with these arguments in the current folder; returns the exit code."""
    setup_logging("repro")
    try:
        return run(Path.cwd(), arguments)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
