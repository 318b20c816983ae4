"""NaN, a memory that is too small, other clocks and locales: each in a real training, in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KILLED, LAST, STOPPED, Whole, forks_in, hashes, log_of, start_again
from faulty_run import Forks
from safetensors.torch import load_file

from finetune.io import read_csv
from finetune.training.checkpoint import load_tensors, newest_intact

# The order of sums is another one: with a high rate, Adam makes a difference of one bit large.
SLOW: dict[str, Any] = {"dropout": 0.0, "settings": {"learning_rate": 0.001}}


@pytest.fixture(scope="module")
def without_dropout(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(forks, tmp_path_factory.mktemp("plain"), **SLOW)


def logged(out: Path, *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in read_csv(out / "train_log.csv")]


@pytest.mark.parametrize("what", ["nan_gradients", "nan_losses"])
def test_a_step_on_nan_is_skipped_named_and_counted(what: str, forks: Forks, tmp_path: Path) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", signals_in={4: ["SIGTERM"]}, **{what: [4]}) == STOPPED
    assert "step 4: its gradient is not finite, skipped; packed rows 1, 4\n" in log_of(tmp_path)
    before, after = (load_tensors(tmp_path / f"run/checkpoint-{step}") for step in (3, 4))
    # Of each of 12 matrices the weights, both of Adam's moments and its count of steps.
    assert len(before) == 48 == len(after)
    assert [name for name, value in before.items() if not value.equal(after[name])] == []
    start_again(forks, tmp_path)
    assert logged(tmp_path / "out", "step", "skipped_steps", "trained_tokens") == [
        ("1", "0", "14"), ("2", "0", "28"), ("3", "0", "35"), ("5", "1", "49"), ("6", "1", "56"),
    ]  # fmt: skip
    other = tmp_path / "other"
    assert forks.run(other / "run", other / "out", **{what: [4]}) == 0
    assert hashes(other / "out") == hashes(tmp_path / "out")


def test_a_skipped_step_between_two_log_entries_is_in_neither(forks: Forks, tmp_path: Path) -> None:
    """The checkpoint of step 2 finds the NaN of step 2 out, before the log entry of step 3 asks."""
    use = {"log_every_steps": 3, "save_every_steps": 2}
    assert forks.run(tmp_path / "run", tmp_path / "out", settings=use, nan_losses=[2]) == 0, log_of(tmp_path)
    assert logged(tmp_path / "out", "step", "skipped_steps") == [("3", "1"), ("6", "1")]
    assert "rolling back" not in log_of(tmp_path)


def test_a_transient_fault_is_rolled_back_to_the_bytes_of_an_undisturbed_run(
    whole: Whole, forks: Forks, tmp_path: Path
) -> None:
    use = {"max_skipped_steps": 1}
    assert forks.run(tmp_path / "run", tmp_path / "out", settings=use, nan_losses=[3, 4]) == 0, log_of(tmp_path)
    assert "2 steps in a row had no finite gradient, the last is step 4 (rows 1, 4); rolling back" in log_of(tmp_path)
    assert hashes(tmp_path / "out") == whole.hashes


def test_a_checkpoint_among_skipped_steps_is_not_rolled_back_to(whole: Whole, forks: Forks, tmp_path: Path) -> None:
    """Steps 3 and 4 might still have been single ones when they were saved; they are not in the end."""
    use = {"max_skipped_steps": 2}
    assert forks.run(tmp_path / "run", tmp_path / "out", settings=use, nan_losses=[3, 4, 5]) == 0, log_of(tmp_path)
    assert "3 steps in a row had no finite gradient, the last is step 5 (rows 0, 2); rolling back" in log_of(tmp_path)
    assert hashes(tmp_path / "out") == whole.hashes


def test_a_last_step_that_is_skipped_is_validated_all_the_same(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", nan_losses=[LAST]) == 0, log_of(tmp_path)
    step, loss, validation, skipped = logged(
        tmp_path / "out", "step", "train_loss", "validation_loss", "skipped_steps"
    )[-1]
    assert (step, loss, skipped) == ("6", "", "1")
    assert float(validation) > 0


def test_a_permanent_fault_ends_the_run_after_one_more_try(forks: Forks, tmp_path: Path) -> None:
    use = {"max_skipped_steps": 1}
    assert forks.run(tmp_path / "run", tmp_path / "out", settings=use, nan_losses=list(range(3, 99))) == 1
    shown = log_of(tmp_path)
    assert shown.count("rolling back to checkpoint-") == 1
    assert "NotFiniteError: 2 steps in a row had no finite gradient, the last is step 4 (rows 1, 4)" in shown
    assert "the last good checkpoint is kept" in shown
    newest = newest_intact(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-2"


@pytest.mark.parametrize("step", [4, 5])
def test_a_log_entry_over_several_steps_is_the_same_after_a_stop_between_them(
    step: int, forks: Forks, tmp_path: Path
) -> None:
    use = {"log_every_steps": LAST, "evaluate_every_steps": LAST}
    whole = Whole(forks, tmp_path / "whole", settings=use)
    assert forks.run(tmp_path / "run", tmp_path / "out", settings=use, signals_in={step: ["SIGTERM"]}) == STOPPED
    assert start_again(forks, tmp_path, settings=use) == whole.hashes


def test_memory_that_runs_out_halves_the_micro_batches_and_changes_nothing_else(
    without_dropout: Whole, forks: Forks, tmp_path: Path
) -> None:
    """Of 16 tokens in two documents, 8 fit."""
    small = Whole(forks, tmp_path / "small", **SLOW, memory_tokens=10)
    assert small.log.count("out of memory at step 1: micro-batches in 2 parts from here") == 1
    files = [run.out / "adapter/adapter_model.safetensors" for run in (without_dropout, small)]
    fitting, halved = map(load_file, files)
    assert max(float((fitting[name] - halved[name]).abs().max()) for name in fitting) < 1e-6
    assert fitting.keys() == halved.keys()
    columns = ("step", "trained_tokens", "learning_rate")
    assert logged(small.out, *columns) == logged(without_dropout.out, *columns)
    # A checkpoint remembers the parts: a run that goes on from it does not run out of memory a second time.
    killed = {"signals": {"5": ["SIGKILL"]}}
    assert forks.run(tmp_path / "run", tmp_path / "out", **SLOW, **killed, memory_tokens=10) == KILLED
    assert start_again(forks, tmp_path, **SLOW, memory_tokens=10) == small.hashes
    assert "out of memory" not in log_of(tmp_path)


def test_memory_that_cannot_hold_one_document_is_an_error_with_a_remedy(forks: Forks, tmp_path: Path) -> None:
    assert forks.run(tmp_path / "run", tmp_path / "out", memory_tokens=6) == 1
    shown = log_of(tmp_path)
    assert "DeviceError: memory ran out in a micro-batch of 16 tokens (CUDA out of memory. Tried to allocate" in shown
    assert "remedy: halve it, set gradient_checkpointing: full, or lower split.pack_tokens" in shown


def test_clocks_time_zones_and_locales_change_nothing(
    whole: Whole, tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The newest checkpoint is that of the highest step, whatever the times of the folders say."""
    with forks_in(tmp_path, tiny_base, tiny_tokenizer, TZ="Pacific/Kiritimati", LC_ALL="C", LANG="C") as forks:
        assert forks.run(tmp_path / "run", tmp_path / "out", signals={5: ["SIGKILL"]}) == KILLED
        for name, time_s in (("checkpoint-3", 4_000_000_000), ("checkpoint-4", 1)):
            for path in [*(tmp_path / "run" / name).iterdir(), tmp_path / "run" / name]:
                os.utime(path, (time_s, time_s))
        assert start_again(forks, tmp_path) == whole.hashes
    assert "resuming from checkpoint-4 of 6 steps" in log_of(tmp_path)
