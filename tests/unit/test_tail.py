"""What a growing file of JSON lines gives to a curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.tracking.tail import Tail


def entry(step: int, **figures: Any) -> str:
    return json.dumps({"step": step, "time_s": 1000 + step / 8, **figures}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text(entry(1, loss=4.0) + entry(2, loss=3.0) + entry(3, loss=2.0))
    return path


def steps(tail: Tail, most: int = 100) -> list[int]:
    """Read on, accept it, and give the steps."""
    lines = tail.unread(most)
    if lines:
        tail.accept(lines)
    return [step for _, _, _, step in tail.points(lines)]


def test_a_point_has_its_own_time_and_step(log: Path) -> None:
    tail = Tail(log, "system/")
    assert tail.points(tail.unread(1)) == [("system/loss", 4.0, 1000125, 1)]


def test_only_numbers_are_figures() -> None:
    line = entry(7, loss=0.5, tokens=12, validation=None, rows=[1], name="x", on=True, process=1, tokens_seconds=2.0)
    assert Tail(Path("x")).points([line.encode()]) == [("loss", 0.5, 1000875, 7), ("tokens", 12.0, 1000875, 7)]


def test_lines_come_once_in_order_and_again_until_they_are_accepted(log: Path) -> None:
    tail = Tail(log)
    assert len(tail.unread(2)) == len(tail.unread(2)) == 2
    assert (steps(tail, 2), steps(tail, 2), steps(tail)) == ([1, 2], [3], [])
    with log.open("a") as handle:
        handle.write(entry(4, loss=1.0) + entry(5, loss=1.0)[:9])
    assert steps(tail) == [4]
    with log.open("a") as handle:
        handle.write(entry(5, loss=1.0)[9:])
    assert steps(tail) == [5]


def test_a_line_torn_by_a_crash_is_passed_over(log: Path) -> None:
    with log.open("a") as handle:
        handle.write('{"step": 4, "lo\n\x00\n' + entry(5, loss=1.0))
    assert steps(Tail(log)) == [1, 2, 3, 5]


@pytest.mark.parametrize("kept", [0, 2])
def test_a_log_that_was_cut_and_grew_again_begins_anew(log: Path, kept: int) -> None:
    tail = Tail(log)
    steps(tail)
    lines = log.read_text().splitlines(keepends=True)[:kept]
    added = [entry(step, loss=9.0) for step in range(kept + 1, 6)]
    temporary = log.with_name("new")
    temporary.write_text("".join([*lines, *added]))
    temporary.replace(log)
    assert steps(tail) == [1, 2, 3, 4, 5]


def test_a_missing_file_has_no_lines_yet(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log.jsonl")
    assert steps(tail) == []
    (tmp_path / "log.jsonl").write_text(entry(1, loss=1.0))
    assert steps(tail) == [1]
