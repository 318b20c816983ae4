"""A training of the tiny model in a process of its own, with a fault in it; as fast as a fork.

    python faulty_run.py WORK BASE TOKENIZER

loads libraries, base model and tokenizer once, then reads one JSON job a line and forks a child that does it; the
answer is a line with the child's exit status. What the child logged is in its `out`/log.txt.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch  # noqa: E402
from disk_events import DiskEvents, copy_of  # noqa: E402
from small_disk import in_small_disk  # noqa: E402
from tiny_training import CPU, KEPT  # noqa: E402
from training_settings import make_lora, make_settings  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from finetune.data.tables import PACKED, write_parquet  # noqa: E402
from finetune.errors import FinetuneError  # noqa: E402
from finetune.io import write_csv, write_json  # noqa: E402
from finetune.training import checkpoint, journal, loop  # noqa: E402
from finetune.training.device import make_deterministic  # noqa: E402
from finetune.training.model import add_adapter, load_extended, save_adapter  # noqa: E402
from finetune.training_sections import EarlyStopping, TrainQlora  # noqa: E402

SEED = 3
STEPS_PER_EPOCH = 3


def settings(job: Mapping[str, Any]) -> TrainQlora:
    """Two epochs of three steps on NF4; a checkpoint after every step, two are kept. A job may change it."""
    plain = {
        "lora": make_lora(dropout=job.get("dropout", 0.1)),
        "save_every_steps": 1,
        "evaluate_every_steps": STEPS_PER_EPOCH,
    }
    if job.get("early_stopping"):
        plain |= {"evaluate_every_steps": 1, "early_stopping": EarlyStopping(patience=9, min_improvement=0.0)}
    return make_settings(**{**plain, **job.get("settings", {})})


def packed_rows() -> list[dict[str, Any]]:
    """Five rows, so that the last step of an epoch has one; ids 3 to 28 between BOS and EOS, all trained."""
    rows = []
    for row in range(5):
        ids = [1, *((3 + (5 * row + at) % 26) for at in range(6)), 2]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [8]})
    return rows


def prepare(work: Path, base: Path, tokenizer: Path) -> tuple[Any, Any]:
    """Base model and tokenizer, and the rows in a file; torch stays on one thread, or a fork would hang."""
    make_deterministic(SEED, 1)
    write_parquet(work / "packed.parquet", packed_rows(), PACKED)
    model = load_extended(base, KEPT, settings({}).quantization, torch.float32, CPU)
    return model, AutoTokenizer.from_pretrained(tokenizer)


def closeness(model: Any) -> float:
    """A validation loss that depends on every trained weight, and is lowest in the middle of the run."""
    norm = sum(float(weight.detach().abs().sum()) for weight in model.parameters() if weight.requires_grad)
    return abs(norm - 175.0)


def spoil(model: Any, job: Mapping[str, Any]) -> None:
    """Let steps go wrong; they are counted from 1 over this process, also over those that it does again."""
    steps, words = itertools.count(1), model.get_input_embeddings()
    weight = next(weight for weight in model.parameters() if weight.requires_grad)
    now = 0

    def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal now
        now = next(steps)
        for name in job.get("signals_in", {}).get(str(now), []):
            os.kill(os.getpid(), signal.Signals[name])
        if arguments[0].numel() > job.get("memory_tokens", 1000):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    def after(_: Any, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * float("nan") if now in job.get("nan_losses", []) else hidden

    words.register_forward_pre_hook(before)
    words.register_forward_hook(after)
    weight.register_hook(lambda gradient: gradient * float("nan") if now in job.get("nan_gradients", []) else gradient)


def run(job: Mapping[str, Any], work: Path, base: Any, tokenizer: Any) -> None:
    """Train as the stage does, from checkpoints to outs; `job` says where, and what goes wrong when."""
    folder, out = Path(job["folder"]), Path(job["out"])
    events = DiskEvents((folder, out), job.get("fatal"), job.get("power_fails", False))
    marks: dict[int, int] = {}

    def after_log(step: int, tokens: int) -> None:
        if step == job.get("snapshot_at"):
            copy_of(folder, out / "snapshot")
        if step == job.get("count_from"):
            events.count()
        marks[step] = len(events.seen)
        for name in job.get("signals", {}).get(str(step), []):
            os.kill(os.getpid(), signal.Signals[name])

    if "count_from" in job:
        events.watch()
        if job["count_from"] == 0:
            events.count()
    make_deterministic(SEED, 1)
    use = settings(job)
    model = add_adapter(base, use.lora, KEPT)
    spoil(model, job)
    rows = loop.open_rows(work / "packed.parquet", out / "rows")
    entries = loop.train(
        model,
        tokenizer,
        rows,
        use,
        seed=SEED,
        folder=folder,
        validate=closeness,
        begin=lambda step: None,
        seen=after_log,
    )
    save_adapter(model, out / "adapter")
    write_csv(out / "train_log.csv", journal.LOG_COLUMNS, journal.log_rows(entries))
    write_json(out / "metrics.json", entries[-1])
    checkpoint.finish(folder)
    if "count_from" in job:
        (out / "events.json").write_text(json.dumps({"events": events.seen, "marks": marks}))


def child(job: Mapping[str, Any], work: Path, base: Any, tokenizer: Any) -> int:
    """Do a job with its output in a file; returns the exit code that the stage would have."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.getLogger("finetune").addHandler(logging.StreamHandler())
    logging.getLogger("finetune").setLevel("INFO")
    try:
        run(job, work, base, tokenizer)
    except FinetuneError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return error.exit_code
    return 0


def serve(work: Path, *inputs: Path) -> None:
    """Do the jobs of stdin, one fork each."""
    base, tokenizer = prepare(work, *inputs)
    # What is frozen is not looked through by the trainer's gc.collect, nor copied by it into every child.
    gc.collect()
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(json.loads(line), work, base, tokenizer)
            finally:
                if code == 70:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


class Forks:
    """The program above at work, in a folder; `environment` is added to this process's.

    `disk`: a folder that is a file system of so many bytes for the program alone.
    """

    def __init__(
        self, work: Path, base: Path, tokenizer: Path, disk: tuple[Path, int] | None = None, **environment: str
    ) -> None:
        work.mkdir(parents=True)
        command = [sys.executable, __file__, str(work), str(base), str(tokenizer)]
        self.process = subprocess.Popen(
            in_small_disk(*disk, command) if disk else command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(work / "server.txt").open("w"),
            text=True,
        )
        assert self._answer() == "ready", (work / "server.txt").read_text()

    def run(self, folder: Path, out: Path, **job: Any) -> int:
        """Train in `folder`, with the outs in `out`; returns the exit code, or minus the signal that it died of."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "out": str(out), **job}) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the program."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
