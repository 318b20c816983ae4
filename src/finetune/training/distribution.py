"""train_qlora.distribution -> the processes of one training on this machine: started, told of signals, ended.

The stage starts its processes itself, each with torch's variables: torchrun ends with 1 where a stopped run ends with
75, and gives it 30 seconds for its checkpoint. On several machines `accelerate launch` sets the same variables
(distributed/README.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finetune.errors import DeviceError
from finetune.log import logger
from finetune.training_sections import Distribution, TrainQlora

KEY = "train_qlora.distribution"
CALLER = "FINETUNE_CALLER_PID"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A process that is left alone waits for the others in vain; it may still be writing its log.
GRACE_S = 60.0
POLL_S = 0.1
PR_SET_PDEATHSIG = 1  # prctl(2)


def relaunch_if_needed(settings: Distribution, module: str, arguments: Sequence[str], cpu_threads: int) -> int | None:
    """None in a process that is to train; else the exit code of `python -m module arguments` in several processes.

    Each process takes `cpu_threads` threads. Raises DeviceError for fewer GPUs than processes (a CPU takes any number),
    and for a launcher that started another number of processes.
    """
    if "LOCAL_RANK" in os.environ:
        if (started := int(os.environ["WORLD_SIZE"])) != settings.processes:
            raise DeviceError(
                f"{started} process(es) were started, and processes is {settings.processes}",
                f"{KEY}.processes",
                f"start {settings.processes}, or set {KEY}.processes: {started}",
            )
        _end_with_caller()
        _check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        return None
    if settings.strategy == "single":
        return None
    _check_gpus(settings.processes)
    logger.info("starting %d processes (%s)", settings.processes, settings.strategy)
    return _run([sys.executable, "-m", module, *arguments], settings.processes, cpu_threads)


def writes_files() -> bool:
    """Whether this process is the one that writes checkpoints, logs and outs: the first one, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_strategy(settings: TrainQlora) -> None:
    """Raise DeviceError for what weights in shards cannot do, and for a launcher that shards them as well."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise DeviceError(
            "accelerate's configuration shards the model, which train_qlora does itself",
            f"{KEY}.strategy",
            "set strategy: fsdp2, and start with distributed/one_node.yaml or several_nodes.yaml",
        )
    if settings.distribution.strategy != "fsdp2":
        return
    if settings.quantization.format != "none":
        # accelerate 1.15 leaves 4-bit weights whole on every GPU, so that nothing would be gained.
        raise DeviceError(
            f"{settings.quantization.format} weights cannot be sharded",
            f"{KEY}.strategy",
            "set strategy: ddp (each GPU holds the 4-bit base), or train_qlora.quantization.format: none",
        )
    if not settings.optimizer.startswith("adamw_torch") or settings.compute_dtype == "float16":
        raise DeviceError(
            f"optimizer {settings.optimizer} in {settings.compute_dtype} cannot work on shards",
            f"{KEY}.strategy",
            "set train_qlora.optimizer: adamw_torch_fused and compute_dtype: bfloat16, or strategy: ddp",
        )


def _check_gpus(wanted: int) -> None:
    if torch.cuda.is_available() and (gpus := torch.cuda.device_count()) < wanted:
        raise DeviceError(
            f"{wanted} processes need as many GPUs, {gpus} are visible",
            f"{KEY}.processes",
            f"set {KEY}.processes: {gpus}, or look at CUDA_VISIBLE_DEVICES",
        )


def _run(command: Sequence[str], processes: int, cpu_threads: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        # Unset, accelerate takes all cores: the number of threads is part of the result.
        "OMP_NUM_THREADS": cpu_threads,
        CALLER: os.getpid(),
    }
    children: list[subprocess.Popen[bytes]] = []
    with _signals_to(children):
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank}
            quiet = {"FINETUNE_LOG_LEVEL": "WARNING"} if rank else {}
            values = {name: str(value) for name, value in {**shared, **own, **quiet}.items()}
            # In a session of its own: Ctrl-C at the terminal would reach it a second time, past this process.
            children.append(subprocess.Popen(command, env={**os.environ, **values}, start_new_session=True))
        return _wait(children)


@contextmanager
def _signals_to(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to all children that run, and leave none behind."""

    def pass_on(number: int, _frame: Any) -> None:
        for child in children:
            child.send_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first child that fails, or 0; the others are killed when they outlast it by GRACE_S."""
    code, until_s = 0, float("inf")
    while alive := [child for child in children if child.poll() is None]:
        if not code and (failed := [child.returncode for child in children if child.returncode]):
            code, until_s = failed[0], time.monotonic() + GRACE_S
        if time.monotonic() > until_s:
            logger.warning("%d process(es) still wait for one that failed: they are ended", len(alive))
            for child in alive:
                child.kill()
        time.sleep(POLL_S)
    code = code or next((child.returncode for child in children if child.returncode), 0)
    return code if code >= 0 else 128 - code


def _end_with_caller() -> None:
    """Let this process be killed when the one that started it ends, however it ends."""
    if CALLER not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[CALLER]):
        raise SystemExit(1)
