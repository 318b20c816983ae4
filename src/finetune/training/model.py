"""models/base + quantisation + adapter settings -> a model ready to train, evaluate or merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from finetune.errors import DataError, DeviceError
from finetune.io import read_json, sha256_file, write_json
from finetune.log import logger
from finetune.training.attention import mask_attention
from finetune.training.vocabulary import Extension, extend_vocabulary, remember_start, table_names
from finetune.training_sections import Lora, Quantization

BASE_FILE = "base.json"
PEFT_PREFIX = "base_model.model."
REFETCH = "dvc repro --force --single-item fetch"


def locate_base(base: Path) -> Path:
    """The folder that holds the base model's weights: `base` itself for scratch, the Hub cache's snapshot otherwise."""
    manifest = read_json(base / BASE_FILE)
    if manifest["kind"] == "scratch":
        return base
    config = try_to_load_from_cache(manifest["repo_id"], "config.json", revision=manifest["revision"])
    if not isinstance(config, str):
        raise DataError(
            f"{manifest['repo_id']} at {manifest['revision']} is not in the Hub cache", base / BASE_FILE, REFETCH
        )
    return Path(config).parent


def verify_base(base: Path) -> None:
    """Compare every cached file of a Hub base with the manifest's SHA-256; raises DataError for the first fault.

    The files of a scratch base are an out of DVC's, and have no manifest.
    """
    folder = locate_base(base)
    for file in read_json(base / BASE_FILE).get("files", []):
        path = folder / file["path"]
        if not path.is_file():
            raise DataError("file of the base model is missing from the Hub cache", path, REFETCH)
        if (found := sha256_file(path)) != file["sha256"]:
            what = f"SHA-256 is {found}, the manifest says {file['sha256']}"
            raise DataError(what, path, f"delete it, then {REFETCH}")


def check_needs_no_code(base: Path, tokenizer: Path) -> None:
    """Raise DataError for a model or tokenizer that needs Python of its repository (`auto_map`), which is never run.

    So is one of an architecture that transformers does not know.
    """
    for folder, reader in ((locate_base(base), AutoConfig), (tokenizer, AutoTokenizer)):
        try:
            reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except ValueError as fault:
            raise DataError(
                f"transformers cannot read it without code of its repository: {str(fault).strip().splitlines()[0]}",
                folder,
                "set fetch.base_model to a model whose architecture and tokenizer transformers has itself",
            ) from None


def load_base(
    base: Path,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
) -> Any:
    """Load the base model, frozen, with its linear layers in 4 bit when `quantization` asks for it.

    `attention`: what `choose_attention` returned; None for the one that runs everywhere.
    Only safetensors are read, and code from the repository never runs. Raises DeviceError when no layer became 4-bit,
    and DataError for a base whose own files are quantised: neither a merge nor full training can use their weights.
    """
    weights, config = locate_base(base), None
    if quantised := read_json(weights / "config.json").get("quantization_config"):
        raise DataError(
            f"the base's own weights are quantised ({quantised.get('quant_method')})",
            weights / "config.json",
            "set fetch.base_model to the repository of 16-bit weights that these were made from",
        )
    if quantization is not None and quantization.format != "none":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.format,
            bnb_4bit_use_double_quant=quantization.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    form = AutoConfig.from_pretrained(weights, trust_remote_code=False, local_files_only=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=dtype,
            device_map={"": device},
            quantization_config=config,
            attn_implementation=attention or mask_attention(form),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except SafetensorError as fault:
        remedy = REFETCH if weights != base else "dvc repro --force --single-item base"
        raise DataError(f"the base model's weights cannot be read: {fault}", weights, remedy) from fault
    if config is not None:
        _pin_four_bit_layers(model)
    return model.requires_grad_(False)


def load_extended(
    base: Path,
    extension: Extension,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
) -> Any:
    """The base model with the vocabulary of models/tokenizer: its embedding tables grown, new rows at their start.

    Every stage that loads a base, with an adapter or without, does it here: the rows must be the same ones.
    """
    model = load_base(base, quantization, dtype, device, attention)
    extend_vocabulary(model, extension)
    return model.requires_grad_(False)


def _pin_four_bit_layers(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise DeviceError(
            "no layer of the base model became 4-bit",
            "train_qlora.quantization.format",
            "set train_qlora.quantization.format: none to train on 16-bit weights",
        )
    others = [name for name, module in _linear_layers(model).items() if not isinstance(module, Linear4bit)]
    logger.info("%d layers in 4 bit; not in 4 bit: %s", len(layers), ", ".join(others) or "none")
    for layer in layers:
        # bitsandbytes 0.50.2 dequantises such rows wrongly with its AVX-512 kernel: 64 values share a scale.
        if layer.weight.device.type == "cpu" and layer.in_features % 16 == 0 and layer.in_features % 64:
            raise DeviceError(
                f"bitsandbytes reads 4-bit rows of {layer.in_features} values wrongly on a CPU",
                "train_qlora.quantization.format",
                "set train_qlora.quantization.format: none, or train on a GPU",
            )
        # bitsandbytes repacks weights for an AVX512-BF16 kernel where the processor has it, and rounds to
        # bfloat16 there: the result would depend on the processor (bitsandbytes 0.50, nn/modules.py).
        layer.support_avx512bf16_for_cpu = False


def four_bit_layers(model: Any) -> int:
    """How many linear layers are held in 4 bit."""
    return sum(isinstance(module, Linear4bit) for module in model.modules())


def _linear_layers(model: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def add_adapter(model: Any, lora: Lora, extension: Extension) -> Any:
    """Wrap `model` with a fresh LoRA adapter; trained beside it are the modules that `lora.modules_to_save` names.

    The rows of an extended vocabulary are trained alone where their table is not trained whole. Of tied tables both
    are, as one. Raises DataError when no module has a name that is asked for, and DeviceError when some layers of the
    base are 4-bit and one of the targets is not.
    """
    # The output layer is left out: with tied embeddings it is also the input, which a merge would change with it.
    layers = {name: part for name, part in _linear_layers(model).items() if part is not model.get_output_embeddings()}
    names = {_last(name) for name in layers}
    if missing := sorted(set(lora.target_modules) - names):
        raise DataError(
            f"the base model has no linear layer to adapt named {', '.join(missing)}",
            "train_qlora.lora.target_modules",
            f"choose among: {', '.join(sorted(names))}",
        )
    targets = {name: module for name, module in layers.items() if _last(name) in lora.target_modules}
    _check_four_bit(model, targets)
    whole, tables = _saved_whole(model, lora), table_names(model)
    # A tied output follows the input by itself.
    rows = {name: list(extension.ids) for name in tables if extension.ids and name not in whole} or None
    remember_start(model, extension, set(tables) & set(whole))
    # PEFT compares the vocabulary with that of the base of this name, and saves whole tables when they differ.
    model.name_or_path = ""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        target_modules=sorted(lora.target_modules),
        fan_in_fan_out=any(_stands_for_conv1d(module) for module in targets.values()),
        bias="none",
        modules_to_save=whole or None,
        ensure_weight_tying=len(tables) == 1 and tables[0] in whole,
        trainable_token_indices=rows,
    )
    adapted = get_peft_model(model, config)
    if isinstance(output := adapted.get_output_embeddings(), TrainableTokensWrapper):
        # trl 1.16 reads weight and bias of the output layer, and peft 0.21 answers for the weight alone.
        output.register_parameter("bias", None)
    return adapted


def _check_four_bit(model: Any, targets: Mapping[str, torch.nn.Module]) -> None:
    """Raise DeviceError for a target in 16 bit beside layers in 4 bit: the memory that was counted on is not saved."""
    wide = [name for name, module in targets.items() if not isinstance(module, Linear4bit)]
    if wide and four_bit_layers(model):
        raise DeviceError(
            f"{len(wide)} of {len(targets)} layers to adapt are not in 4 bit, such as {wide[0]}",
            "train_qlora.lora.target_modules",
            f"leave out {', '.join(sorted({_last(name) for name in wide}))}, or set quantization.format: none",
        )


def _saved_whole(model: Any, lora: Lora) -> list[str]:
    """Full names, sorted, of the modules that `modules_to_save` means; of tied tables both, where it means one.

    PEFT takes every module whose name ends so, and `norm` ends `input_layernorm`: here it is a whole part of the name.
    """
    usable = {
        name
        for name, module in model.named_modules()
        if not any(module.children())
        and any(True for _ in module.parameters())
        and not isinstance(module, Linear4bit)
        and _last(name) not in lora.target_modules
    }
    chosen: set[str] = set()
    for wanted in lora.modules_to_save:
        found = {name for name in usable if f".{name}".endswith(f".{wanted}")}
        if not found:
            raise DataError(
                f"the base model has no module to train whole named {wanted} (adapted and 4-bit layers are none)",
                "train_qlora.lora.modules_to_save",
                f"choose among: {', '.join(sorted({_last(name) for name in usable}))}",
            )
        chosen |= found
    ends = {
        name
        for name, module in model.named_modules()
        if module is model.get_input_embeddings() or module is model.get_output_embeddings()
    }
    # Both: PEFT knows tied tables by the output's name, whatever an architecture calls the input.
    if len(table_names(model)) == 1 and chosen & ends:
        chosen |= ends
    return sorted(chosen)


def _stands_for_conv1d(layer: torch.nn.Module) -> bool:
    """Whether the base holds this layer's weight as [in, out], as GPT-2 does; a 4-bit layer holds it as [out, in]."""
    # transformers 5.23 notes on a 4-bit layer the class that it took the place of, and turns its weight.
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def attach_adapter(model: Any, adapter: Path) -> Any:
    """Wrap `model` with the trained adapter of a folder, for inference; modules saved whole get the model's dtype."""
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=False).eval()


def keep_adapter_float32(model: Any) -> None:
    """Hold trainable weights in float32: TRL casts them to bfloat16, and a resumed run then ends in other bytes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def save_adapter(model: Any, target: Path) -> None:
    """Write adapter weights and a configuration whose bytes depend on neither hash seed nor location."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(str(target), safe_serialization=True)
    except SafetensorError as fault:
        remedy = "free some space, then `dvc repro`, which goes on from the last checkpoint"
        raise DataError(f"the adapter could not be written ({fault})", target, remedy) from fault
    (target / "README.md").unlink(missing_ok=True)
    config = read_json(target / "adapter_config.json")
    # PEFT keeps target_modules as a set, and the path of the base as it was given.
    config["target_modules"] = sorted(config["target_modules"])
    # PEFT leaves tied tables out of its list, and then knows those tables alone again that it knows by name.
    whole = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    config["modules_to_save"] = sorted(name.removeprefix(PEFT_PREFIX) for name in whole) or None
    config["base_model_name_or_path"] = None
    write_json(target / "adapter_config.json", config)
