"""metrics/*.json and the files made -> the table and the commands that end `make repro`.

Numbers come from the metrics files; sizes from the disk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune.errors import DataError, FinetuneError
from finetune.io import read_json
from finetune.lineage import MIB, figure, quantized_types, read_metrics
from finetune.reproduction import explain

HEADINGS = ("what", "where", "MiB", "figures")
# Written by `make report` and `make repro`; `dvc repro` alone leaves it out.
REPORT = "report/index.html"


def summarize(root: Path) -> str:
    """The table of what lies below `root`, and what to type next; raises DataError for what is missing."""
    metrics = read_metrics(root / "metrics")
    registered = read_json(root / "models/registered.json")
    rows = [*_data_rows(root, metrics), *_model_rows(root, metrics), *_served_rows(root, metrics)]
    version = f"{registered['model_name']}@{registered['alias']}"
    rows.append(("registered", "models/registered.json", "", f"{version}, content {registered['content_sha256'][:12]}"))
    if (root / REPORT).exists():
        rows.append(_row(root, "report", REPORT, "all of this and more on one page, for a browser"))
    commands = [
        (f"ollama create {registered['model_name']} -f models/ollama/Modelfile", "serve it with Ollama"),
        ("make chat", "talk to it here"),
        ("make report", f"write the page of this run, {REPORT}"),
        ("make mlflow", "look at the run and the registered version"),
    ]
    width = max(len(command) for command, _ in commands)
    return _table([HEADINGS, *rows]) + "\n" + "".join(f"{command:<{width}}  {aim}\n" for command, aim in commands)


def _data_rows(root: Path, metrics: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    kept, rows_in = figure(metrics, "clean.kept"), figure(metrics, "clean.rows_in")
    yield _row(root, "records", "data/clean/records.jsonl", f"{kept:.0f} kept of {rows_in:.0f} rows")
    names = ("train", "validation", "test")
    sizes = "/".join(f"{figure(metrics, f'split.splits.{name}.rows'):.0f}" for name in names)
    tokens = figure(metrics, "split.splits.train.trained_tokens")
    lost = rows_in - kept
    yield _row(
        root, "data page", "data/report/index.html", f"why {lost:.0f} rows were lost, the mix, 20 masks in colour"
    )
    yield _row(root, "split", "data/split", f"{sizes} rows {'/'.join(names)}, {tokens:.0f} trained tokens")


def _model_rows(root: Path, metrics: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    steps, loss = figure(metrics, "train_qlora.steps"), figure(metrics, "train_qlora.validation_loss")
    yield _row(root, "adapter", "models/adapter", f"{steps:.0f} steps, validation loss {loss:.3f}")
    base, tuned = figure(metrics, "evaluate.base.perplexity"), figure(metrics, "evaluate.tuned.perplexity")
    ratio = figure(metrics, "evaluate.perplexity_ratio")
    figures = f"test perplexity {base:.2f} -> {tuned:.2f}, ratio {ratio:.3f}{_interval(metrics)}"
    yield _row(root, "base -> tuned", "data/evaluation/samples.jsonl", figures)
    difference = figure(metrics, "merge.max_logit_difference")
    yield _row(root, "merged model", "models/merged", f"logits within {difference:.2g} of base + adapter")


def _interval(metrics: Mapping[str, float]) -> str:
    """The 95 % interval of the ratio; test rows of a single group have none."""
    low, high = (metrics.get(f"evaluate.perplexity_ratio_interval.{end}") for end in ("low", "high"))
    return "" if low is None or high is None else f" (95 %: {low:.3f} to {high:.3f})"


def _served_rows(root: Path, metrics: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    for name in quantized_types(metrics):
        entry = f"quantize_gguf.types.{name}"
        ratio, agreement = figure(metrics, f"{entry}.perplexity_ratio"), figure(metrics, f"{entry}.top1_agreement")
        figures = f"perplexity x {ratio:.4f} of merged, same first choice {agreement:.1%}"
        yield _row(root, f"GGUF {name}", f"models/gguf/model-{name}.gguf", figures)
    chats = round(figure(metrics, "ollama_modelfile.chats"))
    alike = round(figure(metrics, "ollama_modelfile.parity") * chats)
    yield _row(root, "Modelfile", "models/ollama/Modelfile", f"served = trained in {alike}/{chats} chats")


def _row(root: Path, what: str, where: str, figures: str) -> tuple[str, str, str, str]:
    path = root / where
    if not path.exists():
        raise DataError("file or folder is missing", path, "run `dvc repro`, which makes it")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return what, where, f"{sum(file.stat().st_size for file in files) / MIB:.1f}", figures


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        f"{what:<{widths[0]}}  {where:<{widths[1]}}  {size:>{widths[2]}}  {figures}"
        for what, where, size, figures in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]) + "\n"


def main() -> None:
    """Print the summary of the current folder, and whether the committed bytes came out again."""
    try:
        sys.stdout.write(summarize(Path()) + "\n" + explain(Path()))
    except FinetuneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
