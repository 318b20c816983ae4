"""a 16-bit weight -> the values that its 4-bit form had in training: quantised and dequantised by bitsandbytes.

Dettmers et al. 2023, arXiv 2305.14314: 4-bit codes in blocks that each have a scale, and with double quantisation the
scales of a weight are quantised too, around their mean, 256 at a time. The codes need one block of values only, the
mean all scales: so the scales are computed first, and the values some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)

from finetune.errors import ExportError

ORIGINAL, DEQUANTIZED = "original", "dequantized"
# bitsandbytes 0.50, functional.py, quantize_4bit.
SCALES_PER_BLOCK = 256


@dataclass(frozen=True)
class FourBit:
    """Which weights were 4-bit in training, by name in the model, and how.

    `kind`: nf4 or fp4; `blocksize`: values for each scale; `storage`: dtype that the codes are packed into; `dtype`:
    that of the weights before they were quantised, and of the dequantised ones.
    """

    weights: frozenset[str]
    kind: str
    double_quantization: bool
    blocksize: int
    storage: torch.dtype
    dtype: torch.dtype

    def rows_multiple_of(self, width: int) -> int:
        """So many rows of `width` values hold whole blocks."""
        return self.blocksize // math.gcd(self.blocksize, width)

    def by_rows(self, parts: Iterable[torch.Tensor], width: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """A function from rows of a weight [rows, width], and the number of the first, to the values of training.

        `parts`: all rows in order; each part, like each later argument, holds a multiple of `rows_multiple_of`
        rows, but for the last.
        """
        scales = torch.cat([self._codes(part)[1].absmax for part in parts])
        if self.double_quantization:
            mean = scales.mean()
            quantised, state = quantize_blockwise(scales - mean, blocksize=SCALES_PER_BLOCK)
            scales = dequantize_blockwise(quantised, state) + mean

        def values(rows: torch.Tensor, first: int) -> torch.Tensor:
            codes, state = self._codes(rows)
            start = first * width // self.blocksize
            state.absmax = scales[start : start + len(state.absmax)].contiguous()
            obtained: torch.Tensor = dequantize_4bit(codes, state)
            return obtained.view(rows.shape)

        return values

    def _codes(self, rows: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
        # As one long row: on a CPU with AVX-512, bitsandbytes 0.50 dequantises rows with scales of other blocks where
        # their length is a multiple of 16 and none of 64.
        codes, state = quantize_4bit(
            rows.to(self.dtype).flatten(),
            blocksize=self.blocksize,
            quant_type=self.kind,
            quant_storage=self.storage,
        )
        return codes, state


def ways_to_merge(four_bit: Mapping[str, Any] | None, wanted: str) -> dict[str, FourBit | None]:
    """What weights an adapter can be merged onto: the base's own (None), and 4-bit ones with the values of training.

    `four_bit`: what the adapter says of its 4-bit layers. Raises ExportError when the way that is wanted is none.
    """
    ways: dict[str, FourBit | None] = {ORIGINAL: None}
    if four_bit is not None:
        ways[DEQUANTIZED] = FourBit(
            weights=frozenset(f"{layer}.weight" for layer in four_bit["layers"]),
            kind=four_bit["kind"],
            double_quantization=four_bit["double_quantization"],
            blocksize=four_bit["blocksize"],
            storage=getattr(torch, four_bit["storage"]),
            dtype=getattr(torch, four_bit["dtype"]),
        )
    if wanted not in ways:
        raise ExportError("no layer of the base was 4-bit in training", "merge.onto", "set merge.onto: original")
    return ways
