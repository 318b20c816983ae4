"""python full_disk.py KIND FOLDER BASE ADAPTER: write a file of some kind where only 16 KiB are free, as a stage does.

FOLDER is a small file system of this process's own. At the end stdout says what is in it, and how much is free.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from finetune.stages._main import stage_main  # isort: skip

import torch
from training_settings import make_lora

from finetune.data.tables import PACKED, write_parquet
from finetune.export.merge import merge_shards
from finetune.io import write_csv, write_jsonl
from finetune.training.model import add_adapter, load_base, save_adapter
from finetune.training.vocabulary import Extension

FREE_BYTES = 16 << 10
# Random: zstd makes nothing of a row of numbers.
NUMBERS = torch.randint(1 << 30, (40_000,), generator=torch.Generator().manual_seed(1)).tolist()


def fill(folder: Path) -> None:
    """Leave FREE_BYTES free."""
    with (folder / "others").open("wb") as handle:
        handle.write(os.urandom(shutil.disk_usage(folder).free - FREE_BYTES))


def run(folder: Path, base: Path, adapter: Path) -> None:
    """Write what does not fit in place of what is there."""
    kind = KINDS[0]
    (folder / "out").write_text("the last good one")
    if kind == "adapter":
        model = add_adapter(load_base(base, None, torch.float32, torch.device("cpu")), make_lora(), Extension((), 0))
    fill(folder)
    try:
        if kind == "jsonl":
            write_jsonl(folder / "out", ({"number": number} for number in NUMBERS))
        elif kind == "csv":
            write_csv(folder / "out", ["number"], ([number] for number in NUMBERS))
        elif kind == "parquet":
            write_parquet(folder / "out", [{"input_ids": NUMBERS, "labels": NUMBERS, "seq_lengths": []}], PACKED)
        elif kind == "adapter":
            save_adapter(model, folder / "adapter")
        else:
            merge_shards(base, adapter, folder / "merged", "float32", [])
    finally:
        kept = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        sys.stdout.write(repr((sorted(kept.items()), (folder / "out").read_text())) + "\n")


KINDS = sys.argv[1:2]
if __name__ == "__main__":
    del sys.argv[1]
    stage_main(run, ())
