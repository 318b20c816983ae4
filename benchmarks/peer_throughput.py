"""A peer's QLoRA on train_throughput.py's work, in the peer's own environment: `peer_throughput.py NAME CASE.json`.

Each is given what its documentation advises for one GPU: its own packing, attention, kernels and checkpointing; rows of
the same ids, rank 16 on all linear layers, NF4, bfloat16, as many rows a step. Tokens are counted where the model looks
them up, padding with them, so that no peer is credited with fewer. Unsloth is called from Python; axolotl and
LLaMA-Factory read the configuration file that is written here. Not run on a GPU so far: a peer whose interface has
changed ends as a fault of its case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any


def make_checkpoint(scale: dict[str, Any], target: Path) -> dict[str, Any]:
    """Write the random model in bfloat16, a file a layer, and a tokenizer of one word an id; in our own environment."""
    import torch
    from safetensors.torch import save_file
    from throughput_case import random_state
    from throughput_work import TARGETS
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    target.mkdir()
    shape = scale["shape"]
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(target)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, shape["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(target)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    state = random_state(shape, torch.bfloat16, device)
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        # Projections of one shape are one tensor; a file must not hold it under two names.
        own = tensor.clone() if any(target in name for target in TARGETS) else tensor
        files.setdefault(f"model-{part}.safetensors", {})[name] = own.cpu()
    for file, tensors in files.items():
        save_file(tensors, target / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in files.items() for name in tensors}
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"size_gb": round(size_bytes / 1e9, 3)}


def documents(scale: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The documents of the packed rows, one a row: what a peer packs itself."""
    from throughput_work import packed_rows

    found = []
    for row in packed_rows(scale):
        start = 0
        for length in row["seq_lengths"]:
            ids = row["input_ids"][start : start + length]
            found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)})
            start += length
    return found


def unsloth(checkpoint: Path, scale: dict[str, Any], folder: Path) -> None:
    """FastLanguageModel with its checkpointing, its packing in TRL's trainer."""
    from datasets import Dataset
    from throughput_work import RANK, TARGETS
    from trl import SFTConfig, SFTTrainer

    fast = import_module("unsloth").FastLanguageModel
    model, tokenizer = fast.from_pretrained(
        str(checkpoint), max_seq_length=scale["row_tokens"], load_in_4bit=True, local_files_only=True
    )
    model = fast.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=TARGETS,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in documents(scale)])
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=scale["steps"],
        per_device_train_batch_size=scale["batch_rows"],
        max_length=scale["row_tokens"],
        packing=True,
        save_strategy="no",
        report_to="none",
    )
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()


def axolotl(checkpoint: Path, scale: dict[str, Any], folder: Path) -> None:
    """Its command line with sample packing on a tokenised Parquet file; its LoRA kernels on."""
    from datasets import Dataset

    Dataset.from_list(documents(scale)).to_parquet(str(folder / "documents.parquet"))
    config = {
        "base_model": str(checkpoint),
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_mlp_kernel": True,
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
        "datasets": [{"path": str(folder / "documents.parquet"), "ds_type": "parquet"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "sequence_len": scale["row_tokens"],
        "sample_packing": True,
        "micro_batch_size": scale["batch_rows"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": scale["steps"],
        "num_epochs": 4,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "learning_rate": 1e-4,
        "bf16": True,
        "flash_attention": False,
        "sdp_attention": True,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    }
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    import_module("axolotl.cli.train").do_cli(config=str(folder / "config.yaml"))


def llamafactory(checkpoint: Path, scale: dict[str, Any], folder: Path) -> None:
    """Its trainer on rows packed and tokenised ahead, which it takes from a folder of `datasets`."""
    from datasets import Dataset
    from throughput_work import packed_rows

    rows = [
        {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": row["labels"]}
        for row in packed_rows(scale)
    ]
    Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
    import_module("llamafactory.train.tuner").run_exp(
        {
            "model_name_or_path": str(checkpoint),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "lora_target": "all",
            "quantization_bit": 4,
            "quantization_method": "bnb",
            "double_quantization": False,
            "template": "empty",
            "tokenized_path": str(folder / "rows"),
            "cutoff_len": scale["row_tokens"],
            "per_device_train_batch_size": scale["batch_rows"],
            "gradient_accumulation_steps": 1,
            "max_steps": scale["steps"],
            "learning_rate": 1e-4,
            "bf16": True,
            "flash_attn": "auto",
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(folder / "out"),
        }
    )


PEERS = {"unsloth": unsloth, "axolotl": axolotl, "llamafactory": llamafactory}


def measure(name: str, scale: dict[str, Any], checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Train with a peer, count the tokens that its model looks up, and return the figures."""
    if name == "unsloth":
        # It patches torch, transformers and trl, and has to come before the hooks.
        import_module("unsloth")
    import torch
    from throughput_work import Clock, memory_figures
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, scale["warmup_steps"], scale["steps"])
    looked_up: list[int] = []
    counts: list[int] = []

    def count(module: Any, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and inputs:
            looked_up.append(inputs[0].numel())

    def step(*arguments: Any) -> None:
        clock(*arguments)
        counts.append(sum(looked_up))
        if len(counts) == 1 and device.type == "cuda":
            # What the peer did to load the model is not the memory of its training.
            torch.cuda.reset_peak_memory_stats(device)

    hooks = [register_module_forward_pre_hook(count), register_optimizer_step_post_hook(step)]
    PEERS[name](checkpoint, scale, folder)
    for hook in hooks:
        hook.remove()
    warm = max(scale["warmup_steps"], 1)
    tokens = (counts[-1] - counts[warm - 1]) / (len(counts) - warm)
    return {**clock.figures(tokens), **memory_figures(device)}


def main() -> None:
    """Make the checkpoint, or run a peer on it, and leave the figures beside the request."""
    name, file = sys.argv[1], Path(sys.argv[2])
    request = json.loads(file.read_text(encoding="utf-8"))
    checkpoint = Path(request["folder"]) / "checkpoint"
    with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
        if name == "checkpoint":
            result = make_checkpoint(request["scale"], checkpoint)
        else:
            result = measure(name, request["scale"], checkpoint, Path(folder))
    file.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
