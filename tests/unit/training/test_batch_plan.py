from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_settings import LLAMA_8B, PLAIN, make_lora, make_settings

from finetune.errors import DeviceError
from finetune.training.attention import VARLEN
from finetune.training.batch_plan import BatchPlan, choose, choose_for, longest_row_tokens, most_tokens, usable_bytes
from finetune.training.memory_model import MemoryModel, model_of
from finetune.training.vocabulary import Extension
from finetune.training_sections import CudaMemory, Distribution, TrainQlora

GIB = 1 << 30
KEPT = Extension((), 0)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QLORA = make_settings(
    compute_dtype="bfloat16",
    lora=make_lora(rank=16, target_modules=ALL_LINEAR),
    batch_rows=32,
    micro_batch_rows="auto",
    gradient_checkpointing="auto",
)


@pytest.fixture(scope="module")
def model() -> MemoryModel:
    """Llama-3.1-8B by its configuration alone."""
    return model_of(LLAMA_8B, QLORA, KEPT, VARLEN)


def changed(model: MemoryModel, **changes: Any) -> MemoryModel:
    """Other settings that leave all sizes as they are: the rehearsals are shared."""
    settings = TrainQlora(**{**dict(QLORA), **changes})
    return replace(model, settings=settings)


def outline(plan: BatchPlan) -> tuple[int, int, str]:
    return plan.micro_batch_rows, plan.accumulation_steps, plan.gradient_checkpointing


@pytest.mark.parametrize(
    ("card_gib", "expected"),
    [
        (139, (8, 4, "none")),
        (80, (4, 8, "none")),
        (24, (1, 32, "none")),
        (16, (4, 8, "selective")),
        (10, (2, 16, "full")),
    ],
)
def test_a_larger_card_gets_larger_micro_batches_and_computes_less_twice(
    model: MemoryModel, card_gib: int, expected: tuple[int, int, str]
) -> None:
    plan = choose_for(model, row_tokens=2048, card_bytes=card_gib * GIB)
    assert outline(plan) == expected
    assert plan.estimate is not None
    assert plan.estimate.total <= usable_bytes(QLORA, card_gib * GIB) < card_gib * GIB
    assert plan == choose_for(model, row_tokens=2048, card_bytes=card_gib * GIB)


def test_what_the_settings_fix_stays(model: MemoryModel) -> None:
    fixed = changed(model, micro_batch_rows=2, gradient_checkpointing="full")
    assert outline(choose_for(fixed, row_tokens=2048, card_bytes=139 * GIB)) == (2, 16, "full")
    assert outline(choose_for(changed(model, micro_batch_rows=2), row_tokens=2048, card_bytes=139 * GIB))[2] == "none"
    checked = changed(model, gradient_checkpointing="full")
    assert outline(choose_for(checked, row_tokens=2048, card_bytes=139 * GIB)) == (8, 4, "full")


@pytest.mark.parametrize(("batch_rows", "processes", "expected"), [(24, 2, (6, 2)), (10, 2, (5, 1)), (7, 1, (7, 1))])
def test_micro_batches_divide_the_rows_of_a_process(
    model: MemoryModel, batch_rows: int, processes: int, expected: tuple[int, int]
) -> None:
    distribution = Distribution(strategy="ddp" if processes > 1 else "single", processes=processes)
    spread = changed(model, batch_rows=batch_rows, distribution=distribution)
    assert outline(choose_for(spread, row_tokens=2048, card_bytes=139 * GIB))[:2] == expected


def test_long_rows_are_taken_one_at_a_time(model: MemoryModel) -> None:
    assert outline(choose_for(model, row_tokens=20_000, card_bytes=139 * GIB)) == (1, 32, "none")
    assert outline(choose_for(model, row_tokens=60_000, card_bytes=139 * GIB)) == (1, 32, "selective")


def test_the_share_that_the_allocator_may_take_bounds_the_plan(model: MemoryModel) -> None:
    half = changed(model, cuda_memory=CudaMemory(fraction=0.5, expandable_segments=False, max_split_size_mib=None))
    assert usable_bytes(half.settings, 100 * GIB) == int(47.5 * GIB)
    assert outline(choose_for(half, row_tokens=2048, card_bytes=48 * GIB)) == (1, 32, "none")


def test_the_longest_row_fits_and_one_token_more_does_not(model: MemoryModel) -> None:
    longest = most_tokens(model, "full", 8 * GIB)
    assert 1500 < longest < 3000
    usable = usable_bytes(QLORA, 8 * GIB)
    assert model.estimate(longest, "full").total <= usable < model.estimate(longest + 1, "full").total
    assert most_tokens(model, "full", 4 * GIB) == 0


def test_what_does_not_fit_is_refused_with_what_would(model: MemoryModel) -> None:
    fixed = changed(model, micro_batch_rows=8, gradient_checkpointing="none")
    with pytest.raises(DeviceError) as refusal:
        choose_for(fixed, row_tokens=2048, card_bytes=24 * GIB)
    assert str(refusal.value) == (
        "a micro-batch of 16384 tokens with gradient_checkpointing none takes 98.4 GiB, "
        "and 22.8 of the card's 24.0 GiB are usable\n"
        "  where:  train_qlora\n"
        "  remedy: set train_qlora.micro_batch_rows: auto; or set train_qlora.gradient_checkpointing: full; "
        "or set split.pack_tokens: 320, and tokenize.max_tokens no higher"
    )
    fits = changed(model, micro_batch_rows=8, gradient_checkpointing="none")
    assert choose_for(fits, row_tokens=320, card_bytes=24 * GIB).estimate is not None


def test_changes_that_only_fit_together_are_named_together() -> None:
    wide = QLORA.model_copy(
        update={
            "quantization": PLAIN,
            "gradient_checkpointing": "none",
            "lora": make_lora(rank=64, target_modules=["q_proj"]),
        }
    )
    with pytest.raises(DeviceError, match="with gradient_checkpointing none takes") as refusal:
        choose_for(model_of(LLAMA_8B, wide, KEPT, VARLEN), row_tokens=2048, card_bytes=8 * GIB)
    together = (
        "set train_qlora.gradient_checkpointing: full and train_qlora.quantization.format: nf4 "
        "with quantization.double_quantization: true and train_qlora.optimizer: paged_adamw_8bit"
    )
    assert refusal.value.remedy == together


def test_a_model_that_fits_no_way_names_the_card_it_needs(model: MemoryModel) -> None:
    least = changed(model, optimizer="paged_adamw_8bit")
    with pytest.raises(DeviceError, match=re.escape("take a card of 9 GiB")):
        choose_for(least, row_tokens=2048, card_bytes=4 * GIB)


def test_the_plan_of_a_base_on_a_card_and_on_a_cpu(tiny_base: Path) -> None:
    settings = make_settings(
        compute_dtype="bfloat16", batch_rows=4, micro_batch_rows="auto", gradient_checkpointing="auto"
    )
    place: dict[str, Any] = {"pack_tokens": 64, "longest_document_tokens": 128, "attention": "sdpa"}
    assert outline(choose(tiny_base, settings, KEPT, **place, card_bytes=GIB)) == (4, 1, "none")
    assert choose(tiny_base, settings, KEPT, **place, card_bytes=None) == BatchPlan(1, 4, "none", None)
    fixed = settings.model_copy(update={"micro_batch_rows": 2, "gradient_checkpointing": "full"})
    assert choose(tiny_base, fixed, KEPT, **place, card_bytes=None) == BatchPlan(2, 2, "full", None)
    assert longest_row_tokens(tiny_base, settings, KEPT, attention="sdpa", card_bytes=GIB) > 1000
