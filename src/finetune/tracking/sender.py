"""train_log.jsonl, telemetry.jsonl -> one MLflow run, in a process of its own; orders come on stdin, one JSON a line.

A training that waits for nothing: whatever MLflow does here, the training process sees neither its exception nor its
hang nor the seconds that importing it takes. What could not be sent is read again from the files and sent later.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from finetune.lineage import first_line, run_params, shown_uri
from finetune.log import logger, setup_logging
from finetune.params import load_params
from finetune.tracking.client import FAULTS, QUICK, connect, find_experiment, log_params, log_points
from finetune.tracking.mirror import END_S, RUN_NAME
from finetune.tracking.registry import ADAPTER_TAG
from finetune.tracking.tail import Tail

POLL_S, MAX_PAUSE_S = 1.0, 30.0
MAX_LINES = 100
MIRROR_TAG, RESUMED_TAG = "mirror_id", "resumed_from_step"
STDIN = 0


class Sender:
    """Follows the files until an order names the status in which the run ends; see `TrainingMirror` for the orders."""

    def __init__(self, params_file: Path, log: Path, telemetry: Path) -> None:
        self.params_file = params_file
        self.tails = (Tail(log), Tail(telemetry, "system/"))
        # What a lost answer may have left behind is found again by it.
        self.mirror_id, self.started_ms = uuid.uuid4().hex, round(time.time() * 1000)
        self.orders: dict[str, Any] = {}
        self._client: Any = None
        self._run_id, self._unread = "", b""
        self._pause_s, self._down, self._tagged = 0.0, False, False

    def follow(self) -> bool:
        """Send until the end; returns whether MLflow has taken everything."""
        while "status" not in self.orders:
            self._listen(self._pause_s)
            if "status" not in self.orders:
                self._attempt()
        # A call that hangs ends with the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(END_S)
        return self._attempt()

    def _listen(self, timeout_s: float) -> None:
        if not select.select([STDIN], [], [], timeout_s)[0]:
            return
        received = os.read(STDIN, 1 << 16)
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            self.orders |= json.loads(line)
        if not received:
            # The training process is gone, and did not say how it ended.
            self.orders = {"status": "KILLED", **self.orders}

    def _attempt(self) -> bool:
        try:
            self._send()
        except (*FAULTS, FinetuneError, ValueError) as fault:
            if not self._down:
                message = "MLflow at %s fails (%s): training goes on, the figures follow when it answers"
                logger.warning(message, shown_uri(), first_line(fault))
            self._down, self._pause_s = True, min(2 * max(self._pause_s, POLL_S), MAX_PAUSE_S)
            return False
        if self._down:
            logger.info("MLflow at %s answers again and has the figures that it missed", shown_uri())
        self._down, self._pause_s = False, POLL_S
        return True

    def _send(self) -> None:
        if not self._run_id:
            self._run_id = self._open()
        if "resumed_from_step" in self.orders:
            self._tag_resumed(self.orders["resumed_from_step"])
            for tail in self.tails:
                while lines := tail.unread(MAX_LINES):
                    log_points(self._client, self._run_id, tail.points(lines))
                    tail.accept(lines)
        if "status" in self.orders:
            if adapter := self.orders.get(ADAPTER_TAG):
                self._client.set_tag(self._run_id, ADAPTER_TAG, adapter)
            self._client.set_terminated(self._run_id, self.orders["status"])

    def _open(self) -> str:
        params = load_params(self.params_file)
        self._client = self._client or connect(QUICK)
        experiment = find_experiment(self._client, params.registration.experiment)
        known = self._client.search_runs([experiment], f"tags.{MIRROR_TAG} = '{self.mirror_id}'")
        run = known[0] if known else self._create(experiment)
        log_params(self._client, run.info.run_id, run_params(params))
        return str(run.info.run_id)

    def _create(self, experiment: str) -> Any:
        tags = {MIRROR_TAG: self.mirror_id}
        return self._client.create_run(experiment, start_time=self.started_ms, run_name=RUN_NAME, tags=tags)

    def _tag_resumed(self, step: int) -> None:
        if step and not self._tagged:
            self._client.set_tag(self._run_id, RESUMED_TAG, str(step))
        self._tagged = True


def main() -> None:
    """Follow the files of argv; exit code 0 says that MLflow has everything."""
    # The end of the training process is what ends this one: it has a run to close.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    setup_logging(RUN_NAME)
    # Each would print a page for every attempt while a server is away; one line of ours says it.
    for library in ("mlflow", "urllib3", "alembic"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    raise SystemExit(0 if Sender(*map(Path, sys.argv[1:])).follow() else 1)


if __name__ == "__main__":
    main()
