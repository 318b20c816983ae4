"""the local files of a training -> a process that copies them to MLflow; only the end of a run waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from finetune.errors import StoppedError
from finetune.lineage import shown_uri
from finetune.log import logger

RUN_NAME = "train_qlora"
# How long the end of a run waits for MLflow, and how long until the process that sends is ended.
END_S, GRACE_S = 9, 1
NICENESS = 10


class TrainingMirror:
    """A live copy of a training's figures in MLflow, that can neither stop the training nor hold it up.

    Use it in a `with` block around the training. `log` and `telemetry`: files of JSON lines {step, time_s, figure:
    value}; they are the truth, and everything in them is sent, what a dead server has missed as soon as it answers.
    `begin` says that they may be read, `finish` names the result. The run ends FINISHED, FAILED on an exception, or
    KILLED on a signal, Ctrl-C and SystemExit, and also when this process is killed. Only the end waits: 10 s at most.
    `params_file` names the experiment and the params to record. Of several training processes one is `active`.
    """

    def __init__(
        self, log: Path, telemetry: Path, params_file: Path = Path("params.yaml"), *, active: bool = True
    ) -> None:
        self._files, self._active = (params_file, log, telemetry), active
        self._started = False
        self._process: subprocess.Popen[bytes] | None = None
        self._result: dict[str, str] = {}

    def __enter__(self) -> Self:
        """Nothing is started yet: on two cores the process that sends would hold up the way to the first step."""
        return self

    def _start(self) -> None:
        if self._started or not self._active:
            return
        self._started = True
        command = [sys.executable, "-m", "finetune.tracking.sender", *map(str, self._files)]
        try:
            # A session of its own: Ctrl-C in the terminal is for the training alone.
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        except OSError as fault:
            logger.warning("no process for MLflow (%s): `make register` copies the curves later", fault)

    def begin(self, resumed_from_step: int) -> None:
        """Start the process that sends: the files hold this run and nothing else; 0 is a new run."""
        self._start()
        self._order({"resumed_from_step": resumed_from_step})

    def finish(self, adapter_sha256: str) -> None:
        """Name what was trained: `sha256_tree` of the adapter's folder, by which `register` finds the run."""
        self._result = {"adapter_sha256": adapter_sha256}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run, also one that failed before `begin`; the exception goes on."""
        self._start()
        killed = kind is not None and (not issubclass(kind, Exception) or issubclass(kind, StoppedError))
        self._order({"status": "FINISHED" if kind is None else "KILLED" if killed else "FAILED", **self._result})
        if self._process is not None and not _has_sent_all(self._process):
            message = "MLflow at %s lacks figures of this run: `make register` copies the curves of a finished one"
            logger.warning(message, shown_uri())

    def _order(self, order: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            # A process that has ended early is spoken of at the end. A few bytes in an empty pipe never wait.
            with suppress(OSError):
                self._process.stdin.write(json.dumps(order).encode() + b"\n")


def _has_sent_all(process: subprocess.Popen[bytes]) -> bool:
    with process:
        try:
            return process.wait(END_S + GRACE_S) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False
