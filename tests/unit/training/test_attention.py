"""Packed documents cannot see each other: logits and gradients alone = inside a pack, on every attention offered.

On a CPU `finetune_varlen` computes document by document: its packing arithmetic is the one that a CUDA device runs,
only the kernel is another (tests/gpu/test_varlen_attention.py).
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from attention_models import MODELS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.errors import DeviceError
from finetune.training import attention
from finetune.training.attention import register_varlen, varlen_attention, varlen_mask

OFFERED = [
    *[(name, "sdpa") for name in ("llama", "gpt2", "gemma", "qwen3", "mistral", "gemma3")],
    *[(name, attention.VARLEN) for name in ("llama", "gpt2", "gemma", "qwen3", "mistral", "gemma3")],
    ("gemma2", "eager"),
]
# Lengths of the packed documents: two rows, one document of one token, one longer than the windows.
ROWS = [[7, 1, 12], [3, 9]]
COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def make_model(name: str, implementation: str) -> Any:
    register_varlen()
    torch.manual_seed(11)
    # Of its own: a model notes its attention on its configuration.
    config = deepcopy(MODELS[name])
    return (
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation=implementation).train(False)
    )


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 32, (length,), generator=generator).tolist() for row in ROWS for length in row]


def packed_batch() -> dict[str, Any]:
    ids = iter(documents())
    rows = [[next(ids) for _ in row] for row in ROWS]
    flat = [{"input_ids": [*chain(*row)], "seq_lengths": [len(document) for document in row]} for row in rows]
    return dict(COLLATE([{**row, "labels": row["input_ids"]} for row in flat]))


def forward(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.shape[-1])
    (logits * weights).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("name", "implementation"), OFFERED)
def test_a_document_has_the_logits_in_a_pack_that_it_has_alone(name: str, implementation: str) -> None:
    model = make_model(name, implementation)
    packed = forward(model, packed_batch()).detach()
    alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in documents()])
    assert packed.shape == (32, 32)
    assert alone.std() > 0.1
    assert (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "qwen3", "mistral", "gemma3"])
def test_varlen_gives_the_logits_of_sdpa(name: str) -> None:
    ours, theirs = (forward(make_model(name, kind), packed_batch()) for kind in (attention.VARLEN, "sdpa"))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "implementation"), OFFERED)
def test_a_pack_has_the_gradients_of_its_documents_alone(name: str, implementation: str) -> None:
    model = make_model(name, implementation)
    packed = gradients(model, forward(model, packed_batch()))
    alone = gradients(model, torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in documents()]))
    for found, wanted in zip(packed, alone, strict=True):
        assert (found - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())


def test_documents_do_see_each_other_where_nothing_says_where_they_start() -> None:
    model = make_model("llama", "sdpa")
    packed = packed_batch()
    mixed = model(packed["input_ids"], use_cache=False).logits[0]
    assert (forward(model, packed) - mixed)[7:].abs().max() > 0.1


def test_with_a_key_value_cache_sdpa_forgets_the_documents_so_the_trainer_must_switch_it_off() -> None:
    model = make_model("llama", "sdpa")
    batch = {name: value for name, value in packed_batch().items() if name != "labels"}
    assert (model(**batch, use_cache=True).logits[0] - forward(model, batch))[7:].abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_without_boundaries_varlen_reads_them_from_the_positions(name: str) -> None:
    model = make_model(name, attention.VARLEN)
    batch = packed_batch()
    positions = {key: batch[key] for key in ("input_ids", "position_ids")}
    assert torch.equal(model(**positions, use_cache=False).logits[0], forward(model, batch))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_padded_rows_and_a_cache_give_the_same_as_sdpa(name: str) -> None:
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9, 10]])
    mask = (ids != 0).long()
    ours, theirs = (make_model(name, implementation) for implementation in (attention.VARLEN, "sdpa"))
    padded = [model(ids, attention_mask=mask).logits[mask == 1] for model in (ours, theirs)]
    assert (padded[0] - padded[1]).abs().max() < 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for prompt in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[1:]}):
        found, wanted = (torch.stack(model.generate(**prompt, **settings).logits) for model in (ours, theirs))
        assert (found - wanted).abs().max() < 1e-5


def test_rows_of_one_batch_are_documents_of_their_own() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]])
    ours, theirs = (make_model("mistral", kind)(ids).logits for kind in (attention.VARLEN, "sdpa"))
    assert (ours - theirs).abs().max() < 1e-5


def test_the_kernel_is_given_boundaries_windows_and_scale_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def record(*states: Any, **settings: Any) -> torch.Tensor:
        calls.append({"shapes": [tuple(state.shape) for state in states[:3]], "limits": states[3:], **settings})
        return attention.document_attention(*states, **settings)

    monkeypatch.setattr(attention, "varlen_attn", record)
    monkeypatch.setattr(attention, "HALF", (torch.float32,))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    forward(make_model("gemma3", attention.VARLEN), packed_batch())
    assert [call["window_size"] for call in calls] == [(3, 0), (3, 0), (-1, 0)]
    assert calls[0]["shapes"] == [(32, 4, 8), (32, 2, 8), (32, 2, 8)]
    starts, _, longest, _ = calls[0]["limits"]
    assert (starts.tolist(), starts.dtype, longest) == ([0, 7, 8, 20, 23, 32], torch.int32, 12)
    assert calls[0]["scale"] == pytest.approx(8**-0.5)
    assert calls[0]["enable_gqa"] is True


def test_under_autocast_the_kernel_gets_16_bit_values() -> None:
    model = make_model("llama", attention.VARLEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(model, packed_batch())
    assert (found - forward(model, packed_batch())).abs().max() < 0.5
    query = torch.ones(1, 4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = varlen_attention(torch.nn.Module(), query, query, query, None, position_ids=torch.arange(6)[None])
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"is_causal": False}, "two-way"),
        ({"position_ids": None}, "where documents start"),
    ],
)
def test_what_the_kernel_cannot_compute_is_an_error(changes: dict[str, Any], what: str) -> None:
    query = torch.ones(1, 4, 6, 8)
    settings = {"position_ids": torch.arange(6)[None], **changes}
    with pytest.raises(DeviceError, match=what):
        varlen_attention(torch.nn.Module(), query, query, query, None, **settings)


def test_a_model_with_its_own_mask_pattern_is_an_error() -> None:
    with pytest.raises(DeviceError, match="masks attention in its own way"):
        varlen_mask(1, 4, 4, use_vmap=True)


class Counted(TorchDispatchMode):
    """Counts the operations that are run; what selective checkpointing takes from its store is not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "forwards"), [("sdpa", 3), (attention.VARLEN, 15)])
def test_selective_checkpointing_computes_attention_once_and_all_else_twice(name: str, forwards: int) -> None:
    model = make_model("llama", name).train()
    attention.selective_checkpointing(model)
    with Counted() as mode:
        forward(model, packed_batch()).sum().backward()
    # Three layers; document by document, five documents each.
    assert mode.counts["aten._scaled_dot_product_flash_attention_for_cpu.default"] == forwards
    # Three layers of seven products, six of them computed again, two a product in the backward; three more at the end.
    assert mode.counts["aten.mm.default"] == 3 * (7 + 6 + 7 * 2) + 3
