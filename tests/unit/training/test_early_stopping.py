"""Stopping on the validation loss: when, on which weights, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import train
from training_settings import make_settings

from finetune.training.journal import best_validation
from finetune.training_sections import EarlyStopping

LOSSES = [3.0, 2.0, 2.0, 1.95, 2.5]


def entries(*losses: float | None) -> list[dict[str, float | None]]:
    return [{"step": step, "validation_loss": loss} for step, loss in enumerate(losses, 1)]


def test_an_improvement_must_be_large_enough() -> None:
    log = entries(3.0, None, 2.0, 1.95, None, 2.5)
    assert best_validation(log, 0.0) == (4, 1)
    assert best_validation(log, 0.1) == (3, 2)
    assert best_validation(entries(None), 0.0) == (0, 0)


def use() -> Any:
    """Ten steps, validated every second one; two that are no better end the run."""
    early = EarlyStopping(patience=2, min_improvement=0.1)
    return make_settings(evaluate_every_steps=2, save_every_steps=3, early_stopping=early)


def validation_of(snapshots: list[dict[str, torch.Tensor]]) -> Callable[[Any], float]:
    def validate(model: Any) -> float:
        weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        snapshots.append(weights)
        return LOSSES[len(snapshots) - 1]

    return validate


def test_the_weights_of_the_best_validation_are_delivered(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    snapshots: list[dict[str, torch.Tensor]] = []
    _, log = train(
        tiny_base, tiny_tokenizer, tmp_path / "run", tmp_path / "adapter", use(), validate=validation_of(snapshots)
    )
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert [entry["validation_loss"] for entry in log if entry["validation_loss"]] == [3.0, 2.0, 2.0, 1.95]
    delivered = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    best = {name.replace(".default", ""): value for name, value in snapshots[1].items()}
    assert delivered.keys() == best.keys()
    assert all(torch.equal(best[name], value) for name, value in delivered.items())
    assert not all(torch.equal(snapshots[3][name], value) for name, value in snapshots[1].items())


def test_a_run_cut_after_its_best_step_delivers_the_same(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole = train(tiny_base, tiny_tokenizer, tmp_path / "w", tmp_path / "a", use(), validate=validation_of([]))[1]

    class PowerCutError(Exception):
        pass

    def cut_at_7(step: int, tokens: int) -> None:
        if step == 7:
            raise PowerCutError

    snapshots: list[dict[str, torch.Tensor]] = []
    validate = validation_of(snapshots)
    with pytest.raises(PowerCutError):
        train(tiny_base, tiny_tokenizer, tmp_path / "c", tmp_path / "b", use(), validate=validate, mirror=cut_at_7)
    # The run goes on from step 6, whose validation was the third.
    assert len(snapshots) == 3
    log = train(tiny_base, tiny_tokenizer, tmp_path / "c", tmp_path / "b", use(), validate=validate)[1]
    assert log == whole
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_had_stopped_early_trains_no_more(tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """It was killed after its last checkpoint, before its adapter was written."""
    whole = train(tiny_base, tiny_tokenizer, tmp_path / "r", tmp_path / "a", use(), validate=validation_of([]))[1]
    again = train(tiny_base, tiny_tokenizer, tmp_path / "r", tmp_path / "b", use(), validate=lambda model: 1 / 0)[1]
    assert again == whole
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [{"neftune_alpha": 5.0}, {"scheduler": "inverse_sqrt"}, {"batch_rows": 4, "micro_batch_rows": 1}],
    ids=["neftune", "inverse_sqrt", "accumulated"],
)
def test_other_settings_resume_to_the_same_bytes(
    changes: dict[str, Any], tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    settings = make_settings(epochs=3, **changes)
    train(tiny_base, tiny_tokenizer, tmp_path / "w", tmp_path / "a", settings)
    plain = make_settings(epochs=3)
    train(tiny_base, tiny_tokenizer, tmp_path / "p", tmp_path / "plain", plain)

    class PowerCutError(Exception):
        pass

    def cut_at_7(step: int, tokens: int) -> None:
        if step == 7:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(tiny_base, tiny_tokenizer, tmp_path / "c", tmp_path / "b", settings, mirror=cut_at_7)
    train(tiny_base, tiny_tokenizer, tmp_path / "c", tmp_path / "b", settings)
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b", "plain")]
    assert adapters[0] == adapters[1] != adapters[2]
