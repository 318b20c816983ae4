"""Which attention runs: chosen by device, dtype and model, said in the log, refused with the reason."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_models import CPU, CUDA, MODELS, SIZES
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from finetune.errors import DeviceError
from finetune.training.attention import choose_attention, mask_attention


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")


@pytest.mark.usefixtures("card")
def test_auto_takes_varlen_on_a_card_that_can_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="finetune")
    assert choose_attention("auto", MODELS["llama"], CUDA, torch.bfloat16) == "finetune_varlen"
    assert choose_attention("varlen", MODELS["gemma3"], CUDA, torch.float16) == "finetune_varlen"
    assert caplog.messages[0] == "attention: finetune_varlen, torch's flash attention over documents of any length"


def test_auto_takes_sdpa_elsewhere_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="finetune")
    assert choose_attention("auto", MODELS["llama"], CPU, torch.float32) == "sdpa"
    assert choose_attention("sdpa", MODELS["llama"], CPU, torch.float32) == "sdpa"
    assert caplog.messages == [
        "attention: sdpa, since it needs a CUDA device",
        "attention: sdpa, as train_qlora.attention asks",
    ]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("config", "dtype", "reason"),
    [
        (MODELS["llama"], torch.float32, "16 bit, and train_qlora.compute_dtype is float32"),
        (GPT2Config(), torch.bfloat16, "drops 0.1 of its attention weights"),
        (MODELS["gemma2"], torch.bfloat16, "gemma2. caps its attention scores"),
        (LlamaConfig(**{**SIZES, "head_dim": 12}), torch.bfloat16, "heads of 12 values"),
        (LlamaConfig(**{**SIZES, "head_dim": 512}), torch.bfloat16, "heads of 512 values"),
    ],
)
def test_varlen_asked_for_by_name_is_refused_with_the_reason(
    config: PreTrainedConfig, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(DeviceError, match=reason):
        choose_attention("varlen", config, CUDA, dtype)
    assert choose_attention("auto", config, CUDA, dtype) == mask_attention(config)


def test_an_older_card_is_refused_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    with pytest.raises(DeviceError, match=r"Tesla T4 has compute capability 7.5(.|\n)*set train_qlora.attention: auto"):
        choose_attention("varlen", MODELS["llama"], CUDA, torch.float16)


def test_soft_caps_take_eager_and_refuse_sdpa() -> None:
    assert choose_attention("auto", MODELS["gemma2"], CPU, torch.float32) == "eager"
    with pytest.raises(DeviceError, match="which neither sdpa nor the kernel can"):
        choose_attention("sdpa", MODELS["gemma2"], CPU, torch.float32)
