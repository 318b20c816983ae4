"""A training on a file system that holds two checkpoints and a half, really full in the third."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Whole, forks_in, log_of, start_again
from small_disk import no_small_disks

from finetune.training.checkpoint import is_intact, newest_intact


@pytest.mark.skipif(bool(no_small_disks()), reason=no_small_disks())
def test_a_full_disk_keeps_the_last_checkpoint_says_so_and_a_larger_one_goes_on(
    tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with forks_in(tmp_path / "enough", tiny_base, tiny_tokenizer) as forks:
        whole = Whole(forks, tmp_path / "whole", 5)
        size_bytes = sum(path.stat().st_size for path in (whole.snapshot / "checkpoint-4").iterdir())
        (place := tmp_path / "small").mkdir()
        (disk := place / "run").mkdir()
        room = {"disk": (disk, int(2.5 * size_bytes))}
        with forks_in(tmp_path / "less", tiny_base, tiny_tokenizer, **room) as small:
            assert small.run(disk, place / "out") == 1
            # The disk is the other process's alone.
            shutil.copytree(f"/proc/{small.process.pid}/root{disk}", tmp_path / "kept")
        shown = log_of(place)
        assert "DataError: the checkpoint of step 3 could not be written (" in shown
        assert "No space left on device" in shown
        assert "remedy: free some space or lower train_qlora.keep_checkpoints, then `dvc repro`" in shown
        left = sorted(path.name for path in (tmp_path / "kept").iterdir())
        assert left == ["checkpoint-1", "checkpoint-2", "train_log.jsonl"]
        assert is_intact(tmp_path / "kept/checkpoint-1")
        assert newest_intact(tmp_path / "kept") == tmp_path / "kept/checkpoint-2"
        shutil.rmtree(disk)
        shutil.move(tmp_path / "kept", disk)
        assert start_again(forks, place) == whole.hashes
