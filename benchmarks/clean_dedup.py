"""Cleaning with near-duplicate removal against datatrove's MinHash, on the same files in one run, in MB/s.

`python benchmarks/clean_dedup.py PEER_PYTHON [SIZE_MB]` with the Python of an environment of its own:
    python -m venv peer
    peer/bin/pip install datatrove==0.10.1 spacy==3.8.18 xxhash==3.8.2 orjson==3.13.0 tokenizers==0.23.3
Writes clean_dedup.json. Our side does more: it parses, repairs and examines each row, tells its language, drops exact
duplicates, decontaminates, verifies each near-duplicate by its true Jaccard and counts every row; the peer reads,
compares and writes. Both have as many processes as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from planted_corpus import write_corpus
from process_tree import Cost, machine, run_measured
from stage_folder import SOURCE, write_manifest

from finetune.io import read_json, read_jsonl, write_json

HERE = Path(__file__).parent
Place = tuple[int, int]


def main() -> int:
    """Make the files, run both, write the ratio."""
    peer = sys.argv[1]
    size_bytes = int(sys.argv[2]) * 10**6 if len(sys.argv) > 2 else 210 * 10**6
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        files = [folder / "raw" / SOURCE / f"{number}.jsonl" for number in range(workers)]
        files[0].parent.mkdir(parents=True)
        copies = write_corpus(files, size_bytes, chat=False)
        size_bytes = sum(file.stat().st_size for file in files)
        write_manifest(folder / "raw", files)
        ours = run_measured([sys.executable, str(HERE / "stage_folder.py"), "clean", str(folder), "text"])
        result = {"ours": {**_speed(ours, size_bytes), **_quality(folder, copies)}}
        for words in ("split", "default"):
            command = [
                peer,
                str(HERE / "peer_minhash.py"),
                str(files[0].parent),
                f"{name}/{words}",
                str(workers),
                words,
            ]
            cost = run_measured(command)
            result[f"datatrove_{words}_words"] = {
                **_speed(cost, size_bytes),
                "ratio": round(cost.wall_s / ours.wall_s, 2),
                "cpu_ratio": round(cost.cpu_s / ours.cpu_s, 2),
            }
    versions = subprocess.run([peer, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.split()
    named = [line for line in versions if line.startswith(("datatrove", "spacy==", "xxhash", "numpy"))]
    write_json(
        Path(__file__).with_suffix(".json"),
        {**machine(), "size_mb": round(size_bytes / 1e6, 1), "peer": named, **result},
    )
    sys.stdout.write(f"{result}\n")
    return 0


def _speed(cost: Cost, size_bytes: int) -> dict[str, float]:
    return {
        "wall_s": round(cost.wall_s, 1),
        "cpu_s": round(cost.cpu_s, 1),
        "mb_per_s": round(size_bytes / cost.wall_s / 1e6, 2),
        "peak_tree_gib": round(cost.peak_tree_bytes / 2**30, 3),
    }


def _quality(folder: Path, copies: dict[Place, Place]) -> dict[str, object]:
    """Of the planted copies, the share of which one of the two went; of what went, the share that was planted."""
    lost = {
        (int(Path(row["file"]).stem), row["line"])
        for row in read_jsonl(folder / "clean" / "dropped.jsonl")
        if row["kept_id"] is not None
    }
    planted = {place for pair in copies.items() for place in pair}
    found = sum(copy in lost or original in lost for copy, original in copies.items())
    numbers = read_json(folder / "clean.json")
    return {
        "planted_copies": len(copies),
        "recall": round(found / len(copies), 4),
        "precision": round(len(lost & planted) / len(lost), 4),
        "counts": {name: numbers[name] for name in ("rows_in", "kept", "duplicates", "near_duplicates", "dropped")},
    }


if __name__ == "__main__":
    sys.exit(main())
