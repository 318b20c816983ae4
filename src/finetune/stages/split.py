"""Token rows -> train, validation, test and mini_train by hash of the group, and train packed for the GPU."""

from __future__ import annotations

from pathlib import Path

from finetune.data.packing import fill, pack
from finetune.data.splits import check_splits, leave_out_answered, mini_train, split_metrics, split_rows
from finetune.data.tables import PACKED, TOKENS, write_parquet
from finetune.data_sections import Split
from finetune.io import read_parquet, write_csv, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("seed", "split")


def run(tokens: Path, split_dir: Path, metrics: Path, split_plot: Path, *, seed: int, split: Split) -> None:
    """Assign each row by its group, leave out held-out rows that train gives away, write, and pack the train rows."""
    rows_in = read_parquet(tokens / "tokens.parquet")
    assigned = split_rows(rows_in, split.validation_share, split.test_share)
    splits, left_out = leave_out_answered(assigned)
    check_splits(splits, left_out, len(rows_in))
    for name, rows in splits.items():
        write_parquet(split_dir / f"{name}.parquet", rows, TOKENS)
    mini = mini_train(splits["train"], split.mini_train_rows)
    write_parquet(split_dir / "mini_train.parquet", mini, TOKENS)
    packed = pack(splits["train"], split.pack_tokens, seed)
    write_parquet(split_dir / "packed.parquet", packed, PACKED)
    numbers = split_metrics(splits, left_out)
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
        "rows %s, left out as their answer is in train %s, mini_train %d; %d packed rows, fill %.4f, %d trained tokens",
        {name: len(rows) for name, rows in splits.items()},
        {name: len(rows) for name, rows in left_out.items()},
        len(mini),
        len(packed),
        numbers["packed"]["fill"],
        numbers["splits"]["train"]["trained_tokens"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
