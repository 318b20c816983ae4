import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.data.workers import batches, ordered_map, worker_count
from finetune.errors import DataError

TESTS = Path(__file__).parent


def square(number):
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def refuse(number):
    if number == 3:
        raise DataError("row is bad", "file:3", "mend it")
    return number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def keep_offset(offset):
    os.environ["OFFSET_OF_TEST_WORKERS"] = str(offset)


def add_offset(number):
    return number + int(os.environ["OFFSET_OF_TEST_WORKERS"])


def loaded_modules(_):
    return [name for name in ("torch", "transformers", "mlflow") if name in sys.modules]


@pytest.mark.parametrize(("workers", "processes"), [("1", 1), ("2", 2)])
def test_results_come_in_the_order_of_the_items(monkeypatch, workers, processes):
    monkeypatch.setenv("FINETUNE_WORKERS", workers)
    results = list(ordered_map(square, range(12)))
    assert [number for number, _ in results] == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121]
    pids = {pid for _, pid in results}
    assert len(pids) == processes
    assert (os.getpid() in pids) == (processes == 1)


def test_one_item_needs_no_process_and_none_gives_nothing(monkeypatch):
    monkeypatch.setenv("FINETUNE_WORKERS", "2")
    assert list(ordered_map(square, [3])) == [(9, os.getpid())]
    assert list(ordered_map(square, [])) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_user_error_keeps_its_three_parts(monkeypatch, workers):
    monkeypatch.setenv("FINETUNE_WORKERS", workers)
    with pytest.raises(DataError, match="row is bad") as caught:
        list(ordered_map(refuse, range(6)))
    assert (caught.value.where, caught.value.remedy) == ("file:3", "mend it")


def test_a_killed_worker_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setenv("FINETUNE_WORKERS", "2")
    with pytest.raises(DataError, match="a worker process was killed"):
        list(ordered_map(die, range(4)))


def test_items_are_taken_only_a_few_ahead_of_the_results(monkeypatch):
    monkeypatch.setenv("FINETUNE_WORKERS", "2")
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    results = ordered_map(square, items())
    next(results)
    assert len(taken) == 4
    results.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_initializer_runs_where_the_function_runs(monkeypatch, workers):
    monkeypatch.setenv("FINETUNE_WORKERS", workers)
    monkeypatch.setenv("OFFSET_OF_TEST_WORKERS", "0")
    assert list(ordered_map(add_offset, [1, 2], initializer=keep_offset, initargs=(10,))) == [11, 12]


def test_workers_load_no_heavy_module(monkeypatch):
    monkeypatch.setenv("FINETUNE_WORKERS", "2")
    assert list(ordered_map(loaded_modules, [0, 1])) == [[], []]


def test_the_workers_of_a_killed_parent_end(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_workers as tests; from itertools import count; "
        "from finetune.data.workers import ordered_map\n"
        "for _, pid in ordered_map(tests.square, count()): print(pid, flush=True)"
    )
    environment = {**os.environ, "FINETUNE_WORKERS": "2"}
    command = [sys.executable, "-c", program, str(TESTS)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        pids = {int(parent.stdout.readline()) for _ in range(8)}
        parent.kill()
    deadline = time.monotonic() + 20
    while pids and time.monotonic() < deadline:
        pids = {pid for pid in pids if Path(f"/proc/{pid}").exists()}
        time.sleep(0.05)
    assert not pids


def test_the_count_comes_from_the_environment_or_the_cores(monkeypatch):
    monkeypatch.setenv("FINETUNE_WORKERS", "7")
    assert worker_count() == 7
    monkeypatch.delenv("FINETUNE_WORKERS")
    assert worker_count() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("FINETUNE_WORKERS", "many")
    with pytest.raises(DataError, match="'many' is not a number of processes"):
        worker_count()


def test_small_items_go_together_and_a_large_one_alone():
    assert list(batches([1, 2, 3, 9, 1, 1], int, 5)) == [[1, 2], [3], [9], [1, 1]]
    assert list(batches([], int, 5)) == []
