"""DVC and its stages killed for real: the next run goes on by itself, alone, and a stop is an orderly one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc_repository import child_of, kill, long_run, repro, start, wait_for_stage, wait_until

from finetune.doctor.processes import orphaned_stages


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield from long_run(tmp_path)


def starts(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder / "log").read_text().splitlines()]


def finish_soon(folder: Path) -> None:
    """Let the next start of the stage end after a few steps beyond what was saved."""
    saved = int((folder / "state").read_text())
    (folder / "steps").write_text(str(saved + 3))


def test_plain_dvc_starts_a_second_stage_beside_the_one_of_a_killed_run(folder: Path) -> None:
    first = start(folder, "dvc", "repro")
    wait_for_stage(folder)
    kill(first.pid)
    first.wait()
    second = start(folder, "dvc", "repro")
    wait_for_stage(folder, entries=2)
    alone = orphaned_stages(folder)
    os.killpg(second.pid, signal.SIGINT)
    for process in alone:
        os.kill(process.pid, signal.SIGINT)
    second.wait()
    wait_until(lambda: orphaned_stages(folder) == [])
    assert {process.stage for process in alone} == {"train"}
    assert starts(folder) == [0, 0]


def test_after_kill_9_of_everything_the_next_run_stops_the_stage_left_over_and_goes_on(folder: Path) -> None:
    run = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder)
    dvc = child_of(run.pid)
    kill(run.pid)
    code, shown = repro(folder)
    assert code == 1
    assert (
        f"another run is at work in this folder\n  where:  {folder}/.dvc/tmp/pipeline.flock, held by PID {dvc} "
        in shown
    )
    assert f"kill -INT -- -{dvc}" in shown
    kill(dvc)
    wait_until(lambda: orphaned_stages(folder) != [])
    # What a kill in the middle of their writing leaves: DVC writes both in place.
    (folder / ".dvc/tmp/rwlock").write_text("")
    whole = (folder / "dvc.lock").read_bytes()
    (folder / "dvc.lock").write_bytes(whole[: len(whole) // 2])
    second = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder, entries=2)
    assert orphaned_stages(folder) == []
    second.send_signal(signal.SIGTERM)
    shown, _ = second.communicate(timeout=60)
    assert second.returncode == 75
    assert "repro: stopped what a killed run left at work: train" in shown
    assert "repro: removed .dvc/tmp/rwlock, cut while it was written" in shown
    assert "repro: dvc.lock was cut while DVC wrote it" in shown
    assert starts(folder)[0] == 0
    assert starts(folder)[1] > 0
    assert "Running stage 'first'" not in shown
    finish_soon(folder)
    code, shown = repro(folder)
    assert (code, (folder / "out").read_text()) == (0, "done")
    assert repro(folder)[1].count("didn't change, skipping") == 2


def test_a_run_beside_a_living_one_is_refused_however_that_was_started(folder: Path) -> None:
    by_hand = start(folder, "dvc", "repro")
    wait_for_stage(folder)
    code, shown = repro(folder)
    assert code == 1
    assert (
        f"another DVC is at work in this folder\n  where:  {folder}/.dvc/tmp/rwlock, held by PID {by_hand.pid} "
        in shown
    )
    assert (
        f"remedy: wait: tail --pid={by_hand.pid} -f /dev/null; or stop it, which saves a checkpoint: kill -INT" in shown
    )
    os.killpg(by_hand.pid, signal.SIGINT)
    by_hand.wait()
    run = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder, entries=2)
    code, shown = repro(folder)
    assert code == 1
    assert f"pipeline.flock, held by PID {run.pid} " in shown
    assert f"kill -INT {run.pid}" in shown
    run.send_signal(signal.SIGINT)
    assert run.wait() == 75
    assert len(starts(folder)) == 2
