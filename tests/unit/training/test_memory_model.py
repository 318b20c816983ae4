from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from training_settings import LLAMA_8B, NF4, PLAIN, make_lora, make_settings

from finetune.training import memory_model
from finetune.training.activations import rehearse, rehearse_shapes, with_layers
from finetune.training.attention import VARLEN
from finetune.training.memory_model import model_of, open_model, scale_bytes
from finetune.training.method import loading_dtype, make_trainable
from finetune.training.model import load_extended
from finetune.training.vocabulary import Extension
from finetune.training_sections import Distribution, Quantization, TrainQlora

CPU = torch.device("cpu")
KEPT = Extension((), 0)
NEW = Extension((5, 29, 30), 31)
SINGLE = Quantization(format="nf4", double_quantization=False)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QLORA_8B = make_settings(compute_dtype="bfloat16", lora=make_lora(rank=16, alpha=32, target_modules=ALL_LINEAR))
TOKENS = 61
TARGETS = {"tiny_base": ALL_LINEAR, "untied_base": ["q_proj", "down_proj"], "conv1d_base": ["c_attn", "c_fc"]}


def settings_for(base: str, **changes: Any) -> TrainQlora:
    lora = make_lora(target_modules=TARGETS[base], use_dora=changes.pop("use_dora", False))
    return make_settings(**{"lora": lora, **changes})


def live_model(base: Path, settings: TrainQlora, extension: Extension) -> Any:
    model = load_extended(base, extension, settings.quantization, loading_dtype(settings), CPU)
    return make_trainable(model, settings, extension)


def size_bytes(tensors: Any) -> int:
    """Bytes of all storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def live_bytes(model: Any) -> tuple[int, int, int, int]:
    """4-bit weights, what bitsandbytes holds beside them, other frozen tensors, trained tensors."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    states = [layer.weight.quant_state for layer in layers]
    inner = [state.state2 for state in states if state.nested]
    scales = [state.absmax for state in (*states, *inner)] + [state.code for state in (*states, *inner)]
    packed = {id(layer.weight) for layer in layers}
    rest = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in packed]
    return (
        size_bytes(layer.weight for layer in layers),
        size_bytes([*scales, *(state.offset for state in states if state.nested)]),
        size_bytes(tensor for tensor in rest if not tensor.requires_grad),
        size_bytes(tensor for tensor in rest if tensor.requires_grad),
    )


def take_step(model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the gradients and of the optimizer's states after one step."""
    ids = torch.arange(3, 27)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = size_bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return gradients, size_bytes(states)


@pytest.mark.parametrize(
    ("name", "quantization", "extension", "changes"),
    [
        ("tiny_base", NF4, NEW, {"use_dora": True}),
        ("tiny_base", PLAIN, KEPT, {"modules_to_save": ["lm_head"]}),
        ("untied_base", NF4, NEW, {}),
        ("untied_base", SINGLE, NEW, {"modules_to_save": ["lm_head", "norm"]}),
        ("conv1d_base", SINGLE, KEPT, {}),
        ("conv1d_base", NF4, KEPT, {}),
    ],
)
def test_what_lies_still_equals_the_live_model_byte_for_byte(
    name: str,
    quantization: Quantization,
    extension: Extension,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    base = request.getfixturevalue(name)
    settings = make_settings(lora=make_lora(target_modules=TARGETS[name], **changes), quantization=quantization)
    still = open_model(base, settings, extension, "sdpa").still
    model = live_model(base, settings, extension)
    expected = (still.four_bit_weights, still.quantization_scales, still.other_weights, still.adapter)
    assert live_bytes(model) == expected
    trained = [p for p in model.parameters() if p.requires_grad]
    assert take_step(model, torch.optim.AdamW(trained, fused=True)) == (still.gradients, still.optimizer)
    assert (still.four_bit_weights > 0) is (quantization is not PLAIN)


def test_full_training_holds_every_weight_in_float32_with_its_states(tiny_base: Path) -> None:
    settings = make_settings(method="full", lora=None, quantization=PLAIN)
    still = open_model(tiny_base, settings, KEPT, "sdpa").still
    model = live_model(tiny_base, settings, KEPT)
    assert live_bytes(model) == (0, 0, still.other_weights, still.adapter)
    # 29 x 64 rows, 192 of norms, 12,288 of attention and 24,576 of the feed-forward layer.
    assert still.adapter == 38_912 * 4
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert take_step(model, optimizer) == (still.gradients, still.optimizer)


@pytest.mark.parametrize("bits", [8, 32])
def test_states_of_bitsandbytes_adamw_equal_its_own(tiny_base: Path, bits: int) -> None:
    lora = make_lora(rank=64, target_modules=ALL_LINEAR)
    settings = make_settings(lora=lora, optimizer="adamw_8bit" if bits == 8 else "paged_adamw_32bit")
    model = live_model(tiny_base, settings, KEPT)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.numel() >= memory_model.MIN_8BIT_VALUES for p in trained} == {True, False}
    optimizer = bitsandbytes.optim.AdamW(trained, optim_bits=bits)
    expected = open_model(tiny_base, settings, KEPT, "sdpa").still.optimizer
    assert take_step(model, optimizer)[1] == expected


def test_paged_states_of_large_tensors_are_not_on_the_card() -> None:
    sizes = [(1_000_000, False), (1000, False)]
    # 2 states of 8 bit and 2 scales per 256 values; two tables of 256 float32 values.
    assert memory_model.optimizer_bytes(sizes, "adamw_8bit") == 2_000_000 + 2 * 3907 * 4 + 8000 + 2048
    assert memory_model.optimizer_bytes(sizes, "paged_adamw_8bit") == 2 * 3907 * 4 + 8000 + 2048
    assert memory_model.optimizer_bytes(sizes, "paged_adamw_32bit") == 8000
    assert memory_model.optimizer_bytes(sizes, "adamw_torch") == 8_000_000 + 8000 + 8
    # transformers 5.23 asks for 32 bit for embeddings (Trainer.create_optimizer).
    assert memory_model.optimizer_bytes([(1_000_000, True)], "adamw_8bit") == 8_000_000


def test_scales_of_a_layer() -> None:
    assert scale_bytes(64 * 256 * 3, double_quantization=False) == 768 * 4 + 64
    assert scale_bytes(64 * 256 * 3 + 1, double_quantization=True) == 769 + 4 * 4 + 64 + 1024 + 4


@pytest.mark.parametrize(
    ("quantization", "use_dora", "dtype", "checkpointing"),
    [
        (NF4, False, "float32", "none"),
        (NF4, False, "bfloat16", "none"),
        (NF4, False, "bfloat16", "selective"),
        (NF4, False, "bfloat16", "full"),
        (PLAIN, False, "bfloat16", "none"),
        (PLAIN, True, "float32", "none"),
        (PLAIN, True, "float32", "selective"),
        (PLAIN, False, "float32", "full"),
    ],
)
def test_a_rehearsal_without_storage_holds_the_bytes_of_a_live_one(
    tiny_base: Path, use_dora: bool, quantization: Quantization, dtype: str, checkpointing: str
) -> None:
    settings = settings_for("tiny_base", quantization=quantization, use_dora=use_dora, compute_dtype=dtype)
    model = open_model(tiny_base, settings, KEPT, "sdpa")
    shapes = rehearse_shapes(model.config, settings, KEPT, "sdpa", checkpointing)
    live = rehearse(live_model(tiny_base, settings, KEPT), settings, TOKENS, checkpointing)
    assert shapes.kept_bytes(TOKENS) + shapes.mask_bytes(TOKENS) == live.kept_bytes(TOKENS) + live.mask_bytes(TOKENS)
    assert live.kept_bytes(TOKENS) > 0
    # A live 4-bit layer is unpacked for each product; the estimate adds the largest one, 0 without 4-bit layers.
    unpacked = model.still.layer
    assert live.work_bytes(TOKENS) - unpacked <= shapes.work_bytes(TOKENS) <= live.work_bytes(TOKENS)


def test_what_autograd_saves_is_within_what_is_kept(tiny_base: Path) -> None:
    settings = settings_for("tiny_base")
    model = live_model(tiny_base, settings, KEPT).train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = (torch.arange(TOKENS) % 31)[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decoder = model.get_base_model().base_model
        hidden = decoder(torch.zeros_like(positions), position_ids=positions).last_hidden_state
    assert hidden.requires_grad
    saved_bytes = size_bytes(tensor for key, tensor in saved.items() if key not in weights)
    kept = rehearse(model, settings, TOKENS, "none")
    held = kept.kept_bytes(TOKENS) + kept.mask_bytes(TOKENS)
    # The result, ids, positions and the mask of booleans are held without being saved: much beside one layer.
    assert 0.85 * held < saved_bytes < held


@pytest.fixture(scope="module")
def llama_8b() -> memory_model.MemoryModel:
    return model_of(LLAMA_8B, QLORA_8B, KEPT, VARLEN)


def test_an_8b_llama_has_the_sizes_that_its_shape_says(llama_8b: memory_model.MemoryModel) -> None:
    assert llama_8b.still == memory_model.StillBytes(
        # 6,979,321,856 weights of linear layers.
        four_bit_weights=3_489_660_928,
        quantization_scales=111_000_448,
        # Embeddings and output layer in bfloat16, 65 norms and the rotary frequencies.
        other_weights=2 * 128_256 * 4096 * 2 + 65 * 4096 * 2 + 2 * 64 * 4,
        # 41,943,040 weights of rank 16 in float32, two states of them and a count for each of 448 tensors.
        adapter=167_772_160,
        gradients=167_772_160,
        optimizer=335_544_320 + 448 * 4,
        layer=4096 * 14336 * 2,
    )
    single = QLORA_8B.model_copy(update={"quantization": SINGLE})
    assert model_of(LLAMA_8B, single, KEPT, VARLEN).still.quantization_scales == 436_221_952


def test_an_8b_llama_keeps_a_hidden_state_per_layer_under_full_checkpointing(
    llama_8b: memory_model.MemoryModel,
) -> None:
    per_token = {
        mode: llama_8b.estimate(20_000, mode).activations - llama_8b.estimate(10_000, mode).activations
        for mode in ("none", "selective", "full")
    }
    # 32 layers' inputs and the result in bfloat16, one norm in float32, tables of rotations.
    assert per_token["full"] == 10_000 * (33 * 4096 * 2 + 4096 * 4 + 524)
    # Attention's result and a float32 sum for each of 32 heads come on top.
    assert per_token["selective"] == per_token["full"] + 10_000 * 32 * (4096 * 2 + 32 * 4)
    assert per_token["none"] == 10_000 * 5_918_472
    assert llama_8b.estimate(16_384, "none").attention_mask == 0
    assert llama_8b.estimate(2048, "full").total / memory_model.GIB == pytest.approx(7.7, abs=0.1)


def test_sdpa_makes_a_mask_for_each_layer_that_is_kept() -> None:
    model = model_of(LLAMA_8B, QLORA_8B, KEPT, "sdpa")
    assert model.estimate(8192, "none").attention_mask == 8192**2 * 2 * 32


def test_an_estimate_of_an_8b_llama_takes_seconds() -> None:
    start = time.process_time()
    terms = model_of(LLAMA_8B, QLORA_8B, KEPT, VARLEN).estimate(16_384, "none")
    assert time.process_time() - start < 5
    assert [name for name, _ in terms.table()][:2] == ["four bit weights", "quantization scales"]
    assert terms.table()[-1] == ("total", sum(gib for _, gib in terms.table()[:-1]))


def test_trained_rows_and_trained_tables_cost_the_output_layer_its_gradient(
    llama_8b: memory_model.MemoryModel,
) -> None:
    plain = llama_8b.estimate(4096, "full").head
    one_layer = with_layers(LLAMA_8B, 1)
    rows = model_of(one_layer, QLORA_8B, Extension((128_256,), 128_257), VARLEN)
    assert one_layer.vocab_size == 128_256
    assert rows.estimate(4096, "full").head - plain == 128_257 * 4096 * 8
    lora = make_lora(rank=16, target_modules=ALL_LINEAR, modules_to_save=["lm_head"])
    whole = model_of(one_layer, QLORA_8B.model_copy(update={"lora": lora}), KEPT, VARLEN)
    assert whole.estimate(4096, "full").head - plain == 128_256 * 4096 * 4 + 32_768 * 4096 * 2


def test_ddp_holds_its_gradients_twice(llama_8b: memory_model.MemoryModel) -> None:
    spread = QLORA_8B.model_copy(update={"distribution": Distribution(strategy="ddp", processes=2)})
    buckets = replace(llama_8b, settings=spread)
    assert buckets.estimate(4096, "full").gradients == 2 * 167_772_160


def test_the_benchmark_in_miniature_finds_the_model_and_a_live_one_equal() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    from train_memory import miniature

    found = miniature()
    assert [figures["checkpointing"] for figures in found] == ["none", "selective", "full"]
    assert [figures["predicted_bytes"] for figures in found] == [figures["live_bytes"] for figures in found]
    assert [figures["live_bytes"] for figures in found] == [9_589_184, 1_787_949, 1_253_389]
