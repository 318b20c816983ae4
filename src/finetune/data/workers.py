"""One function over many items in several processes: results in the order of the items, few of them in memory at once.

The number of processes is environment, as it changes no result: FINETUNE_WORKERS, or every core this process may use.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

from finetune.errors import DataError, FinetuneError

WORKERS = "FINETUNE_WORKERS"
# Items handed out and not yet taken back, per worker: one being worked on, one waiting, so that no worker idles.
IN_FLIGHT = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    """A user error on its way back from a worker: an exception with its own arguments does not survive pickling."""

    kind: type[FinetuneError]
    what: str
    where: str
    remedy: str


def worker_count() -> int:
    """Processes to use: FINETUNE_WORKERS, else the cores of this process's CPU set; raises DataError."""
    wanted = os.environ.get(WORKERS, "")
    if not wanted:
        return len(os.sched_getaffinity(0))
    if not wanted.isdecimal() or int(wanted) == 0:
        raise DataError(f"{wanted!r} is not a number of processes", f"environment variable {WORKERS}", "set 1 or more")
    return int(wanted)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order, from fresh (spawned) processes.

    `function`, `initializer` and what they take and give must be picklable and importable without torch. Results that
    wait are bounded: two per worker. With one worker, or one item, all runs in this process. Raises what `function`
    raises, and DataError when a worker is killed.
    """
    source = iter(items)
    first = list(islice(source, worker_count()))
    if len(first) <= 1:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, chain(first, source))
        return
    pool = ProcessPoolExecutor(len(first), multiprocessing.get_context("spawn"), _start_worker, (initializer, initargs))
    try:
        yield from _in_order(pool, function, chain(first, source), IN_FLIGHT * len(first))
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most often because memory ran out",
            f"{len(first)} processes",
            f"free memory, or set {WORKERS} to a smaller number, and run again",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Item], size_of: Callable[[Item], int], max_size: int) -> Iterator[list[Item]]:
    """Group items in order, up to `max_size` a group but one item at least: a process costs more than a small item."""
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > max_size:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], in_flight: int
) -> Iterator[Result]:
    waiting: deque[Future[Result | _Failure]] = deque()
    for item in items:
        waiting.append(pool.submit(_attempt, function, item))
        if len(waiting) >= in_flight:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _attempt(function: Callable[[Item], Result], item: Item) -> Result | _Failure:
    try:
        return function(item)
    except FinetuneError as error:
        return _Failure(type(error), error.what, error.where, error.remedy)


def _result(future: Future[Result | _Failure]) -> Result:
    result = future.result()
    if isinstance(result, _Failure):
        raise result.kind(result.what, result.where, result.remedy)
    return result


def _start_worker(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole group: the parent ends the pool, the workers need not each print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    """A killed parent closes no pool, and its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
