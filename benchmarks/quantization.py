"""What an importance matrix is worth, on the model of the last run: `python benchmarks/quantization.py`.

Every K type of models/merged, with no matrix and with one from 16, 64 and 256 training rows, measured on the test rows
beside the merged model as the stage quantize_gguf does. Writes benchmarks/quantization.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from finetune.data.row_groups import read_batches  # noqa: E402
from finetune.evaluation.perplexity import model_logits  # noqa: E402
from finetune.evaluation.quantization import context_tokens, measure_types  # noqa: E402
from finetune.export import gguf  # noqa: E402
from finetune.export.importance import collect_importance  # noqa: E402
from finetune.export.speed import machine_name  # noqa: E402
from finetune.io import read_json, write_json  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
MERGED, SPLIT = Path("models/merged"), Path("data/split")
TYPES, ROWS = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"), (None, 16, 64, 256)
THREADS = 2


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """The token rows of one split."""
    for batch in read_batches(SPLIT / f"{name}.parquet"):
        yield from batch.to_pylist()


def main() -> int:
    """Make, measure and record every pair of a type and a matrix."""
    torch.set_num_threads(THREADS)
    words = AutoTokenizer.from_pretrained(MERGED)
    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32, local_files_only=True).eval()
    with tempfile.TemporaryDirectory(dir=MERGED.parent) as made:
        files: dict[str, Path] = {}
        dtype = read_json(MERGED / "config.json")["dtype"]
        with gguf.whole_gguf(MERGED, Path(made), dtype, "benchmark", {}) as whole:
            for rows in ROWS:
                matrix = collect_importance(model, rows_of("train"), rows, whole)
                for kind in TYPES:
                    name = f"{kind}, {rows or 'no'} rows"
                    files[name] = Path(made) / f"{kind}-{rows}.gguf"
                    gguf.quantize(whole, files[name], kind, THREADS, matrix)
        context = context_tokens(rows_of("test"), [], model.config.max_position_embeddings)
        groups = gguf.opened_groups(files, context, model.config.vocab_size, THREADS)
        measured = measure_types(model_logits(model), groups, lambda: rows_of("test"), [], words)
    keys = ("mean_kl", "perplexity_ratio", "top1_agreement")
    types = {name: {key: figures[key] for key in keys} for name, figures in measured.types.items()}
    write_json(RESULT, {"machine": machine_name(THREADS), "tokens": measured.merged.tokens, "types": types})
    for name, figures in sorted(types.items()):
        sys.stdout.write(f"{name:<18} KL {figures['mean_kl']:.6f}  same top-1 {figures['top1_agreement']:.4f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
