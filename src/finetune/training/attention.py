"""settings + base model's configuration + device -> the attention that runs, chosen openly and logged in one line.

Packed documents may not see each other. torch's `sdpa` needs a mask of tokens x tokens for that; `finetune_varlen`,
made here, gives the documents' boundaries to torch's own flash attention: memory linear in the tokens, and no other
wheel. Registered as transformers asks for it: https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finetune.errors import DeviceError
from finetune.log import logger

VARLEN = "finetune_varlen"
# The kernel's own limits: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp of torch 2.13.
CAPABILITY = (8, 0)
MAX_HEAD_SIZE, HEAD_SIZE_STEP = 256, 8
HALF = (torch.bfloat16, torch.float16)
LAYER_TYPES = {"full_attention", "sliding_attention"}
# What other models give to their attention, and this kernel cannot compute.
UNKNOWN_TO_KERNEL = ("softcap", "s_aux", "position_bias")
NOT_SDPA = "caps its attention scores or adds to them, which neither sdpa nor the kernel can"
KEY = "train_qlora.attention"
SDPA_REMEDY = "set train_qlora.attention: sdpa"
SAVED_OPERATIONS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
)


def choose_attention(
    asked: Literal["auto", "sdpa", "varlen"], config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """The `attn_implementation` to load a base with, for training in `dtype`; the choice and its reason are logged.

    Raises DeviceError for a kernel that was asked for by name, and that this device or model cannot run.
    """
    mask = mask_attention(config)
    if asked == "sdpa":
        if mask != "sdpa":
            raise DeviceError(f"the base model ({config.model_type}) {NOT_SDPA}", KEY, f"set {KEY}: auto")
        logger.info("attention: sdpa, as train_qlora.attention asks")
        return mask
    reason = _device_refuses(device, dtype) or _model_refuses(config)
    if reason is None:
        register_varlen()
        logger.info("attention: %s, torch's flash attention over documents of any length", VARLEN)
        return VARLEN
    if asked == "varlen":
        raise DeviceError(f"attention is varlen, and {reason}", KEY, f"set {KEY}: auto")
    logger.info("attention: %s, since %s", mask, reason)
    return mask


def mask_attention(config: PreTrainedConfig) -> str:
    """The attention that runs on every device and in every dtype, with a mask: `sdpa`, or `eager` where sdpa cannot."""
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def register_varlen() -> None:
    """Make `finetune_varlen` known to transformers in this process; doing it again changes nothing."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def selective_checkpointing(model: Any) -> None:
    """Compute all but attention again in the backward pass, whichever attention runs.

    trl 1.16 knows the operations of sdpa by name and would compute `finetune_varlen` twice.
    """
    contexts = partial(create_selective_checkpoint_contexts, list(SAVED_OPERATIONS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})


def _device_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, it needs 8.0"
    if dtype not in HALF:
        return f"it computes in 16 bit, and train_qlora.compute_dtype is {str(dtype).removeprefix('torch.')}"
    return None


def _model_refuses(config: PreTrainedConfig) -> str | None:
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dropout = getattr(text, "attention_dropout", None) or getattr(text, "attn_pdrop", None) or 0.0
    model = f"the base model ({config.model_type})"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if mask_attention(config) != "sdpa":
        return f"{model} {NOT_SDPA}"
    if text is not config or not (kind._supports_flash_attn and kind._supports_attention_backend):
        return f"{model} has other attention than flash attention's"
    if others := sorted(set(getattr(text, "layer_types", None) or LAYER_TYPES) - LAYER_TYPES):
        return f"{model} has layers of {', '.join(others)}"
    if head_size > MAX_HEAD_SIZE or head_size % HEAD_SIZE_STEP or hasattr(text, "v_head_dim"):
        return f"{model} has heads of {head_size} values; the kernel takes multiples of 8 up to 256, one size for all"
    if dropout:
        return f"{model} drops {dropout:g} of its attention weights in training, which the kernel cannot"
    return None


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: None for rows of whole documents, else sdpa's mask (padded rows, a cache).

    Raises DeviceError for a model with a pattern of its own.
    """
    if use_vmap:
        raise DeviceError("the base model masks attention in its own way", KEY, SDPA_REMEDY)
    whole = q_length == kv_length and int(q_offset) == 0 and (attention_mask is None or bool(attention_mask.all()))
    if whole:
        return None
    mask: torch.Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        **{**others, "allow_is_causal_skip": False},
    )
    return mask


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [rows, heads, tokens, size] -> [rows, tokens, heads, size].

    `cu_seq_lens_q` (int32, documents + 1) and `max_length_q` are what trl's padding-free collator gives; without them
    the boundaries are read from `position_ids`, which waits for the device. Calls with a mask are computed by sdpa, and
    values in 32 bit document by document by sdpa: the kernel takes neither. `sliding_window` counts the token itself.
    Raises DeviceError for what the kernel cannot compute.
    """
    if attention_mask is not None:
        masked = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
        return masked[0], None
    unknown = [name for name in UNKNOWN_TO_KERNEL if others.get(name) is not None]
    if unknown or dropout or others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise DeviceError(f"the kernel has no {', '.join(unknown) or 'dropout or two-way attention'}", KEY, SDPA_REMEDY)
    rows, _, tokens, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = _boundaries(position_ids, rows, tokens, query.device)
    states = [state.transpose(1, 2).flatten(0, 1) for state in (query, key, value)]
    if torch.is_autocast_enabled(query.device.type):
        states = [state.to(torch.get_autocast_dtype(query.device.type)) for state in states]
    kernel: Any = varlen_attn if query.is_cuda and states[0].dtype in HALF else document_attention
    output = kernel(
        *states,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    return output.unflatten(0, (rows, tokens)), None


def _boundaries(
    position_ids: torch.Tensor | None, rows: int, tokens: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Starts of all documents and the end [documents + 1], int32, and the longest length; a row starts a document."""
    if position_ids is None:
        raise DeviceError("the base model's layers do not say where documents start", KEY, SDPA_REMEDY)
    first = position_ids[:, :1] - 2
    starts = (torch.diff(position_ids, prepend=first, dim=-1) != 1).expand(rows, tokens).flatten().nonzero().flatten()
    boundaries = torch.cat([starts, starts.new_tensor([rows * tokens])]).to(device, torch.int32)
    return boundaries, int(boundaries.diff().max())


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    _cu_seq_k: torch.Tensor,
    _max_q: int,
    _max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """The kernel's result [tokens, heads, size] by sdpa, one document after another: any device, any dtype."""
    outputs = []
    for start, end in pairwise(cu_seq_q.tolist()):
        # Without the row in front torch takes its slowest way through.
        queries, keys, values = (state[None, start:end].transpose(1, 2) for state in (query, key, value))
        mask = None
        if 0 <= window_size[0] < end - start - 1:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(-window_size[0])
        output = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output.transpose(1, 2)[0])
    return torch.cat(outputs)
