"""records.jsonl -> tokens.parquet, a range of lines at a time, in as many processes as FINETUNE_WORKERS says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from finetune.data.encoding.chat import Chat
from finetune.data.encoding.encoder import Encoder, make_encoder
from finetune.data.encoding.tokenizing import Part, Totals, check_totals, line_ranges, read_range, tokenize_records
from finetune.data.row_groups import READ_ROWS, row_group_writer
from finetune.data.tables import TOKENS
from finetune.data.vocabulary.tokenizer_files import load_chat
from finetune.data.workers import ordered_map
from finetune.data_sections import Tokenize
from finetune.log import progress_bar

# What a worker loads once: the tokenizer's table does not go along with every range.
_LOADED: list[tuple[Chat, Encoder]] = []


def tokenize_file(records: Path, tokenizer: Path, target: Path, params: Tokenize) -> Totals:
    """Replace `target` by the token rows of the records, in their order; the workers' number changes no byte.

    Raises DataError when nothing is left to train on; then `target` stays as it was.
    """
    totals = Totals()
    parts = ordered_map(
        partial(_tokenize_range, records, params), line_ranges(records), initializer=_load, initargs=(tokenizer,)
    )
    with row_group_writer(target, TOKENS) as writer, progress_bar(None, 0, "record", "tokenize") as bar:
        for part in parts:
            totals.add(part.totals)
            for start in range(0, part.rows.num_rows, READ_ROWS):
                writer.add(part.rows.slice(start, READ_ROWS))
            bar.update(sum(counts.records_in for counts in part.totals.counts.values()))
        check_totals(totals)
    return totals


def _load(tokenizer: Path) -> None:
    chat = load_chat(tokenizer)
    _LOADED[:] = [(chat, make_encoder(chat.tokenizer))]


def _tokenize_range(records: Path, params: Tokenize, places: tuple[int, int]) -> Part:
    chat, encoder = _LOADED[0]
    return tokenize_records(read_range(records, *places), chat, encoder, params)
