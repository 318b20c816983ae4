"""Clean records and the tokenizer -> tokens.parquet: ids and loss mask of every record that fits."""

from __future__ import annotations

from pathlib import Path

from finetune.data.encoding.token_workers import tokenize_file
from finetune.data.encoding.tokenizing import token_metrics
from finetune.data_sections import Tokenize
from finetune.io import write_csv, write_json
from finetune.log import logger
from finetune.stages._main import stage_main

PARAMS = ("tokenize",)


def run(cleaned: Path, tokenizer: Path, tokens: Path, metrics: Path, lengths_plot: Path, *, tokenize: Tokenize) -> None:
    """Render, encode and mask each record once."""
    totals = tokenize_file(cleaned / "records.jsonl", tokenizer, tokens / "tokens.parquet", tokenize)
    numbers = token_metrics(totals)
    write_json(metrics, numbers)
    bins = [(source, bound, records) for (source, bound), records in sorted(totals.lengths.items())]
    write_csv(lengths_plot, ("source", "upper_bound_tokens", "rows"), bins)
    if totals.slow_because is None:
        logger.info("encoded by tiktoken, which was shown to give the ids of the tokenizers library")
    else:
        logger.info("encoded by the tokenizers library, not tiktoken: %s", totals.slow_because)
    logger.info(
        "%d records in, %d kept, dropped %s; %d rows, %d truncated, %d split; "
        "%d tokens, %d trained, longest %d, %d straddle a span",
        numbers["records_in"],
        numbers["kept"],
        numbers["dropped"],
        numbers["rows"],
        numbers["truncated"],
        numbers["split"],
        numbers["tokens"],
        numbers["trained_tokens"],
        numbers["longest_tokens"],
        numbers["straddling_tokens"],
    )


if __name__ == "__main__":
    stage_main(run, PARAMS)
