"""what was trained -> what it does to each weight of its base; what a merge does not know is refused.

It is an adapter as PEFT saves it (https://huggingface.co/docs/peft/developer_guides/checkpoint, peft 0.21), or the
whole model of a full fine-tuning. Only headers are read here: an update's own tensors are read when its weight is
merged, and dropped behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.layout import Layout
from finetune.export.weights import Stored

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
LORA_PARTS = ("A.weight", "B.weight", "magnitude_vector")
# Kinds of LoRA whose product is not W + scale * B A, or whose parameters are no linear layer's.
UNKNOWN_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) change the base as well: what they train fits no original weight.
KNOWN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
RETRAIN = "dvc repro --force --single-item train_qlora"


@dataclass(frozen=True)
class LowRank:
    """W + scale * B A for a weight [out, in]: A [rank, in], B [out, rank]; with DoRA, each row brought to a magnitude.

    DoRA: Liu et al. 2024, arXiv 2402.09353; `magnitude` [out] is the length of each row of the merged weight.
    """

    a: Stored
    b: Stored
    magnitude: Stored | None
    scale: float


@dataclass(frozen=True)
class Rows:
    """What stands in place of rows of an embedding table: ascending token ids, and values [ids, width]."""

    ids: tuple[int, ...]
    values: Stored


@dataclass(frozen=True)
class Table:
    """What stands in place of a whole weight: of `modules_to_save`, or of a full fine-tuning."""

    values: Stored


Update = LowRank | Rows | Table


def read_updates(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], layout: Layout, trained_ids: Sequence[int], where: Path
) -> dict[str, Update]:
    """The adapter's updates by the name of the weight in the base model.

    `config`: adapter_config.json; `tensors`: the adapter's file, open; `trained_ids`: the vocabulary's rows that it
    must hold. Raises ExportError, naming `where`, for settings and tensors that cannot be merged, and for rows that are
    missing or are other tokens'.
    """
    _check_settings(config, where)
    updates: dict[str, Update] = {}
    left = set(tensors)
    for module in sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}):
        a, b, magnitude = (tensors.get(f"{module}.lora_{part}") for part in LORA_PARTS)
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            continue
        left -= {f"{module}.lora_{part}" for part in LORA_PARTS}
        layer = module.removeprefix(PREFIX)
        updates[f"{layer}.weight"] = LowRank(a, b, magnitude, _scale(config, layer, rank=a.shape[0]))
    for name in sorted(name for name in tensors if name.endswith(ROWS_SUFFIX)):
        layer = name.removeprefix(PREFIX).removesuffix(ROWS_SUFFIX)
        ids = _ids_of(config["trainable_token_indices"], layer)
        if len(ids) == tensors[name].shape[0]:
            left.remove(name)
            updates[f"{layer}.weight"] = Rows(ids, tensors[name])
    for name in sorted(left):
        weight = name.removeprefix(PREFIX)
        if weight in layout.names and weight not in updates and _is_saved_whole(config, weight, layout):
            left.remove(name)
            updates[weight] = Table(tensors[name])
    if left:
        raise ExportError(
            f"the adapter holds tensors that a merge does not know: {', '.join(sorted(left)[:3])}",
            where / WEIGHTS_FILE,
            "train with LoRA, DoRA or rsLoRA on linear layers, rows of new tokens and modules_to_save",
        )
    _check_rows(config, updates, layout, trained_ids, where)
    return updates


def whole_updates(tensors: Mapping[str, Stored], layout: Layout, where: Path) -> dict[str, Update]:
    """The updates of a full fine-tuning: every weight of the base is replaced by the one in `tensors`.

    Raises ExportError, naming `where`, when these are not exactly the architecture's weights.
    """
    if wrong := sorted(layout.parameters ^ set(tensors)):
        raise ExportError(
            f"the trained model does not hold exactly the base's weights; {len(wrong)} differ, such as {wrong[0]}",
            where,
            RETRAIN,
        )
    updates: dict[str, Update] = {name: Table(values) for name, values in tensors.items()}
    if layout.tied:
        updates[layout.output_table] = updates[layout.input_table]
    return updates


def _check_settings(config: Mapping[str, Any], where: Path) -> None:
    found = [f"{name}: {config[name]}" for name in UNKNOWN_SETTINGS if config.get(name)]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        found.append(f"bias: {config['bias']}")
    if config.get("init_lora_weights", True) not in KNOWN_STARTS:
        found.append(f"init_lora_weights: {config['init_lora_weights']}")
    if found:
        raise ExportError(
            f"the adapter was made with settings that a merge does not know: {', '.join(found)}",
            where / CONFIG_FILE,
            "train with LoRA, DoRA or rsLoRA, bias: none and init_lora_weights: true",
        )


def _scale(config: Mapping[str, Any], layer: str, *, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); the first pattern that fits a layer counts."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = float([*fitting, config["lora_alpha"]][0])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ids_of(indices: Mapping[str, Sequence[int]] | Sequence[int] | None, layer: str) -> tuple[int, ...]:
    """The token ids of a layer's rows: PEFT keeps one list for the input table, or one for each layer's name."""
    if isinstance(indices, Mapping):
        return next((tuple(ids) for name, ids in indices.items() if f".{layer}".endswith(f".{name}")), ())
    return tuple(indices or ())


def _is_saved_whole(config: Mapping[str, Any], weight: str, layout: Layout) -> bool:
    """PEFT saves every module whose name ends as one of modules_to_save, and with it an output table kept tied."""
    module = weight.rpartition(".")[0]
    if any(module.endswith(name) for name in config.get("modules_to_save") or ()):
        return True
    return bool(config.get("ensure_weight_tying")) and weight == layout.output_table


def _check_rows(
    config: Mapping[str, Any], updates: Mapping[str, Update], layout: Layout, trained_ids: Sequence[int], where: Path
) -> None:
    held = {name: update.ids for name, update in updates.items() if isinstance(update, Rows)}
    named = config.get("trainable_token_indices")
    for layer in named if isinstance(named, Mapping) else ():
        if not any(f".{name}".endswith(f".{layer}.weight") for name in held):
            raise ExportError(f"the adapter names rows of {layer} and holds none", where / WEIGHTS_FILE, RETRAIN)
    tables = {layout.input_table} if layout.tied else {layout.input_table, layout.output_table}
    missing = [name for name in tables if not isinstance(updates.get(name), Rows | Table)] if trained_ids else []
    if missing or any(ids != tuple(trained_ids) for ids in held.values()):
        raise ExportError(
            f"the tokenizer has {len(trained_ids)} new tokens, and the adapter holds rows of "
            f"{len(next(iter(held.values()), ()))}, or of other ones",
            where / WEIGHTS_FILE,
            "train with this tokenizer: dvc repro train_qlora",
        )
