"""Token rows -> train, validation, test and mini_train by hash of the group; train mixed and packed; the data page."""

from __future__ import annotations

from pathlib import Path

from finetune.chat_template import TOKENIZER
from finetune.data.mixing.external_shuffle import WINDOW_ROWS, WINDOW_TOKENS, WindowFile, shuffled
from finetune.data.mixing.quotas import PLOT_COLUMNS, mix_metrics, mix_plot_rows, row_uses
from finetune.data.mixing.row_index import read_index
from finetune.data.mixing.split_files import check_lengths, write_packed, write_splits
from finetune.data.mixing.split_report import check_splits, log_summary, plot_rows, split_metrics
from finetune.data.report import write_report
from finetune.data.row_groups import read_batches
from finetune.data_sections import Split
from finetune.io import fresh_folder, write_csv, write_json
from finetune.stages._main import stage_main

PARAMS = ("seed", "split")


def run(
    tokens: Path,
    tokenizer: Path,
    clean: Path,
    fetch_metrics: Path,
    clean_metrics: Path,
    tokenizer_metrics: Path,
    tokenize_metrics: Path,
    lengths_plot: Path,
    split_dir: Path,
    report: Path,
    metrics: Path,
    split_plot: Path,
    mix_plot: Path,
    *,
    seed: int,
    split: Split,
) -> None:
    """Split, mix and pack, then write the data page from what the data stages have counted."""
    split_rows(tokens, split_dir, metrics, split_plot, mix_plot, seed=seed, split=split)
    files = {"fetch": fetch_metrics, "clean": clean_metrics, "tokenizer": tokenizer_metrics}
    write_report(
        report,
        metrics={**files, "tokenize": tokenize_metrics, "split": metrics},
        clean=clean,
        lengths=lengths_plot,
        tokenizer=tokenizer / TOKENIZER,
        mini_train=split_dir / "mini_train.parquet",
    )


def split_rows(
    tokens: Path, split_dir: Path, metrics: Path, split_plot: Path, mix_plot: Path, *, seed: int, split: Split
) -> None:
    """Assign each row by its group, leave out held-out rows that train gives away, mix train, write, and pack."""
    rows = tokens / "tokens.parquet"
    index = read_index(read_batches(rows), split.validation_share, split.test_share)
    check_splits(index)
    check_lengths(index, split.pack_tokens)
    uses = row_uses(index, split.mix)
    fresh_folder(split_dir)
    with WindowFile(split_dir, shuffled(index, uses, seed, WINDOW_ROWS, WINDOW_TOKENS), index) as windows:
        mini_train = write_splits(rows, split_dir, index, uses, windows, split.mini_train_rows)
        packed = write_packed(split_dir / "packed.parquet", windows, index, uses, split.pack_tokens, seed)
    numbers = split_metrics(index)
    numbers["mini_train_rows"] = mini_train
    numbers["packed"] = {"rows": packed.rows, "fill": round(packed.fill, 4)}
    numbers["mix"] = mix_metrics(index, uses, split.mix)
    write_json(metrics, numbers)
    write_csv(split_plot, ("source", "split", "rows", "tokens"), plot_rows(numbers))
    write_csv(mix_plot, PLOT_COLUMNS, mix_plot_rows(numbers["mix"]))
    log_summary(numbers)


if __name__ == "__main__":
    stage_main(run, PARAMS)
