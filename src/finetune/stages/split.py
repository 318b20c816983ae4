"""Token rows -> train, validation, test and mini_train by hash of the group, and train packed for the GPU."""

from __future__ import annotations

from pathlib import Path

from finetune.data.packing import fill, pack
from finetune.data.splits import check_splits, mini_train, split_metrics, split_rows
from finetune.data.tables import PACKED, TOKENS, write_parquet
from finetune.data_sections import Split
from finetune.io import read_parquet, write_csv, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("seed", "split")


def run(tokens: Path, split_dir: Path, metrics: Path, split_plot: Path, *, seed: int, split: Split) -> None:
    """Assign each row by its group, write the splits, and pack the training rows."""
    splits = split_rows(read_parquet(tokens / "tokens.parquet"), split.validation_share, split.test_share)
    check_splits(splits)
    for name, rows in splits.items():
        write_parquet(split_dir / f"{name}.parquet", rows, TOKENS)
    mini = mini_train(splits["train"], split.mini_train_rows)
    write_parquet(split_dir / "mini_train.parquet", mini, TOKENS)
    packed = pack(splits["train"], split.pack_tokens, seed)
    write_parquet(split_dir / "packed.parquet", packed, PACKED)
    numbers = split_metrics(splits)
    numbers["mini_train_rows"] = len(mini)
    numbers["packed"] = {"rows": len(packed), "fill": round(fill(packed, split.pack_tokens), 4)}
    write_json(metrics, numbers)
    plot = [
        (source, name, counts["rows"], counts["tokens"])
        for source, by_split in numbers["sources"].items()
        for name, counts in by_split.items()
    ]
    write_csv(split_plot, ("source", "split", "rows", "tokens"), plot)
    logger.info(
        "rows %s, mini_train %d; %d packed rows, fill %.4f, %d trained tokens",
        {name: len(rows) for name, rows in splits.items()},
        len(mini),
        len(packed),
        numbers["packed"]["fill"],
        numbers["splits"]["train"]["trained_tokens"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
