"""train_qlora.distribution -> the processes of one training, here and on other nodes: started, told of signals, ended.

The stage starts its processes itself, each with torch's variables: torchrun ends with 1 where a stopped run ends with
75, and gives it 30 seconds for its checkpoint. Those of other machines are started there (finetune.training.join);
`accelerate launch` sets the same variables (docs/scale.md).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from finetune.errors import DeviceError
from finetune.log import logger
from finetune.training.nodes import NODE_RANK, NODES, Node, gathered, listening, this_node
from finetune.training_sections import Distribution, TrainQlora

KEY = "train_qlora.distribution"
LOOPBACK = "127.0.0.1"
CALLER = "FINETUNE_CALLER_PID"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A process that is left alone waits for the others in vain; it may still be writing its log.
GRACE_S = 60.0
POLL_S = 0.1
# systemd and some batch systems send SIGTERM to every process, so that most have it before they could be told.
EVERYBODY_S = 0.5
PR_SET_PDEATHSIG = 1  # prctl(2)


class Member(Protocol):
    """A process of a training, here or as another node reports it."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, once `poll` has seen its end."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def kill(self) -> None:
        """End it."""


def relaunch_if_needed(settings: Distribution, module: str, arguments: Sequence[str], cpu_threads: int) -> int | None:
    """None in a process that is to train; else the exit code of `python -m module arguments` in several processes.

    Each process takes `cpu_threads` threads. Where the environment names several nodes, their processes are waited for
    as well. Raises DeviceError for fewer GPUs than processes (a CPU takes any number), for a launcher that started
    another number of processes, and for nodes that do not come or that the processes cannot be shared among.
    """
    if "LOCAL_RANK" in os.environ:
        if (started := int(os.environ["WORLD_SIZE"])) != settings.processes:
            raise DeviceError(
                f"{started} process(es) were started, and processes is {settings.processes}",
                f"{KEY}.processes",
                f"start {settings.processes}, or set {KEY}.processes: {started}",
            )
        _end_with_caller()
        atexit.register(_leave_group)
        _check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        return None
    node = this_node()
    here = processes_here(settings, node)
    if node is not None and node.rank:
        raise DeviceError(
            f"this is node {node.rank} of {node.count}, and node 0 runs the stages",
            f"environment, {NODE_RANK}",
            "python -m finetune.multi_node, on every node",
        )
    if settings.strategy == "single":
        return None
    _check_gpus(here)
    address = node.address if node else LOOPBACK
    with listening(address, 0) as server:
        port = server.getsockname()[1]
        # Made here, and not by rank 0: that would listen on every network, and on a port that was free a while ago.
        store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(server.fileno())
        )
        orders = {"arguments": list(arguments), "port": port, "cpu_threads": cpu_threads}
        with gathered(node, orders) as others:
            nodes = 1 + len(others)
            logger.info("starting %d of %d processes (%s)", here, settings.processes, settings.strategy)
            command = [sys.executable, "-m", module, *arguments]
            variables = ranks(0, here, nodes, (address, store.port), cpu_threads)
            return run_processes(command, variables, others, watched=[])


def processes_here(settings: Distribution, node: Node | None) -> int:
    """How many processes of a training each node starts; raises DeviceError where its nodes cannot share them."""
    if node is None:
        return settings.processes
    if settings.strategy == "single" or settings.processes % node.count:
        raise DeviceError(
            f"{settings.processes} process(es) with strategy {settings.strategy} are not for {node.count} nodes",
            f"{KEY}.processes",
            f"set {KEY}.processes to {node.count} times the GPUs of a node, strategy: ddp or fsdp2, or unset {NODES}",
        )
    return settings.processes // node.count


def writes_files() -> bool:
    """Whether this process is the one that writes checkpoints, logs and outs: the first one, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_same_step(step: int) -> None:
    """Raise DeviceError unless all processes go on from this step; all of them must call it, once they are a group.

    A network file system may show a node an older state of the folder of checkpoints than another one, and a process of
    other settings or versions has another folder.
    """
    if not distributed.is_initialized():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(steps, torch.tensor([step], device=device))
    if len(found := [int(each) for each in steps]) != found.count(step):
        raise DeviceError(
            f"the processes would go on from steps {found}",
            "checkpoints, by rank",
            "see that all nodes share .cache and have the same versions and kind of GPU, then start all of them again",
        )


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


def ranks(rank: int, here: int, nodes: int, master: tuple[str, int], cpu_threads: int) -> list[dict[str, str]]:
    """The variables of each process of node `rank` of `nodes`; `master`: address and port of the store."""
    shared = {
        "WORLD_SIZE": here * nodes,
        "LOCAL_WORLD_SIZE": here,
        "MASTER_ADDR": master[0],
        "MASTER_PORT": master[1],
        # Every process is a client of the store, also rank 0.
        "TORCHELASTIC_USE_AGENT_STORE": True,
        # Unset, accelerate takes all cores: the number of threads is part of the result.
        "OMP_NUM_THREADS": cpu_threads,
        CALLER: os.getpid(),
    }
    if nodes == 1 and sys.platform == "linux":
        # Gloo would listen on the network that the machine's name belongs to.
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    each = [{**shared, "RANK": rank * here + local, "LOCAL_RANK": local} for local in range(here)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def run_processes(
    command: Sequence[str], variables: Sequence[dict[str, str]], others: Sequence[Member], watched: Sequence[Member]
) -> int:
    """Run `command` once for each set of variables; the exit code of the first member of the training that fails, or 0.

    It ends when these processes and `others` have. One that fails, also a `watched` one, takes the rest along.
    """
    children: list[subprocess.Popen[bytes]] = []
    with _signals_to(children):
        for own in variables:
            quiet = {"FINETUNE_LOG_LEVEL": "WARNING"} if own["RANK"] != "0" else {}
            # In a session of its own: Ctrl-C at the terminal would reach it a second time, past this process.
            children.append(subprocess.Popen(command, env={**os.environ, **own, **quiet}, start_new_session=True))
        return _wait([*children, *others], watched)


@contextmanager
def _signals_to(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to all children that run, the first one once to each, and leave no child behind."""
    seen: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        seen.append(number)
        if number == signal.SIGTERM and len(seen) == 1:
            time.sleep(EVERYBODY_S)
        for child in children:
            if len(seen) > 1 or not _has_been_told(child.pid):
                child.send_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()


def _has_been_told(pid: int) -> bool:
    """Whether a process has taken a signal as a wish to stop: from then on it handles none (training.interrupts)."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and not int(caught[1], 16) >> (signal.SIGINT - 1) & 1


def _wait(members: Sequence[Member], watched: Sequence[Member]) -> int:
    """The exit code of the first one that fails, or 0; the others are killed when they outlast it by GRACE_S."""
    code, until_s = 0, float("inf")
    while alive := [member for member in members if member.poll() is None]:
        if not code and (failed := [one.returncode for one in (*members, *watched) if one.poll()]):
            code, until_s = failed[0] or 1, time.monotonic() + GRACE_S
        if time.monotonic() > until_s:
            logger.warning("%d process(es) or node(s) still wait for one that failed: they are ended", len(alive))
            for member in alive:
                member.kill()
        time.sleep(POLL_S)
    code = code or next((member.returncode for member in members if member.returncode), 0)
    return code if code >= 0 else 128 - code


def _leave_group() -> None:
    """Gloo's threads, where they outlive the interpreter, end a process that has done its work with SIGABRT."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def _end_with_caller() -> None:
    """Let this process be killed when the one that started it ends, however it ends."""
    if CALLER not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[CALLER]):
        raise SystemExit(1)
