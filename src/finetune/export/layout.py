"""config.json of a base -> what its weight files do not say of themselves: names, turned weights, tied tables.

Which layers hold their weight as [in, out] (Conv1D, as in GPT-2; a square one looks the same both ways), the name that
a file's tensor has in the model, and whether the output table is the input table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from finetune.errors import ExportError
from finetune.io import read_json

CONFIG = "config.json"
# Causal masks that transformers once saved beside the weights, as in openai-community/gpt2: no model loads them, and
# llama.cpp's converter for GPT-2 fails on them.
MASKS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Layout:
    """An architecture's tensor `names`, those of [in, out] weights, and the `prefix` that files may leave out.

    `parameters`: names of its trainable weights, of tied ones the first. `input_table` and `output_table` name the
    embedding weights; `tied`: they are one.
    """

    names: frozenset[str]
    parameters: frozenset[str]
    transposed: frozenset[str]
    prefix: str
    input_table: str
    output_table: str
    tied: bool

    def name_of(self, stored: str) -> str:
        """The name in the model of a tensor that a file calls `stored`."""
        prefixed = f"{self.prefix}.{stored}"
        return prefixed if stored not in self.names and prefixed in self.names else stored

    def is_mask(self, stored: str) -> bool:
        """Whether a file's tensor is a causal mask that the model makes itself."""
        return stored.endswith(MASKS) and self.name_of(stored) not in self.names


def read_layout(base: Path) -> Layout:
    """The architecture that a base's config.json names, built without weights.

    Raises ExportError for a base whose files are quantised: they do not hold the weights that an update adds to.
    """
    if quantised := read_json(base / CONFIG).get("quantization_config"):
        raise ExportError(
            f"the base's weights are quantised by {quantised.get('quant_method')}",
            base / CONFIG,
            "set fetch.base_model to the repository of 16-bit weights that these were made from",
        )
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {module: name for name, module in model.named_modules()}
    tables = [f"{names[table]}.weight" for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    conv1d = {f"{name}.weight" for module, name in names.items() if isinstance(module, Conv1D)}
    return Layout(
        names=frozenset(model.state_dict()),
        parameters=frozenset(name for name, _ in model.named_parameters()),
        transposed=frozenset(conv1d),
        prefix=model.base_model_prefix,
        input_table=tables[0],
        output_table=tables[1],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )
