"""SIGTERM, a lost terminal, a killed DVC: the stage saves, nothing is left behind, and the exit code says go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc_repository import child_of, kill, long_run, start, wait_for_stage

from finetune.doctor.processes import orphaned_stages


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield from long_run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_waits_for_the_stage_to_save_and_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    run = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder)
    run.send_signal(number)
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 75
    assert f"repro: {number.name}: the stage saves what it has and ends; please wait" in shown
    assert "repro: stopped; `make repro` goes on from what was saved" in shown
    assert int((folder / "state").read_text()) > 0
    assert orphaned_stages(folder) == []
    assert (folder / ".dvc/tmp/rwlock").read_text() == "{}" or not (folder / ".dvc/tmp/rwlock").exists()


def test_a_sigterm_to_every_process_stops_the_stage_once(folder: Path) -> None:
    run = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder)
    dvc = child_of(run.pid)
    run.send_signal(signal.SIGTERM)
    os.killpg(dvc, signal.SIGTERM)
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 75, shown
    assert int((folder / "state").read_text()) > 0
    assert orphaned_stages(folder) == []
    assert not (folder / ".dvc/tmp/rwlock").exists()


def test_a_killed_dvc_takes_its_stage_along_in_order(folder: Path) -> None:
    run = start(folder, "finetune.doctor.repro")
    wait_for_stage(folder)
    kill(child_of(run.pid))
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert "repro: DVC was killed (SIGKILL); `make repro` goes on from what was saved" in shown
    assert int((folder / "state").read_text()) > 0
    assert not (folder / ".dvc/tmp/rwlock").exists()
