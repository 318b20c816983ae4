"""merged model + rows of token ids -> an importance matrix: how much each input channel of each layer matters.

For every linear layer the mean, over all tokens, of each input channel's square. It is what llama.cpp's own tool
collects (tools/imatrix, which no Python package installs) for the weights of its blocks: neither the embeddings nor the
output layer, which the K types hold in more bits anyway. llama.cpp rounds the weights of a channel the more carefully
the larger its figure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from finetune.errors import ExportError
from finetune.export.gguf_header import TensorEntry, read_header, read_tensors
from finetune.log import progress

BLOCK = "blk."
# Not quantised by llama.cpp, whatever their shape (src/llama-quant.cpp, tensor_allows_quantization).
UNTOUCHED = ("_norm.weight", "ffn_gate_inp.weight")
Matrix = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def collect_importance(model: Any, rows: Iterable[Mapping[str, Any]], most_rows: int | None, whole: Path) -> Matrix:
    """Mean squared inputs [columns] of every matrix in the blocks of the GGUF `whole`, by its name there.

    Of the `rows` ({id, input_ids}) the `most_rows` with the first ids are taken; None asks for no matrix, and gives an
    empty one. Sums are float32 within a row and float64 over rows. Raises ExportError when there are no rows, or when a
    matrix of the GGUF has no linear layer in `model`.
    """
    if most_rows is None:
        return {}
    layers = _layers(model, read_header(whole))
    matrices = _matrices(read_tensors(whole))
    sums = {name: torch.zeros(width, dtype=torch.float64) for name, width in matrices.items()}
    if missing := sorted(set(sums) - set(layers.values())):
        raise ExportError(
            f"no importance can be measured for {len(missing)} of {len(sums)} matrices, such as {missing[0]}: "
            "they are no linear layers of their own in this model",
            "quantize_gguf.importance_matrix_rows",
            "set quantize_gguf.importance_matrix_rows: null",
        )
    handles = [module.register_forward_pre_hook(_adder(sums[name])) for module, name in layers.items() if name in sums]
    # The file is in the order of its sources: ids are hashes, and their order mixes them.
    chosen = heapq.nsmallest(most_rows, rows, key=lambda row: str(row["id"]))
    tokens = 0
    try:
        for row in progress(chosen, len(chosen), "row", "importance matrix"):
            with torch.inference_mode():
                model(input_ids=torch.tensor([row["input_ids"]], device=model.device), use_cache=False)
            tokens += len(row["input_ids"])
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ExportError("no training rows for the importance matrix", "data/split/train.parquet", "dvc repro split")
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def _layers(model: Any, metadata: Mapping[str, Any]) -> dict[torch.nn.Module, str]:
    """Each linear layer of the model with the name that its weight has in a GGUF of its architecture."""
    architecture = metadata["general.architecture"]
    blocks = metadata[f"{architecture}.block_count"]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, blocks)
    linear = [(name, part) for name, part in model.named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
    named = [(part, names.get_name(f"{name}.weight", try_suffixes=(".weight",))) for name, part in linear]
    return {part: name for part, name in named if name is not None}


def _matrices(tensors: Sequence[TensorEntry]) -> dict[str, int]:
    """The weights of a GGUF's blocks that llama.cpp quantises (no norms, no routers), with the length of their rows."""
    return {
        tensor.name: tensor.shape[0]
        for tensor in tensors
        if tensor.name.startswith(BLOCK)
        and tensor.name.endswith(".weight")
        and len(tensor.shape) > 1
        and not any(part in tensor.name for part in UNTOUCHED)
    }


def _adder(total: torch.Tensor) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().float().flatten(end_dim=-2)
        total.add_(rows.square().sum(dim=0).double().cpu())

    return add
