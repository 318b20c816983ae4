from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.reproduction import explain, machine_facts, unreproduced

LOCK = """schema: '2.0'
stages:
  first:
    cmd: make first
    deps: [{path: raw, md5: aa}]
    outs: [{path: one, md5: "11"}]
  second:
    cmd: make second
    deps: [{path: one, md5: "11"}]
    outs: [{path: two, md5: "22"}, {path: three, md5: "33"}]
"""


def repository(folder: Path, present: str) -> Path:
    (folder / "dvc.lock").write_text(LOCK)
    (folder / "requirements").mkdir()
    (folder / "requirements/lock.txt").write_text("# comment\npydantic==0.0.1\nno-such-package==1.0\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "dvc.lock").write_text(present)
    return folder


def test_equal_bytes_are_confirmed(tmp_path: Path) -> None:
    assert explain(repository(tmp_path, LOCK)).startswith("reproduced: 2 of 2 stages gave the committed bytes")


def test_the_first_stage_that_parted_is_named_with_its_outs_and_the_machine(tmp_path: Path) -> None:
    text = explain(repository(tmp_path, LOCK.replace('md5: "11"', 'md5: "99"').replace('md5: "22"', 'md5: "98"')))
    assert "not reproduced: first had the committed inputs and gave other bytes: one\n" in text
    assert "second" not in text
    assert "AVX2" in text
    assert "pydantic is 2." in text
    assert "no-such-package" not in text


def test_other_inputs_are_no_failure_to_reproduce() -> None:
    before = {"a": {"cmd": "x", "params": {"p": 1}, "outs": [{"path": "o", "md5": "1"}]}}
    after = {"a": {"cmd": "x", "params": {"p": 2}, "outs": [{"path": "o", "md5": "2"}]}}
    assert unreproduced(before, after) == {}


def test_outside_git_there_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(LOCK)
    assert explain(tmp_path) == ""


def test_the_machine_has_a_processor_and_the_compilers_of_its_setup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/lock.txt").write_text("")
    (tmp_path / "llama-compilers.txt").write_text("cc: gcc 12\nc++: g++ 12\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    facts = machine_facts(tmp_path)
    assert facts[0].startswith("  processor: ")
    assert facts[-2:] == ["  llama.cpp was built with cc: gcc 12", "  llama.cpp was built with c++: g++ 12"]
