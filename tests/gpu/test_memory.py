"""The memory model beside a CUDA device's own count, on a Llama of 0.4 billion weights: within 10 % on a range."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from training_settings import NF4, make_lora, make_settings
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.io import write_json
from finetune.training.attention import choose_attention, selective_checkpointing
from finetune.training.memory_model import open_model
from finetune.training.method import loading_dtype, make_trainable
from finetune.training.model import load_extended
from finetune.training.vocabulary import Extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu-test` on a GPU host"),
]

KEPT = Extension((), 0)
SETTINGS = make_settings(
    compute_dtype="bfloat16",
    quantization=NF4,
    lora=make_lora(
        rank=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32_000}
    config = LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=32_768)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / "base.json", {"kind": "scratch"})
    return folder


def live_model(base: Path, attention: str, checkpointing: str) -> Any:
    model = load_extended(base, KEPT, SETTINGS.quantization, loading_dtype(SETTINGS), torch.device("cuda:0"))
    model.set_attn_implementation(attention)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapted = make_trainable(model, SETTINGS, KEPT).train()
    if checkpointing != "none":
        adapted.enable_input_require_grads()
    if checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif checkpointing == "selective":
        selective_checkpointing(model)
    return adapted


def peak_bytes(model: Any, optimizer: torch.optim.Optimizer, tokens: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        ids = torch.randint(3, 32_000, (1, tokens), device="cuda")
        positions = (torch.arange(tokens, device="cuda") % 1024)[None]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False, fused_lm_head=True).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("asked", ["auto", "sdpa"])
def test_the_peak_of_a_micro_batch_is_within_a_tenth_of_the_estimate(
    base: Path, asked: Any, checkpointing: str
) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    config = LlamaConfig.from_pretrained(base)
    attention = choose_attention(asked, config, torch.device("cuda:0"), torch.bfloat16)
    says, model = open_model(base, SETTINGS, KEPT, attention), live_model(base, attention, checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ratios = {}
    for tokens in (2048, 4096, 8192, 16_384):
        estimate = says.estimate(tokens, checkpointing)
        ratios[tokens] = (estimate.total - estimate.context) / peak_bytes(model, optimizer, tokens)
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
