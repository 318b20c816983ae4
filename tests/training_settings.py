"""Settings of train_qlora for tiny models, of which a test names what it changes."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from finetune.training_sections import CudaMemory, Distribution, Lora, Quantization, TrainQlora

NF4 = Quantization(format="nf4", double_quantization=True)
PLAIN = Quantization(format="none", double_quantization=False)
TARGETS = ["v_proj", "q_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]

# The shape of Llama 3.1 8B.
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)


def make_lora(**changes: Any) -> Lora:
    plain = {"rank": 4, "alpha": 8, "dropout": 0.0, "use_dora": False, "use_rslora": False}
    return Lora(**{**plain, "target_modules": TARGETS, "modules_to_save": [], **changes})


def make_settings(**changes: Any) -> TrainQlora:
    """Two epochs of two rows a step in float32 on NF4 layers, with dropout, every second step a checkpoint."""
    plain = {
        "method": "lora",
        "quantization": NF4,
        "compute_dtype": "float32",
        "lora": make_lora(dropout=0.1),
        "epochs": 2,
        "batch_rows": 2,
        "micro_batch_rows": 2,
        "learning_rate": 0.03,
        "scheduler": "cosine",
        "warmup_share": 0.1,
        "weight_decay": 0.0,
        "max_gradient_norm": 1.0,
        "optimizer": "adamw_torch_fused",
        "neftune_alpha": None,
        "gradient_checkpointing": "none",
        "attention": "sdpa",
        "liger_kernels": False,
        "deterministic": True,
        "early_stopping": None,
        "max_skipped_steps": 3,
        "cuda_memory": CudaMemory(fraction=1.0, expandable_segments=False, max_split_size_mib=None),
        "distribution": Distribution(strategy="single", processes=1),
        "log_every_steps": 1,
        "evaluate_every_steps": 5,
        "save_every_steps": 2,
        "keep_checkpoints": 2,
    }
    return TrainQlora(**{**plain, **changes})
