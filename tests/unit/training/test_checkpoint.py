"""A checkpoint's files: whole or not there, known by their bytes, in the order of steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_settings import PLAIN, make_lora, make_settings

from finetune.errors import DataError
from finetune.io import read_json
from finetune.training import checkpoint
from finetune.training.preparation import Prepared, key_of

TENSORS = {"b": torch.arange(4.0), "a": torch.full((2, 2), 0.5, dtype=torch.bfloat16)}
CONTENT = {"state": {"parts": 1}, "trainer_state": {"global_step": 4}}


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, TENSORS, CONTENT)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_and_nothing_else_stays(tmp_path: Path) -> None:
    saved = save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4"]
    assert names(saved) == ["manifest.json", "state.json", "tensors-00001.safetensors", "trainer_state.json"]
    tensors = checkpoint.load_tensors(saved)
    assert {name: (value.dtype, value.tolist()) for name, value in tensors.items()} == {
        "a": (torch.bfloat16, [[0.5, 0.5], [0.5, 0.5]]),
        "b": (torch.float32, [0.0, 1.0, 2.0, 3.0]),
    }
    assert read_json(saved / "state.json") == {"parts": 1}
    assert sorted(read_json(saved / "manifest.json")) == [
        "state.json",
        "tensors-00001.safetensors",
        "trainer_state.json",
    ]
    assert checkpoint.is_intact(saved)


def test_large_tensors_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 20)
    saved = save(tmp_path, 4)
    assert [name for name in names(saved) if name.startswith("tensors")] == [
        "tensors-00001.safetensors",
        "tensors-00002.safetensors",
    ]
    assert sorted(checkpoint.load_tensors(saved)) == ["a", "b"]
    (saved / "tensors-00002.safetensors").unlink()
    assert not checkpoint.is_intact(saved)


def test_every_flipped_bit_of_every_file_is_seen(tmp_path: Path) -> None:
    saved = save(tmp_path, 4)
    unseen = []
    for file in sorted(saved.iterdir()):
        for at in range(file.stat().st_size):
            flip(file, at)
            # A space in the manifest is no value: what it seals is the same.
            if checkpoint.is_intact(saved) and file.name != "manifest.json":
                unseen.append((file.name, at))
            flip(file, at)
    assert unseen == []
    assert checkpoint.is_intact(saved)


def test_every_cut_of_the_manifest_is_seen(tmp_path: Path) -> None:
    saved = save(tmp_path, 4)
    whole = (saved / "manifest.json").read_bytes()
    seen = []
    for size_bytes in range(len(whole) - 1):
        (saved / "manifest.json").write_bytes(whole[:size_bytes])
        seen.append(checkpoint.is_intact(saved))
    assert seen == [False] * (len(whole) - 1)


def test_the_newest_is_that_of_the_highest_step_whatever_clocks_say(tmp_path: Path, caplog: Any) -> None:
    for number, step in enumerate((2, 10, 9)):
        os.utime(save(tmp_path, step), (number, number))
    (tmp_path / "checkpoint-9/manifest.json").write_text("{}")
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-2",
    ]
    newest = checkpoint.newest_intact(tmp_path)
    assert newest == tmp_path / "checkpoint-10"
    flip(newest / "state.json", 5)
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "checkpoint-2"
    flip(tmp_path / "checkpoint-2/tensors-00001.safetensors", 90)
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.newest_intact(tmp_path / "nothing") is None


def test_older_ones_go_once_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6"]
    save(tmp_path, 12)
    flip(tmp_path / "checkpoint-12/tensors-00001.safetensors", 90)
    with pytest.raises(DataError, match=r"checkpoint-12 does not hold what was written to it(.|\n)*check the disk"):
        checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-6"]


def test_a_damaged_one_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    flip(save(tmp_path, 4) / "state.json", 5)
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.is_intact(save(tmp_path, 4))
    assert names(tmp_path) == ["checkpoint-4"]


def test_what_a_kill_leaves_is_tidied_and_in_nobodys_way(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for left in (".checkpoint-6.partial", ".checkpoint-2.dropped", ".checkpoint-6.partial.dropped"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "manifest.json").write_text("{}")
    assert checkpoint.is_intact(save(tmp_path, 6))
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]
    checkpoint.tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_best_weights_before_a_step_are_dropped(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    checkpoint.drop_before(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_a_run_that_has_ended_stays_until_another_one_begins(tmp_path: Path) -> None:
    for run in ("ended", "going", "now"):
        save(tmp_path / run, 4)
        save(tmp_path / run, 5)
    for run in ("ended", "now"):
        checkpoint.finish(tmp_path / run)
    assert names(tmp_path / "ended") == ["checkpoint-5", "finished.json"]
    # What a kill in the middle of the removal of a run leaves.
    (tmp_path / ".older.dropped/checkpoint-3").mkdir(parents=True)
    checkpoint.remove_finished(tmp_path, but="now")
    assert names(tmp_path) == ["going", "now"]
    assert names(tmp_path / "going") == ["checkpoint-4", "checkpoint-5"]
    assert checkpoint.newest_intact(tmp_path / "now") == tmp_path / "now/checkpoint-5"


def test_a_run_is_removed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with its log removed and its checkpoint not, it would go on without the log of its first steps."""
    save(tmp_path / "ended", 5)
    checkpoint.finish(tmp_path / "ended")

    def killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_finished(tmp_path, but="now")
    assert names(tmp_path) == [".ended.dropped"]


def test_the_key_is_of_everything_that_determines_the_run() -> None:
    plain = {"params": [{"rank": 4}, 3], "inputs": {"split": "ab"}}
    key = checkpoint.run_key(plain)
    assert key == checkpoint.run_key({"inputs": {"split": "ab"}, "params": [{"rank": 4}, 3]})
    assert len(key) == 16
    others: Iterator[dict[str, Any]] = iter(
        [
            {**plain, "params": [{"rank": 8}, 3]},
            {**plain, "params": [{"rank": 4}, 4]},
            {**plain, "inputs": {"split": "ac"}},
            {**plain, "libraries": {}},
        ]
    )
    assert len({key, *map(checkpoint.run_key, others)}) == 5


def key_with(**changes: Any) -> str:
    ready = Prepared(make_settings(**changes), "sdpa", torch.device("cpu"))
    return key_of(ready, {"split": "ab", "tokenizer": "cd", "base": "ef"}, 3, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.02},
        {"lora": make_lora(dropout=0.2)},
        {"epochs": 3},
        {"batch_rows": 4},
        {"micro_batch_rows": 1},
        {"quantization": PLAIN},
        {"gradient_checkpointing": "full"},
        {"log_every_steps": 2},
        {"neftune_alpha": 5.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_parameter_never_resumes_another_runs_state(changes: dict[str, Any]) -> None:
    assert key_with(**changes) != key_with()


def test_other_inputs_seeds_and_attention_have_other_keys() -> None:
    ready = Prepared(make_settings(), "sdpa", torch.device("cpu"))
    inputs = {"split": "ab", "tokenizer": "cd", "base": "ef"}
    keys = {
        key_of(ready, inputs, 3, 1),
        key_of(ready, {**inputs, "base": "eg"}, 3, 1),
        key_of(ready, inputs, 4, 1),
        key_of(ready, inputs, 3, 2),
        key_of(Prepared(make_settings(), "varlen", torch.device("cpu")), inputs, 3, 1),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("changes", [{"save_every_steps": 50}, {"keep_checkpoints": 1}], ids=["cadence", "kept"])
def test_what_changes_no_byte_keeps_the_run(changes: dict[str, Any]) -> None:
    """On a full disk the user is told to lower keep_checkpoints, and the run must go on from where it was."""
    assert key_with(**changes) == key_with()
