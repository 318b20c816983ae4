"""Peak memory and time of the data stages on a chat corpus of any size: `python benchmarks/data_memory.py [SIZE_MB]`.

The corpus (5,000 MB unless said) is made in BENCHMARK_FOLDER, or where temporary files go: five times its size is
needed there. Writes data_memory.json.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from planted_corpus import write_corpus
from process_tree import Cost, machine, run_measured
from stage_folder import SOURCE, write_manifest

from finetune.io import read_json, write_json

HERE = Path(__file__).parent
FILES = 4
STAGES = ("clean", "tokenizer", "tokenize", "split")


def main() -> int:
    """Make the corpus, run each stage on it in processes of its own, and write what they took."""
    size_bytes = (int(sys.argv[1]) if len(sys.argv) > 1 else 5000) * 10**6
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        files = [folder / "raw" / SOURCE / f"{number}.jsonl" for number in range(FILES)]
        files[0].parent.mkdir(parents=True)
        write_corpus(files, size_bytes, chat=True)
        write_manifest(folder / "raw", files)
        size_bytes = sum(file.stat().st_size for file in files)
        program = [sys.executable, str(HERE / "stage_folder.py")]
        stages = {stage: run_measured([*program, stage, name, "messages"]) for stage in STAGES}
        numbers = read_json(folder / "clean.json")
    result = {
        **machine(),
        "size_mb": round(size_bytes / 1e6, 1),
        "stages": {stage: _as_json(cost, size_bytes) for stage, cost in stages.items()},
        "counts": {name: numbers[name] for name in ("rows_in", "kept", "duplicates", "near_duplicates", "dropped")},
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    sys.stdout.write(f"{result}\n")
    return 0


def _as_json(cost: Cost, size_bytes: int) -> dict[str, float]:
    return {
        "wall_s": round(cost.wall_s, 1),
        "cpu_s": round(cost.cpu_s, 1),
        "mb_per_s": round(size_bytes / cost.wall_s / 1e6, 2),
        "peak_process_gib": round(cost.peak_process_bytes / 2**30, 3),
        "peak_tree_gib": round(cost.peak_tree_bytes / 2**30, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
