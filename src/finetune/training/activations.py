"""architecture + adapter + tokens -> the bytes that a forward keeps and a backward needs, from a rehearsal.

A rehearsal runs the real modules on tensors that have a shape and no storage (torch's FakeTensorMode), so that an 8B
model costs seconds and no memory. The same functions measure a live model: the tests hold the two against each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.training.attention import VARLEN, selective_checkpointing
from finetune.training.device import dtype_named
from finetune.training.method import loading_dtype, make_trainable
from finetune.training.vocabulary import Extension, extend_vocabulary
from finetune.training_sections import TrainQlora

VARLEN_SIZES = "finetune_varlen_sizes"
# A prime above every width and vocabulary in use.
REHEARSED_TOKENS = 1_000_003
# Some tensors have a few elements more than there are tokens, of 8 bytes at most.
MOST_REMAINDER_BYTES = 64
Coefficients = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Rehearsal:
    """Bytes beside weights, adapter and gradients, as c0 + c1 tokens + c2 tokens^2: float64 coefficients.

    `kept` [3]: alive between forward and backward. `moments` [operations, 3]: alive after each operation.
    """

    kept: Coefficients
    moments: Coefficients

    def kept_bytes(self, tokens: int) -> int:
        """Kept for the backward, beside what grows with the square of the tokens."""
        return int(self.kept @ (1, tokens, 0))

    def mask_bytes(self, tokens: int) -> int:
        """Kept for the backward in tensors of tokens x tokens: masks, and scores where no kernel avoids them."""
        return int(self.kept[2]) * tokens**2

    def work_bytes(self, tokens: int) -> int:
        """At the fullest moment on top of what is kept."""
        return int(np.max((self.moments - self.kept) @ (1.0, float(tokens), float(tokens) ** 2)))

    def with_layers(self, other: Rehearsal, layers: int) -> Rehearsal:
        """What `layers` layers take, from this rehearsal of one layer and another of two."""
        kept = self.kept + (layers - 1) * (other.kept - self.kept)
        return Rehearsal(kept, other.moments - other.kept + kept)


class StandInLinear(Linear4bit):  # type: ignore[misc]
    """A frozen layer that keeps as little for the backward as bitsandbytes' 4-bit one, and that PEFT takes for one.

    Params4bit cannot be made of a tensor without storage; the packed sizes are worked out in memory_model.py.
    """

    def __init__(self, layer: Any, settings: TrainQlora) -> None:
        torch.nn.Module.__init__(self)
        turned = isinstance(layer, Conv1D)
        self.out_features, self.in_features = layer.weight.shape[::-1] if turned else layer.weight.shape
        self.source_cls = type(layer)
        self.compute_dtype = dtype_named(settings.compute_dtype)
        weight = layer.weight.new_empty(self.out_features, self.in_features)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        # PEFT asks a 4-bit weight for these.
        vars(self.weight).update(
            compress_statistics=settings.quantization.double_quantization, quant_type=settings.quantization.format
        )
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear4bit.forward of bitsandbytes 0.50.2, with the weight at hand: [..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return torch.nn.functional.linear(x.to(self.compute_dtype), self.weight, bias).to(x.dtype)


def stand_in(config: PreTrainedConfig, settings: TrainQlora, extension: Extension, attention: str) -> Any:
    """The model that training would hold, on whatever tensors the caller's mode makes, ready to train.

    `attention` is an `attn_implementation`, as attention.choose_attention returns it.
    """
    AttentionInterface.register(VARLEN_SIZES, _varlen_sizes)
    model = AutoModelForCausalLM.from_config(
        # An extended vocabulary is written into the configuration.
        deepcopy(config),
        dtype=loading_dtype(settings),
        attn_implementation=VARLEN_SIZES if attention == VARLEN else attention,
        trust_remote_code=False,
    )
    if settings.quantization.format != "none":
        kept = get_keys_to_not_convert(model)
        for name, layer in list(model.named_modules()):
            if (isinstance(layer, Conv1D) or type(layer) is torch.nn.Linear) and should_convert_module(name, kept):
                model.set_submodule(name, StandInLinear(layer, settings))
        # By this mark of transformers' quantisers PEFT chooses the class that wraps a layer.
        model.is_loaded_in_4bit = True
    with _StayOnMeta():
        extend_vocabulary(model.requires_grad_(False), extension)
        return make_trainable(model.requires_grad_(False), settings, extension)


class _StayOnMeta(TorchFunctionMode):
    """A tensor without values cannot be copied to the CPU, as the start of rows trained whole is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.cpu else func(*args, **(kwargs or {}))


def _varlen_sizes(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_mask: Any, **_others: Any
) -> tuple[torch.Tensor, None]:
    # What attention.varlen_attention asks of the kernel; its own reading of the boundaries needs values.
    query, key, value = (state.transpose(1, 2).flatten(0, 1) for state in (query, key, value))
    tokens, ends = query.shape[0], torch.empty(2, dtype=torch.int32)
    arguments: Any = (query, key, value, ends, ends, tokens, tokens)
    output: Any = varlen_attn(*arguments, window_size=(-1, 0), enable_gqa=True)
    return output[None], None


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make and that are still alive; those in `known` are not counted.

    With a prime number of tokens that divides no size of the model, the remainder says how a size grows with tokens.
    """

    def __init__(self, known: set[int], tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.tokens = known, tokens
        self.alive: dict[int, tuple[tuple[int, int, int], Any]] = {}
        self.now = [0, 0, 0]
        self.moments: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.moments.add(tuple(self.now))
        return out

    def _count(self, storage: Any) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return
        constant, linear, square = size_bytes, 0, 0
        if size_bytes % self.tokens**2 == 0:
            constant, square = 0, size_bytes // self.tokens**2
        elif size_bytes % self.tokens <= MOST_REMAINDER_BYTES:
            linear, constant = divmod(size_bytes, self.tokens)
        self.alive[key] = (constant, linear, square), weakref.ref(storage, lambda _: self._forget(key))
        self.now = [before + more for before, more in zip(self.now, (constant, linear, square), strict=True)]

    def _forget(self, key: int) -> None:
        size, _ = self.alive.pop(key)
        self.now = [before - less for before, less in zip(self.now, size, strict=True)]


def rehearse(model: Any, settings: TrainQlora, tokens: int, checkpointing: str) -> Rehearsal:
    """Run the decoder of `model` forward and backward over one row of `tokens` tokens, two documents, and count.

    Gradients are there before, as from the second micro-batch of a step on. The output layer is left out.
    """
    decoder, device = _prepare(model, checkpointing), next(model.parameters()).device
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    known = {tensor.untyped_storage()._cdata for tensor in held}
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = (torch.arange(tokens, device=device) % -(-tokens // 2))[None]
    dtype = dtype_named(settings.compute_dtype)
    with LiveBytes(known, tokens) as live, _as_on_cuda(settings.compute_dtype):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        kept = list(live.now)
        hidden.backward(torch.ones_like(hidden))
    return Rehearsal(np.array(kept, dtype=np.float64), np.array(sorted(live.moments), dtype=np.float64))


def rehearse_shapes(
    config: PreTrainedConfig, settings: TrainQlora, extension: Extension, attention: str, checkpointing: str
) -> Rehearsal:
    """`rehearse` for the whole architecture without storage, from one and from two of its layers."""
    parts = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = stand_in(with_layers(config, layers), settings, extension, attention)
        mode = FakeTensorMode()
        without_storage(model, mode)
        with mode:
            parts.append(rehearse(model, settings, REHEARSED_TOKENS, checkpointing))
    return parts[0].with_layers(parts[1], config.get_text_config().num_hidden_layers)


def _prepare(model: Any, checkpointing: str) -> Any:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing != "none" and causal is not model:
        model.enable_input_require_grads()
    if checkpointing == "full":
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    elif checkpointing == "selective":
        selective_checkpointing(causal)
    model.train()
    return causal.base_model


class _NormsInFloat32(TorchFunctionMode):
    """CUDA's autocast computes layer norms in float32, a CPU's does not (torch 2.13, aten/src/ATen/autocast_mode.h)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_cuda(compute_dtype: str) -> Iterator[None]:
    """What 16-bit training on CUDA does otherwise: PEFT 0.21 asks CUDA's autocast flag whether to cast."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", compute_dtype != "float32")
    try:
        with _NormsInFloat32():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with `layers` decoder layers, and no dropout in its attention.

    CUDA's attention kernels keep only a seed for dropout, and a CPU's have none.
    """
    values = config.to_dict()
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    values |= {name: 0.0 for name in ("attention_dropout", "attn_pdrop") if name in values}
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config).from_dict(values)


def without_storage(model: Any, mode: FakeTensorMode) -> Any:
    """Turn a model on the device `meta` into one whose tensors say that they lie on a CPU, in place; tied ones stay so.

    Autocast casts such tensors, and none on `meta`.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = mode.fake_tensor_converter.from_meta_and_device(mode, tensor.detach(), torch.device("cpu"))
                    trained = tensor.requires_grad
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(fake, requires_grad=trained) if is_parameter else fake
                tensors[name] = made[id(tensor)]
    return model
