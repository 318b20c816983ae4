"""The data page: what came in, what was lost and why, what is trained; two HTML files that need nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from tokenizers import Tokenizer

from finetune.data.mixing.split_report import LEFT_OUT
from finetune.data.report.masks import Example, mask_examples
from finetune.data.row_groups import read_batches
from finetune.data.splits import SPLITS, TokenRow
from finetune.io import read_csv, read_json, read_jsonl, write_text

DATA_PAGE, MASK_PAGE = "index.html", "masks.html"
MASK_EXAMPLES = 20
SHOWN_PER_REASON = 2
SHOWN_REPAIRS = 5
SHOWN_PAIRS = 5
MAX_SHOWN_CHARACTERS = 400
STAGES = ("fetch", "clean", "tokenizer", "tokenize", "split")


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; `share` of the longest bar, from 0 to 1."""

    label: str
    value: str
    share: float
    kind: str


def write_report(
    folder: Path, *, metrics: Mapping[str, Path], clean: Path, lengths: Path, tokenizer: Path, mini_train: Path
) -> None:
    """Write index.html and masks.html into `folder`.

    `metrics`: the metrics file of each of STAGES. `clean`: data/clean. `lengths`: plots/lengths.csv. `tokenizer`:
    models/tokenizer's tokenizer.json. `mini_train`: the rows that the mask examples are taken from.
    """
    numbers = {stage: read_json(metrics[stage]) for stage in STAGES}
    rows = first_rows(read_batches(mini_train), MASK_EXAMPLES)
    examples = mask_examples(rows, Tokenizer.from_file(str(tokenizer)), MASK_EXAMPLES)
    page = _template("page.html.jinja").render(
        numbers=numbers,
        split_names=(*SPLITS, LEFT_OUT),
        funnels={source: funnel_bars(counts) for source, counts in numbers["clean"]["sources"].items()},
        encoded={source: encoding_bars(counts) for source, counts in numbers["tokenize"]["sources"].items()},
        mix=numbers["split"]["mix"],
        histograms=histograms(read_csv(lengths)),
        languages=share_bars(numbers["clean"]["languages"], "kept"),
        quarantined=_by_reason(read_jsonl(clean / "quarantine.jsonl"), numbers["clean"]["quarantined"]),
        dropped=_by_reason(read_jsonl(clean / "dropped.jsonl"), numbers["clean"]["dropped"]),
        pairs=list(islice(_near_pairs(clean / "dropped.jsonl"), SHOWN_PAIRS)),
        repaired=[_repair(row) for row in islice(read_jsonl(clean / "repaired.jsonl"), SHOWN_REPAIRS)],
        kept=_kept_examples(rows, examples),
        mask_page=MASK_PAGE,
    )
    write_text(folder / DATA_PAGE, page)
    write_text(folder / MASK_PAGE, _template("masks.html.jinja").render(examples=examples, data_page=DATA_PAGE))


def funnel_bars(counts: Mapping[str, Any]) -> list[Bar]:
    """The bars of one source's funnel: rows in, each loss by reason, rows kept."""
    steps = [("rows in", counts["rows_in"], "in")]
    steps += [(f"quarantined: {reason}", count, "lost") for reason, count in sorted(counts["quarantined"].items())]
    steps += [(f"dropped: {reason}", count, "lost") for reason, count in sorted(counts["dropped"].items())]
    steps += [("duplicates", counts["duplicates"], "lost"), ("near-duplicates", counts["near_duplicates"], "lost")]
    steps += [("kept", counts["kept"], "kept")]
    most = max(1, counts["rows_in"])
    return [Bar(label, f"{count:,}", count / most, kind) for label, count, kind in steps if count or kind != "lost"]


def encoding_bars(counts: Mapping[str, Any]) -> list[Bar]:
    """The bars of what one source's kept records became: records in, each loss by reason, records with tokens."""
    steps = [("records in", counts["records_in"], "in")]
    steps += [(f"dropped: {reason}", count, "lost") for reason, count in sorted(counts["dropped"].items())]
    steps += [(name, counts[name], "asked") for name in ("truncated", "split")]
    steps += [("encoded", counts["kept"], "kept")]
    most = max(1, counts["records_in"])
    shown = ("in", "kept")
    return [Bar(label, f"{count:,}", count / most, kind) for label, count, kind in steps if count or kind in shown]


def first_rows(batches: Iterable[Any], count: int) -> list[TokenRow]:
    """The first `count` rows of each source."""
    taken: dict[str, list[TokenRow]] = {}
    for batch in batches:
        for place, source in enumerate(batch.column("source").to_pylist()):
            rows = taken.setdefault(source, [])
            if len(rows) < count:
                rows += batch.slice(place, 1).to_pylist()
    return [row for _, rows in sorted(taken.items()) for row in rows]


def share_bars(counts: Mapping[str, int], kind: str) -> list[Bar]:
    """One bar for each count, most first, with its share of the total."""
    total = max(1, sum(counts.values()))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = max(1, *counts.values()) if counts else 1
    return [Bar(label, f"{count:,} ({count / total:.1%})", count / most, kind) for label, count in ordered]


def histograms(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Bar]]:
    """Documents by length for each source, from rows {source, upper_bound_tokens, rows}."""
    counts: dict[str, dict[int, int]] = {}
    for row in rows:
        counts.setdefault(row["source"], {})[int(row["upper_bound_tokens"])] = int(row["rows"])
    return {
        source: [
            Bar(f"up to {bound}", f"{count:,}", count / max(bins.values()), "kept")
            for bound, count in sorted(bins.items())
        ]
        for source, bins in sorted(counts.items())
    }


def shorten(text: str) -> str:
    """The start of a text, and how much was left out."""
    left_out = len(text) - MAX_SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_SHOWN_CHARACTERS]}… ({left_out:,} more characters)"


def _by_reason(rows: Iterable[Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The first rows of each reason and the reason's count; reads no further than it must."""
    shown: dict[str, dict[str, Any]] = {
        reason: {"count": count, "rows": []} for reason, count in sorted(counts.items()) if count
    }
    lacking = sum(min(SHOWN_PER_REASON, entry["count"]) for entry in shown.values())
    for row in rows:
        if lacking == 0:
            break
        entry = shown.get(row["reason"])
        if entry is not None and len(entry["rows"]) < SHOWN_PER_REASON:
            entry["rows"].append(row)
            lacking -= 1
    return shown


def _near_pairs(dropped: Path) -> Iterator[Mapping[str, Any]]:
    return (row for row in read_jsonl(dropped) if row["jaccard"] is not None)


def _repair(row: Mapping[str, Any]) -> dict[str, str]:
    original = row["original"]
    text = original["text"] or "\n".join(message["content"] for message in original["messages"])
    return {"place": f"{row['file']}:{row['line']}", "original": shorten(text), "id": row["repaired_id"]}


def _kept_examples(rows: Sequence[TokenRow], examples: Sequence[Example]) -> dict[str, list[Example]]:
    sources = sorted({row["source"] for row in rows})
    return {source: [example for example in examples if example.source == source][:2] for source in sources}


def _template(name: str) -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((Path(__file__).parent / name).read_text(encoding="utf-8"))
