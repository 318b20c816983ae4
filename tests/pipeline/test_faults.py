"""Faults of the pipeline around training: stages killed under DVC, files damaged between stages.

A killed or failed training is in tests/unit/training, DVC's own files in tests/unit/doctor.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clone import ROOT, clone, out_hashes, run

from finetune.io import sha256_tree

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(600)]
OUTS = ("data/raw", "data/clean")
LIMIT_S = 120.0
# Two stages: the first one's out stands for packed rows, a base made here or an adapter.
PIPELINE = """
stages:
  train:
    cmd: cp given adapter && echo train >> log
    deps: [given]
    outs: [adapter]
  merge:
    cmd: cp adapter merged && echo merge >> log
    deps: [adapter]
    outs: [merged]
"""


def repro(folder: Path, *stages: str) -> str:
    """As `make repro`."""
    done = run([sys.executable, "-m", "finetune.doctor.repro", *stages], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(folder: Path, *stages: str) -> subprocess.Popen[bytes]:
    """`dvc repro` in a group of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *stages],
        cwd=folder,
        env={**kept, "PATH": path, "PYTHONPATH": str(folder / "src"), "DVC_NO_ANALYTICS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this tree in which fetch and clean ran."""
    folder = clone(tmp_path_factory.mktemp("whole"))
    repro(folder, "clean")
    return folder


@pytest.mark.parametrize("stage", ["fetch", "clean"])
def test_kill_9_of_everything_while_a_stage_writes_and_the_next_run_ends_in_the_same_bytes(
    stage: str, whole: Path, tmp_path: Path
) -> None:
    folder = clone(tmp_path)
    out = folder / {"fetch": "data/raw", "clean": "data/clean"}[stage]
    process = start(folder, stage)
    end = time.monotonic() + LIMIT_S
    while not (out.is_dir() and any(out.rglob("*"))):
        assert process.poll() is None, f"{stage} ended before it was killed"
        assert time.monotonic() < end, f"{stage} wrote nothing"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    repro(folder, "clean")
    assert {name: sha256_tree(folder / name) for name in OUTS} == {name: sha256_tree(whole / name) for name in OUTS}
    # Half written files have such names, and nothing else has.
    assert [path for path in (folder / "data").rglob("*") if path.name.endswith(".partial")] == []
    killed, undisturbed = out_hashes(folder), out_hashes(whole)
    assert killed["data/clean"] == undisturbed["data/clean"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with the two stages above, and this one's configuration of DVC; both ran."""
    folder = tmp_path / "small"
    folder.mkdir()
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True)
    config = (ROOT / ".dvc/config").read_text(encoding="utf-8")
    config = config.replace("[core]\n", "[core]\n    site_cache_dir = .dvc/site\n")
    (folder / ".dvc/config").write_text(config, encoding="utf-8")
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "given").write_bytes(bytes(range(256)) * 64)
    repro(folder)
    (folder / "log").unlink()
    return folder


def damage(path: Path, how: str, *, touched: bool) -> None:
    """Flip a bit or cut the file; if not `touched`, as a disk does, which changes no time."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    # In place: where DVC links, its cache has the same bytes.
    with path.open("r+b") as handle:
        handle.write(content)
        handle.truncate(len(content) // 2 if how == "cut" else len(content))
    if not touched:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("how", "touched"), [("bit", True), ("cut", True), ("cut", False)])
def test_a_changed_out_is_noticed_by_the_next_run_and_comes_back(how: str, touched: bool, small: Path) -> None:
    damage(small / "adapter", how, touched=touched)
    repro(small)
    assert (small / "adapter").read_bytes() == (small / "given").read_bytes() == (small / "merged").read_bytes()


def test_a_bit_that_the_disk_flips_without_a_trace_is_not_noticed_by_dvc(small: Path) -> None:
    """DVC knows a file by inode, size and time; its full check is asked for by removing what it knows."""
    damage(small / "adapter", "bit", touched=False)
    repro(small)
    assert (small / "adapter").read_bytes() != (small / "given").read_bytes()
    assert not (small / "log").exists()
