"""What a killed run leaves in `.dvc/tmp` and in dvc.lock, and how each is cleared or mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc_repository import environment
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from voluptuous import Invalid

from finetune.doctor import locks
from finetune.doctor.lock_file import mend, merge_line, remember, tear
from finetune.doctor.locks import BusyError, ReadWriteLock, heal, living_run, parse_rwlock, sole_run
from finetune.errors import DataError

LOCK = """schema: '2.0'
stages:
  first:
    cmd: cp steps first
    deps:
    - path: steps
      hash: md5
      md5: 60b725f10c9c85c70d97880dfe8191b3
      size: 2
    params:
      params.yaml:
        seed: 42
    outs:
    - path: first
      hash: md5
      md5: 6b2ded51d81a4403d8a4bd25fa1e57ee
      size: 4
  second:
    cmd: a very long command that is folded over two lines by the YAML writer, as soon as it gets longer
      than eighty characters
    outs:
    - path: second
      hash: md5
      md5: 6b2ded51d81a4403d8a4bd25fa1e57ee.dir
      size: 4
      nfiles: 2
"""
# A number that no process has: beyond the largest that Linux gives.
DEAD = 2**22 + 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


def rwlock(pid: int) -> str:
    return json.dumps({"read": {"/a": [{"pid": pid, "cmd": "dvc repro"}]}, "write": {"/b": {"pid": pid, "cmd": "dvc"}}})


def test_the_holders_of_the_rwlock_are_read() -> None:
    assert parse_rwlock(rwlock(12)) == ReadWriteLock((12,), torn=False)
    assert parse_rwlock("{}") == ReadWriteLock((), torn=False)


@pytest.mark.parametrize("content", ["", '{"read": {"/a": [{"pid": 1', '["a"]', '{"write": {"/b": 3}}', "\0\0"])
def test_a_torn_rwlock_is_recognised(content: str) -> None:
    assert parse_rwlock(content) == ReadWriteLock((), torn=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (rwlock(DEAD), f"removed .dvc/tmp/rwlock, of dead PID {DEAD}"),
        # Such a number always exists, and DVC believes for ever that its run does.
        (rwlock(os.getpid()), f"removed .dvc/tmp/rwlock, of dead PID {os.getpid()}"),
        ('{"read": {"/a"', "removed .dvc/tmp/rwlock, cut while it was written"),
    ],
    ids=["dead", "number in use again", "torn"],
)
def test_a_stale_rwlock_is_removed(root: Path, content: str, said: str) -> None:
    (root / ".dvc/tmp/rwlock").write_text(content)
    assert heal(root) == [said]
    assert not (root / ".dvc/tmp/rwlock").exists()
    assert heal(root) == []


def test_an_rwlock_without_holders_is_left(root: Path) -> None:
    (root / ".dvc/tmp/rwlock").write_text("{}")
    assert heal(root) == []
    assert (root / ".dvc/tmp/rwlock").exists()


def test_a_living_process_that_is_no_dvc_is_no_run_of_its_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / ".dvc/tmp/rwlock").write_text(rwlock(os.getpid()))
    assert living_run(root) == []


def test_dvcs_own_lock_is_waited_for_and_its_holder_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "DVC_LOCK_WAIT_S", 0.3)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code = f"{hold}; print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(root / ".dvc/tmp/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            BusyError, match=rf"another DVC is at work in this folder\n  where: .*held by PID {other.pid} "
        ):
            heal(root)
        other.communicate("\n")
    assert heal(root) == []


def test_one_folder_has_one_run(root: Path) -> None:
    with sole_run(root):
        refused = take(root)
    assert refused.returncode == 1
    assert refused.stderr.startswith("another run is at work in this folder\n  where: ")
    assert f"held by PID {os.getpid()} " in refused.stderr
    assert take(root).stderr == "taken\n"


def take(root: Path, *before: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, pathlib\n"
        "from finetune.doctor.locks import BusyError, sole_run\n"
        "try:\n"
        "    with sole_run(pathlib.Path(sys.argv[1])):\n"
        "        sys.stderr.write('taken\\n')\n"
        "except BusyError as error:\n"
        "    sys.stderr.write(f'{error}\\n')\n"
        "    sys.exit(1)\n"
    )
    command = [*before, sys.executable, "-c", code, str(root)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_the_lock_that_the_containers_entry_point_took_is_this_runs(root: Path) -> None:
    (root / ".dvc/tmp/pipeline.flock").touch()
    shell = f'exec 9>{root}/.dvc/tmp/pipeline.flock; flock --nonblock 9 || exit 9; "$@"'
    assert take(root, "bash", "-c", shell, "bash").stderr == "taken\n"
    assert take(root).stderr == "taken\n"


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a DVC repository"), sole_run(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is empty"),
        (LOCK[:100], "it ends in the middle of a line"),
        ("\0" * 64, "it ends in the middle of a line"),
        ("\0" * 64 + "\n", "it is not YAML"),
        ("schema: '2.0'\nstages:\n", "it has no schema and stages"),
        ("stages: {}\n", "it has no schema and stages"),
        ("schema: '2.0'\nstages:\n  first:\n", "the entry of stage first is incomplete"),
        ("schema: '2.0'\nstages:\n  first:\n    cmd: a\n    deps:\n", "the entry of stage first is incomplete"),
    ],
)
def test_a_torn_dvc_lock_is_recognised(content: str, reason: str) -> None:
    assert (tear(content.encode()) or "").startswith(reason)


def test_a_whole_dvc_lock_is_not_torn() -> None:
    assert tear(LOCK.encode()) is None
    assert tear(b"schema: '2.0'\n") is None


def test_no_cut_that_stops_dvc_is_taken_for_whole() -> None:
    stopped = [cut for cut in range(len(LOCK)) if stops_dvc(LOCK[:cut])]
    assert len(stopped) == 208
    assert [LOCK[:cut][-40:] for cut in stopped if tear(LOCK[:cut].encode()) is None] == []


def stops_dvc(text: str) -> bool:
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text) or {})
    except (YAMLError, Invalid):
        return True
    return False


def test_a_torn_dvc_lock_is_restored_from_the_last_runs_copy(root: Path) -> None:
    (root / "dvc.lock").write_text(LOCK)
    remember(root)
    (root / "dvc.lock").write_text(LOCK[:200])
    remember(root)
    (done,) = heal(root)
    assert done.startswith(
        "dvc.lock was cut while DVC wrote it (it ends in the middle of a line); restored from the copy"
    )
    assert (root / "dvc.lock").read_text() == LOCK
    assert (root / ".dvc/tmp/dvc.lock.torn").read_text() == LOCK[:200]
    assert mend(root) is None


def test_a_torn_dvc_lock_is_restored_from_git(root: Path) -> None:
    (root / "dvc.lock").write_text(LOCK)
    for command in (["init", "--quiet"], ["add", "dvc.lock"], ["commit", "--quiet", "--message", "x"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    (root / "dvc.lock").write_text("")
    assert "restored from git's last commit" in (mend(root) or "")
    assert (root / "dvc.lock").read_text() == LOCK


def test_a_torn_dvc_lock_that_nobody_has_whole_is_removed(root: Path) -> None:
    (root / "dvc.lock").write_text(LOCK[:50])
    assert "restored from nothing, since git has none" in (mend(root) or "")
    assert not (root / "dvc.lock").exists()


def test_merge_marks_are_for_a_person(root: Path) -> None:
    text = LOCK.replace("      size: 2\n", "<<<<<<< HEAD\n      size: 2\n=======\n      size: 3\n>>>>>>> other\n")
    assert merge_line(LOCK.encode()) is None
    assert merge_line(text.encode()) == 9
    (root / "dvc.lock").write_text(text)
    with pytest.raises(DataError, match=r"merge marks\n  where: .*dvc.lock:9\n  remedy: git checkout HEAD -- dvc.lock"):
        heal(root)
    assert (root / "dvc.lock").read_text() == text
