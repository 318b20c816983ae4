"""`make gc`: what nothing names is shown with its size, deleted only when asked, and what somebody may want stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lineage_repository import git
from mirror_runs import make_database
from rebuilt_repository import Repository, make_repository

from finetune import cleanup
from finetune.errors import DataError
from finetune.io import sha256_tree


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("repository")
    return make_repository(folder / "repository", f"sqlite:///{make_database(folder)}")


def write(path: Path, mib: int) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(mib << 20))
    return path


def objects(root: Path) -> set[Path]:
    return {path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file()}


@contextmanager
def a_run_at_work(root: Path) -> Iterator[None]:
    """Another process that holds the folder, as `make repro` does."""
    program = "import sys, pathlib, finetune.doctor.locks as locks\n"
    program += "with locks.sole_run(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("")


def test_what_a_commit_names_stays_and_the_rest_goes_only_when_asked(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = repository.folder
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(root)
    named = objects(root)
    # Only the commit names them now: the workspace's own dvc.lock is gone.
    (root / "dvc.lock").unlink()
    unnamed = write(root / ".dvc/cache/files/md5/ab" / ("c" * 30), 3)
    split = root / "data/split"
    split.mkdir()
    (split / "rows").write_text("rows")
    current = write(root / ".cache/rows" / sha256_tree(split)[:16] / "packed.arrow", 1)
    stale = write(root / ".cache/rows/0123456789abcdef/packed.arrow", 2)
    stopped = write(root / ".cache/checkpoints/aaaa/checkpoint-40/tensors", 4)
    kept_tree = write(root / ".cache/rebuild/finetune-smoke-1/file", 1)
    assert cleanup.main([]) == 0
    shown = capsys.readouterr().out
    assert "3.0 MiB  can go  objects of DVC's cache that no commit and no experiment names" in shown
    assert "2.0 MiB  can go  rows of killed trainings whose data has changed since" in shown
    assert "4.0 MiB  stays   checkpoints of a stopped training, step 40" in shown
    assert f"rm -r {stopped.parents[1]}" in shown
    assert "5.0 MiB  in all can go" in shown
    assert "this deletes what can go: make gc CONFIRM=1" in shown
    assert all(path.exists() for path in (unnamed, current, stale, stopped, kept_tree))
    with a_run_at_work(root):
        assert cleanup.main(["--delete"]) == 1
    assert "another run is at work in this folder" in capsys.readouterr().err
    assert unnamed.exists()
    assert cleanup.main(["--delete"]) == 0
    assert "deleted: 5.0 MiB; remotes are as they were" in capsys.readouterr().err
    assert [path.exists() for path in (unnamed, current, stale, stopped, kept_tree)] == [False, True, False, True, True]
    assert objects(root) == named
    assert cleanup.main([]) == 0
    assert "nothing can go: all of it is named by a commit" in capsys.readouterr().out
    git(root, "checkout", "--", "dvc.lock")
    for folder in (".cache", "data/split"):
        shutil.rmtree(root / folder)


def test_a_finished_training_goes_once_dvc_has_its_adapter(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository.folder
    write(root / ".cache/checkpoints/bbbb/checkpoint-5/tensors", 1)
    (root / ".cache/checkpoints/bbbb/finished.json").write_text("true")
    monkeypatch.setattr(cleanup, "unused_objects", lambda _root: ())
    (found,) = cleanup.find_leftovers(root)
    assert (found.what, found.deletable) == ("checkpoint of a finished training", True)
    adapter = root / "models/adapter/Modelfile"
    kept = adapter.read_bytes()
    adapter.chmod(0o644)
    # Written anew: the file in the cache may be the same one by a link.
    adapter.unlink()
    adapter.write_bytes(b"trained, and DVC was killed before it recorded this")
    (found,) = cleanup.find_leftovers(root)
    assert (found.what, found.deletable) == (
        "checkpoint of a finished training, which DVC has not recorded yet",
        False,
    )
    adapter.write_bytes(kept)


def test_a_shallow_clone_cannot_tell(repository: Repository, tmp_path: Path) -> None:
    (repository.folder / "more").write_text("x")
    git(repository.folder, "add", "more")
    git(repository.folder, "commit", "--quiet", "--message", "More")
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{repository.folder}", "shallow")
    with pytest.raises(DataError, match="this is a shallow clone"):
        cleanup.unused_objects(tmp_path / "shallow")
