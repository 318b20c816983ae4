"""torch's flash attention over packed documents on a CUDA device: equal to sdpa alone, and equal bytes twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finetune.training.attention import VARLEN, choose_attention, document_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="no CUDA device of compute capability 8.0: run `make gpu-test` on a GPU host",
    ),
]

LENGTHS = [700, 1, 129, 64, 33]
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=32, query_pre_attn_scalar=64, layer_types=["sliding_attention", "full_attention"]
    ),
}


def make_states(head_size: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [
        torch.randn(sum(LENGTHS), heads, head_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]


def attend(kernel: Any, states: list[torch.Tensor], window: int) -> list[torch.Tensor]:
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device="cuda")
    longest = max(LENGTHS)
    output = kernel(
        *states,
        ends,
        ends,
        longest,
        longest,
        scale=states[0].shape[-1] ** -0.5,
        window_size=(window, 0),
        enable_gqa=True,
    )
    return [output, *torch.autograd.grad((output.float() ** 2).sum(), states)]


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("window", [-1, 31])
def test_the_kernel_computes_what_sdpa_computes_document_by_document(head_size: int, window: int) -> None:
    states = make_states(head_size)
    found = attend(varlen_attn, states, window)
    wanted = attend(document_attention, [state.detach().float().requires_grad_() for state in states], window)
    for ours, theirs in zip(found, wanted, strict=True):
        # bfloat16 keeps 8 bits: 1/256 of the largest value, a few times over.
        assert (ours.float() - theirs).abs().max() < 0.03 * theirs.abs().max()


@pytest.mark.parametrize("window", [-1, 31])
def test_two_backward_passes_give_the_same_bytes_in_deterministic_mode(window: int) -> None:
    torch.use_deterministic_algorithms(True)
    states = make_states(128)
    first, second = attend(varlen_attn, states, window), attend(varlen_attn, states, window)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_document_has_the_logits_in_a_pack_that_it_has_alone(name: str) -> None:
    config: PreTrainedConfig = MODELS[name]
    assert choose_attention("auto", config, torch.device("cuda:0"), torch.bfloat16) == VARLEN
    torch.manual_seed(5)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind._from_config(config, attn_implementation=VARLEN, dtype=torch.bfloat16).to("cuda").eval()
    documents = [torch.randint(1, 128, (1, length), device="cuda") for length in LENGTHS]
    positions = torch.cat([torch.arange(length, device="cuda") for length in LENGTHS])[None]
    packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits[0].float()
    alone = torch.cat([model(ids, use_cache=False).logits[0] for ids in documents]).float()
    assert (packed - alone).abs().max() < 0.03 * alone.abs().max()
