"""The CPU code path, pinned: equal inputs give equal bytes on any x86-64 processor with AVX2.

The variables are read when torch, numpy, MKL and oneDNN are first imported, so they are set before that
(finetune/stages/__init__.py). Thread counts come from `cpu_threads` in params.yaml: they fix the order of sums.
"""

from __future__ import annotations

import os

PINNED_ENVIRONMENT = {
    # Vectorised loops of torch: the AVX2 build on every machine, also where AVX-512 exists.
    "ATEN_CPU_CAPABILITY": "avx2",
    # MKL picks kernels by processor model. COMPATIBLE is its only branch that is the same on Intel and AMD:
    # https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-2/specifying-code-branches.html
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "FALSE",
    "OMP_DYNAMIC": "FALSE",
    # numpy's own dispatch: exp and log in AVX-512 round otherwise. Unknown names are ignored where they do not exist.
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    # Two threads on one core must hand over, not spin.
    "OMP_WAIT_POLICY": "PASSIVE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OPENBLAS_NUM_THREADS": "1",
    # bitsandbytes hands its fallback kernels to torch.compile, and takes the uncompiled one where that fails: other
    # bytes with a compiler than without. It also loads the whole compiler at import, 1.3 s before the first step.
    "TORCHDYNAMO_DISABLE": "1",
    # Fork safety: tokenizers warns and switches off by itself otherwise.
    "TOKENIZERS_PARALLELISM": "false",
    # No stage after fetch may touch the network; fetch lifts this for itself, unless the caller had set it.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# What the caller's environment said of the Hub before this module wrote over it.
CALLER_OFFLINE = "FINETUNE_CALLER_OFFLINE"
# The values that huggingface_hub takes for yes.
TRUE_VALUES = {"1", "ON", "YES", "TRUE"}


def pin_cpu_code_path() -> None:
    """Set the variables above in this process, whatever the caller's environment says."""
    # Only the first call sees the caller's value: later ones, and child processes, see the one set here.
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    os.environ.setdefault(CALLER_OFFLINE, offline)
    os.environ.update(PINNED_ENVIRONMENT)


def caller_is_offline() -> bool:
    """Whether the caller asked for the Hub's offline mode (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    return os.environ.get(CALLER_OFFLINE, "").upper() in TRUE_VALUES
