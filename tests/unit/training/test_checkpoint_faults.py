"""A training that dies at anything it does to the disk ends, started again, in the bytes of one that did not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from disk_events import copy_of
from fault_runs import (
    DEATHS_IN_EPOCH_1,
    DEATHS_IN_EPOCH_2,
    INTERRUPTED,
    KILLED,
    LAST,
    POWER_FAILURES,
    STOPPED,
    TERMINATED,
    Whole,
    hashes,
    log_of,
    start_again,
)
from faulty_run import STEPS_PER_EPOCH, Forks

from finetune.training import checkpoint


def die_and_start_again(forks: Forks, whole: Whole, place: Path, fatal: int, *, power_fails: bool) -> dict[str, str]:
    """The hashes of a run that died at event number `fatal` and was started again."""
    copy_of(whole.snapshot, place / "run")
    code = forks.run(
        place / "run", place / "out", count_from=whole.count_from, fatal=fatal, power_fails=power_fails, **whole.job
    )
    assert code == KILLED, f"{code} at {whole.events[fatal]}"
    ended = start_again(forks, place, **whole.job)
    shutil.rmtree(place)
    return ended


def deaths(whole: Whole, until: int, *, power_fails: bool) -> list[int]:
    """The events to die at, of the first `until`: where the power fails, those that count on flushed files.

    A flush changes nothing that a process sees, and where a file is written in one go it is opened.
    """
    chosen = ("flush", "rename", "remove") if power_fails else ("write", "rename", "remove", "rmdir", "mkdir", "open")
    written = {event.removeprefix("write ") for event in whole.events[:until] if event.startswith("write ")}
    return [
        number
        for number, event in enumerate(whole.events[:until])
        if event.startswith(chosen) and event.removeprefix("open ") not in written
    ]


@pytest.mark.parametrize(
    ("logged", "power_fails", "events", "among_them"),
    [
        (
            1,
            False,
            DEATHS_IN_EPOCH_1,
            ["write .checkpoint-1.partial/tensors-00001.safetensors", "rename .checkpoint-1.partial checkpoint-1"],
        ),
        (
            4,
            False,
            DEATHS_IN_EPOCH_2,
            ["rename checkpoint-2 .checkpoint-2.dropped", "remove .checkpoint-2.dropped/manifest.json"],
        ),
        (4, True, POWER_FAILURES, ["flush .checkpoint-4.partial/tensors-00001.safetensors", "flush train_log.jsonl"]),
    ],
    ids=["in epoch 1", "in epoch 2", "power failure in epoch 2"],
)
def test_death_at_every_write_of_a_checkpoint(
    logged: int, power_fails: bool, events: int, among_them: list[str], forks: Forks, tmp_path: Path
) -> None:
    whole = Whole(forks, tmp_path / "whole", logged)
    until = whole.until[logged + 1]
    fatal = deaths(whole, until, power_fails=power_fails)
    assert len(fatal) == events, [whole.events[number] for number in fatal]
    assert set(among_them) <= {whole.events[number] for number in fatal}
    ended = {
        f"{number} {whole.events[number]}": die_and_start_again(
            forks, whole, tmp_path / str(number), number, power_fails=power_fails
        )
        for number in fatal
    }
    assert {event: found for event, found in ended.items() if found != whole.hashes} == {}


def test_death_while_the_outs_are_written_and_the_checkpoints_removed(forks: Forks, tmp_path: Path) -> None:
    whole = Whole(forks, tmp_path / "whole", LAST)
    fatal = deaths(whole, len(whole.events), power_fails=False)
    named = {whole.events[number] for number in fatal}
    assert {"write adapter/adapter_model.safetensors", "rename .train_log.csv.partial train_log.csv"} <= named
    ended = {
        f"{number} {whole.events[number]}": die_and_start_again(
            forks, whole, tmp_path / str(number), number, power_fails=False
        )
        for number in fatal
    }
    assert len(ended) >= 12
    assert {event: found for event, found in ended.items() if found != whole.hashes} == {}


def test_death_while_the_best_weights_are_kept_for_early_stopping(forks: Forks, tmp_path: Path) -> None:
    whole = Whole(forks, tmp_path / "whole", 3, early_stopping=1)
    assert "the weights of step 4 are kept" in whole.log
    fatal = [
        number for number in deaths(whole, whole.until[4] + 12, power_fails=False) if "best" in whole.events[number]
    ]
    assert "rename best/.checkpoint-4.partial best/checkpoint-4" in [whole.events[number] for number in fatal]
    ended = {
        whole.events[number]: die_and_start_again(forks, whole, tmp_path / str(number), number, power_fails=False)
        for number in fatal
    }
    assert {event: found for event, found in ended.items() if found != whole.hashes} == {}


@pytest.mark.parametrize("step", range(1, LAST + 1))
def test_kill_9_at_any_step(step: int, whole: Whole, forks: Forks, tmp_path: Path) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", signals={step: ["SIGKILL"]}) == KILLED
    assert start_again(forks, tmp_path) == whole.hashes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, 5])
def test_a_signal_saves_the_step_it_came_in_and_exits_75(
    step: int, name: str, whole: Whole, forks: Forks, tmp_path: Path
) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", signals={step: [name]}) == STOPPED
    shown = log_of(tmp_path)
    assert f"{name}: stopping after this step, with a checkpoint; once more stops at once" in shown
    assert f"StoppedError: {name} at step {step} of {LAST}; it is saved" in shown
    newest = checkpoint.newest_intact(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"checkpoint-{step}"
    assert start_again(forks, tmp_path) == whole.hashes


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", TERMINATED), ("SIGINT", INTERRUPTED)])
def test_a_second_signal_ends_the_process_at_once(
    name: str, code: int, whole: Whole, forks: Forks, tmp_path: Path
) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", signals={5: [name, name]}) == code
    newest = checkpoint.newest_intact(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    assert start_again(forks, tmp_path) == whole.hashes


def test_a_signal_in_the_last_step_does_not_keep_the_run_from_its_end(
    whole: Whole, forks: Forks, tmp_path: Path
) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", signals={LAST: ["SIGTERM"]}) == 0
    assert hashes(tmp_path / "out") == whole.hashes


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damages(newest: Path) -> dict[str, Callable[[], object]]:
    """Every way in which a checkpoint of this test may be damaged, by name."""
    files = sorted(newest.iterdir())
    every: dict[str, Callable[[], object]] = {}
    for file in files:
        every[f"{file.name} missing"] = file.unlink
        every[f"{file.name} empty"] = partial(file.write_bytes, b"")
        every[f"{file.name} cut"] = partial(os.truncate, file, file.stat().st_size // 2)
        every[f"{file.name} one bit"] = partial(flip_a_bit, file)
    every["one file more"] = partial((newest / "more.json").write_text, "{}")
    every["no file"] = partial(rename_away, newest)
    return every


def rename_away(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def test_a_damaged_newest_checkpoint_is_passed_over_and_written_again(forks: Forks, tmp_path: Path) -> None:
    """Every damage is seen; the run goes on from the older one, and in the same bytes as a run without damage."""
    whole = Whole(forks, tmp_path / "whole", 5)
    assert sorted(path.name for path in whole.snapshot.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    names = list(damages(whole.snapshot / "checkpoint-4"))
    assert len(names) == 4 * 4 + 2
    ended: dict[str, object] = {}
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        copy_of(whole.snapshot, place / "run")
        damages(place / "run/checkpoint-4")[name]()
        if checkpoint.newest_intact(place / "run") != place / "run/checkpoint-3":
            ended[name] = "not seen"
        # Not every damage needs a run of its own to its end: one of each kind has it.
        if not name.startswith(("state", "trainer_state")):
            code = forks.run(place / "run", place / "out")
            log = log_of(place)
            if code or "checkpoint-4 is incomplete or damaged: passed over" not in log:
                ended[name] = log
            elif hashes(place / "out") != whole.hashes:
                ended[name] = hashes(place / "out")
    assert ended == {}
