"""A recipe -> the same recipe at a size that a test can run: formats, columns, filters, template, masks and mix stay.

What changes: the base model is a tiny Llama made here, so a kept or extended tokenizer becomes a trained one with the
same special tokens; lengths, steps and budgets shrink; the arithmetic is that of a processor instead of a GPU.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

from clone import ROOT, git, run
from ruamel.yaml import YAML

MAX_TOKENS = 384
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "layers": 1,
    "attention_heads": 4,
    "key_value_heads": 2,
    "max_position_tokens": 1024,
    "tie_embeddings": True,
    "pretrain_steps": 10,
    "batch_rows": 2,
    "row_tokens": 128,
    "learning_rate": 4.0e-3,
}
# Special tokens of the bases that the miniature replaces.
TOKENS: dict[str, dict[str, Any]] = {
    "dolores_v5": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "role_markers": ["<|start_header_id|>", "<|end_header_id|>"],
    },
    "tweet_style": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|pad|>",
        "role_markers": ["<|reserved_special_token_1|>"],
    },
    "gpt2_guide": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "role_markers": ["<|reserved|>"],
    },
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shrink(content: dict[str, Any], local_dir: str) -> dict[str, Any]:
    """The miniature of a recipe's params.yaml; changes `content` itself."""
    name, tokenizer, training = content["recipe"], content["tokenizer"], content["train_qlora"]
    content["fetch"]["base_model"] = {"kind": "scratch"}
    content["fetch"]["local_dir"] = local_dir
    for source in content["fetch"]["sources"]:
        if source["origin"]["kind"] == "hub_stream":
            source["origin"]["max_bytes"] = 40_000
    if tokenizer["strategy"] == "train":
        trained: dict[str, Any] = dict(tokenizer)
    else:
        defaults = {"strategy": "train", "min_frequency": 2, "corpus": None, "unk_token": None, "special_tokens": []}
        trained = {"chat_template": tokenizer["chat_template"], **defaults, **TOKENS[name]}
    content["tokenizer"] = {**trained, "vocab_size": 700, "max_words": 100_000}
    content["base"] = {"scratch": dict(SHAPE)}
    content["tokenize"]["max_tokens"] = MAX_TOKENS
    content["split"] |= {"pack_tokens": MAX_TOKENS, "mini_train_rows": 20}
    training |= {
        "compute_dtype": "float32",
        "epochs": 1,
        "batch_rows": 2,
        "micro_batch_rows": 1,
        "optimizer": "adamw_torch_fused",
        "gradient_checkpointing": "none",
        "attention": "sdpa",
        "evaluate_every_steps": 1000,
        "save_every_steps": 1000,
        "log_every_steps": 1,
    }
    if "c_attn" in training["lora"]["target_modules"]:
        training["lora"]["target_modules"] = SEVEN
    content["evaluate"] |= {"samples_per_source": 1, "answers_per_task": 2, "max_new_tokens": 8}
    content["merge"] |= {"compare_dtype": "float32", "max_logit_difference": 0.1}
    content["ollama_modelfile"]["num_ctx"] = min(1024, content["ollama_modelfile"]["num_ctx"])
    content["register"]["mode"] = "upload"
    return content


def install(folder: Path, recipe: str, hub_url: str, files: dict[str, bytes]) -> None:
    """Make `recipe` of a clone a miniature with local files of its own, pin it, and use it as a person would."""
    local = folder / "data/miniature"
    local.mkdir(parents=True)
    for name, content in (files or {"unused.txt": b"This recipe reads the Hub only.\n"}).items():
        (local / name).write_bytes(content)
    path = folder / "recipes" / recipe / "params.yaml"
    yaml = YAML(typ="rt", pure=True)
    shrunk = shrink(yaml.load(path.read_text(encoding="utf-8")), "data/miniature")
    text = io.StringIO()
    yaml.dump(shrunk, text)
    path.write_text(text.getvalue(), encoding="utf-8")
    for target in ("pin", "recipe"):
        finished = make(folder, target, f"NAME={recipe}", HF_ENDPOINT=hub_url)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", f"miniature of {recipe}")


def make(folder: Path, target: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A target of the clone's Makefile, without its setup."""
    return run(["make", "--no-print-directory", "--old-file", "setup", target, *arguments], folder, **environment)


def recipes() -> list[str]:
    """Every recipe but smoke, which runs whole."""
    return sorted(file.parent.name for file in ROOT.glob("recipes/*/params.yaml") if file.parent.name != "smoke")
