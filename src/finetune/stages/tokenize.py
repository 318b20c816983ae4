"""Clean records and the tokenizer -> tokens.parquet: ids and loss mask of every record that fits."""

from __future__ import annotations

from pathlib import Path

from finetune.data.record import Record
from finetune.data.tables import TOKENS, write_parquet
from finetune.data.tokenizer_files import load_chat
from finetune.data.tokenizing import token_metrics, tokenize_records
from finetune.data_sections import Tokenize
from finetune.io import read_jsonl, write_csv, write_json
from finetune.log import logger, progress
from finetune.stages._main import stage_main

PARAMS = ("tokenize",)


def run(cleaned: Path, tokenizer: Path, tokens: Path, metrics: Path, lengths_plot: Path, *, tokenize: Tokenize) -> None:
    """Render, encode and mask each record once."""
    records = (Record.from_row(row) for row in read_jsonl(cleaned / "records.jsonl"))
    result = tokenize_records(progress(records, None, "record", "tokenize"), load_chat(tokenizer), tokenize)
    write_parquet(tokens / "tokens.parquet", result.rows, TOKENS)
    numbers = token_metrics(result)
    write_json(metrics, numbers)
    bins = [(source, bound, rows) for (source, bound), rows in sorted(result.lengths.items())]
    write_csv(lengths_plot, ("source", "upper_bound_tokens", "rows"), bins)
    logger.info(
        "%d records in, %d kept, dropped %s; %d tokens, %d trained, longest %d, %d straddle a span",
        numbers["records_in"],
        numbers["kept"],
        numbers["dropped"],
        numbers["tokens"],
        numbers["trained_tokens"],
        numbers["longest_tokens"],
        numbers["straddling_tokens"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
