from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from finetune.errors import ExportError
from finetune.export.four_bit import DEQUANTIZED, ORIGINAL, FourBit, ways_to_merge
from finetune.training.model import load_base
from finetune.training.trained_on import describe
from finetune.training_sections import Quantization

CPU = torch.device("cpu")


def settings(kind: Any = "nf4", double: bool = True, dtype: torch.dtype = torch.float32) -> FourBit:
    return FourBit(frozenset(), kind, double, 64, torch.uint8, dtype)


def by_rows(four_bit: FourBit, weight: torch.Tensor, step: int) -> torch.Tensor:
    rows, width = weight.shape
    starts = range(0, rows, step)
    values = four_bit.by_rows((weight[first : first + step] for first in starts), width)
    return torch.cat([values(weight[first : first + step], first) for first in starts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("which", ["tiny_base", "conv1d_base"])
def test_dequantised_weights_are_those_of_the_live_layers(
    which: str, kind: Any, double: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(which)
    model = load_base(base, Quantization(format=kind, double_quantization=double), dtype, CPU)
    four_bit = ways_to_merge(describe(base, model)["four_bit"], DEQUANTIZED)[DEQUANTIZED]
    assert four_bit is not None
    stored = load_file(base / "model.safetensors")
    layers = {f"{name}.weight": each for name, each in model.named_modules() if isinstance(each, Linear4bit)}
    assert len(layers) == (7 if which == "tiny_base" else 4)
    assert four_bit.weights == layers.keys()
    for name, layer in layers.items():
        live = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        held = stored[name].T.contiguous() if which == "conv1d_base" else stored[name]
        step = 3 * four_bit.rows_multiple_of(held.shape[1])
        assert live.dtype == dtype
        assert torch.equal(by_rows(four_bit, held, step), live)
        # A check that nothing is compared with itself: four bits lose something.
        assert not torch.equal(held.to(dtype), live)


@pytest.mark.parametrize("shape", [(50, 96), (7, 31), (300, 200), (1, 5), (64, 64)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_of_any_length_have_the_scales_of_their_blocks(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    # As one row, whose blocks bitsandbytes finds on every processor.
    codes, state = quantize_4bit(weight.flatten(), compress_statistics=True, quant_type=kind, blocksize=64)
    expected = dequantize_4bit(codes, state).view(shape)
    four_bit = settings(kind)
    multiple = four_bit.rows_multiple_of(shape[1])
    for step in (multiple, 4 * multiple, 64 * 300):
        assert torch.equal(by_rows(four_bit, weight, step), expected)


@pytest.mark.parametrize(("width", "rows"), [(64, 1), (128, 1), (96, 2), (100, 16), (31, 64), (1, 64)])
def test_blocks_of_64_begin_at_so_many_rows(width: int, rows: int) -> None:
    assert settings().rows_multiple_of(width) == rows


def test_double_quantisation_takes_the_mean_of_all_scales() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * torch.linspace(0.1, 4, 64)[:, None]
    whole = by_rows(settings(), weight, 64)
    halves = torch.cat([by_rows(settings(), half, 64) for half in weight.split(32)])
    assert not torch.equal(whole, halves)
    plain = settings(double=False)
    alone = torch.cat([by_rows(plain, half, 64) for half in weight.split(32)])
    assert torch.equal(by_rows(plain, weight, 64), alone)


def test_an_adapter_of_sixteen_bit_weights_has_one_way_to_be_merged() -> None:
    assert ways_to_merge(None, ORIGINAL) == {"original": None}
    with pytest.raises(ExportError, match=r"no layer of the base was 4-bit(.|\n)*set merge\.onto: original"):
        ways_to_merge(None, DEQUANTIZED)
