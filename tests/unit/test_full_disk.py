"""A file system of a few KiB, really full: no stage leaves half a file, the last good one stays, the error says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from small_disk import in_small_disk, no_small_disks
from training_settings import make_lora

from finetune.training.model import add_adapter, load_base, save_adapter
from finetune.training.vocabulary import Extension

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(bool(no_small_disks()), reason=no_small_disks())


def write_on_full_disk(kind: str, folder: Path, base: Path, adapter: Path) -> tuple[int, list[tuple[str, int]], str]:
    """Exit code, the files that are left with their sizes, and the log."""
    folder.mkdir()
    command = [
        sys.executable,
        str(Path(__file__).with_name("full_disk.py")),
        kind,
        str(folder),
        str(base),
        str(adapter),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS.parent / "src"), str(TESTS)]
        ),
    }
    done = subprocess.run(
        in_small_disk(folder, 256 << 10, command),
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    files, out = literal_eval(done.stdout.splitlines()[-1]) if done.stdout else ([], done.stderr)
    assert out == "the last good one", done.stderr
    return done.returncode, files, done.stderr


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "adapter", "merged"])
def test_an_out_on_a_full_disk_is_whole_or_not_there(kind: str, tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    code, files, log = write_on_full_disk(kind, tmp_path / "disk", tiny_base, adapter)
    assert code == 1, log
    # PEFT writes a page of its own first, and `dvc repro` removes what a failed stage leaves in its out.
    assert {name for name, _ in files} - {"adapter/README.md"} == {"others", "out"}
    assert "No space left on device" in log
    assert "remedy: free some space" in log
    assert "Traceback" not in log


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes something."""
    model = add_adapter(load_base(tiny_base, None, torch.float32, torch.device("cpu")), make_lora(), Extension((), 0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_adapter(model, folder := tmp_path_factory.mktemp("adapter"))
    return folder


def test_the_small_disk_is_small(tmp_path: Path) -> None:
    program = f"import shutil; print(shutil.disk_usage({str(tmp_path)!r}).total)"
    command = in_small_disk(tmp_path, 256 << 10, [sys.executable, "-c", program])
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(shown) == 256 << 10 < shutil.disk_usage(tmp_path).total
