"""The arithmetic of a smoke run in small, as one SHA-256 per kind: to compare processors.

`python benchmarks/cpu_probe.py NAME [GGUF ...]` writes the hashes under NAME into benchmarks/cpu_probe.json and says
whether they equal those of the other processors there. Another processor can be emulated (Debian package qemu-user):
`qemu-x86_64 -cpu Haswell-noTSX .venv/bin/python benchmarks/cpu_probe.py "Intel Haswell, emulated"`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import finetune.stages  # noqa: F401 (pins the CPU code path before torch loads)

from finetune.training.device import make_deterministic  # isort: skip

import bitsandbytes.functional as four_bit
import numpy as np
import torch

from finetune.export import gguf
from finetune.io import read_json, write_json

RESULT = Path(__file__).with_suffix(".json")

# (rows, inner, columns) of the smoke model's matrix products, and one that is no multiple of any block.
PRODUCTS = ((512, 256, 256), (512, 256, 512), (512, 512, 256), (512, 256, 1536), (77, 130, 61))


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the bytes of tensors, in order."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def products() -> list[torch.Tensor]:
    """Matrix products in the three layouts of a forward and a backward pass."""
    out = []
    for rows, inner, columns in PRODUCTS:
        left, right = torch.randn(rows, inner), torch.randn(columns, inner)
        out += [left @ right.T, torch.nn.functional.linear(left, right), left.T @ torch.randn(rows, columns)]
    return out


def functions() -> list[torch.Tensor]:
    """The elementwise functions and reductions of a Llama, its loss and its optimizer."""
    values = torch.randn(64, 1536)
    normal = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
    shaped = (torch.nn.functional.silu(values), torch.cos(values), torch.sin(values), values.exp())
    return [
        normal,
        *shaped,
        torch.log_softmax(values, -1),
        torch.softmax(values, -1),
        values.sum(0),
        values.double().sum()[None],
    ]


def attention() -> list[torch.Tensor]:
    """Causal attention with its gradient, as used by the packed rows."""
    query, key, value = (torch.randn(1, 4, 256, 64, requires_grad=True) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    return [out, *(tensor.grad for tensor in (query, key, value) if tensor.grad is not None)]


def quantisation() -> list[torch.Tensor]:
    """NF4 with double quantisation, there and back."""
    weight = torch.randn(512, 256)
    packed, state = four_bit.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return [packed, four_bit.dequantize_4bit(packed, state)]


def optimisation() -> list[torch.Tensor]:
    """Some AdamW steps on a small network, with random numbers from the seeded generator."""
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 16))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    for _ in range(5):
        torch.nn.functional.cross_entropy(network(torch.randn(32, 64)), torch.randint(16, (32,))).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return list(network.parameters())


def llama_logits(path: str) -> list[torch.Tensor]:
    """llama.cpp's logits for a few tokens of a GGUF."""

    return [gguf.llama_logits(gguf.load(Path(path), 64, 1))(list(range(1, 40)))]


def measure(files: list[str]) -> dict[str, str]:
    """One hash per kind of arithmetic, and one per GGUF file."""
    make_deterministic(0, 1)
    kinds = [products, functions, attention, quantisation, optimisation]
    hashes = {kind.__name__: digest(kind()) for kind in kinds}
    generator = np.random.default_rng(0)
    hashes["numpy"] = digest([torch.from_numpy(np.exp(generator.standard_normal((64, 64))).sum(0))])
    return hashes | {f"llama.cpp {Path(path).name}": digest(llama_logits(path)) for path in files}


def main(name: str, files: list[str]) -> int:
    """Record this processor's hashes; returns 1 when a processor recorded before has another hash of some kind."""
    hashes = measure(files)
    known = read_json(RESULT) if RESULT.is_file() else {}
    others = [
        (other, kind)
        for other, theirs in known.items()
        for kind in hashes.keys() & theirs.keys()
        if other != name and theirs[kind] != hashes[kind]
    ]
    write_json(RESULT, {**known, name: hashes})
    for other, kind in sorted(others):
        sys.stdout.write(f"{kind}: other bytes than on {other}\n")
    sys.stdout.write(
        f"{name}: {len(hashes)} hashes, {'differences above' if others else 'all equal'}; wrote {RESULT}\n"
    )
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
