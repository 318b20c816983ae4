"""metrics/, plots/ and dvc.yaml of this tree, and an earlier commit -> a page of Markdown on stdout.

For $GITHUB_STEP_SUMMARY: what changed against the earlier commit, the curves, all metrics, and the pipeline. GitHub
draws the Mermaid charts; it shows no picture that has no address of its own, hence the link to the uploaded pages.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

# A chart of Mermaid draws every point as a label; more than these cannot be read.
MAX_POINTS = 25


def dvc(*arguments: str) -> str:
    """What a command of DVC prints; its failure is shown on the page, which is about the run and not about DVC."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else f"```\n{done.stderr.strip()}\n```"


def has_commit(base: str) -> bool:
    """Whether this clone reaches as far back as `base`."""
    command = ["git", "rev-parse", "--quiet", "--verify", f"{base}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compared(base: str) -> list[str]:
    """Parameters and metrics that differ from those of an earlier commit."""
    if not has_commit(base):
        return [f"There is no {base} to compare with."]
    lines = []
    for kind in ("params", "metrics"):
        table = dvc(kind, "diff", "--md", base)
        # Two lines are the head of a table without rows.
        rows = table if len(table.splitlines()) > 2 else "None."
        lines += [f"### {kind.capitalize()} that differ from {base}", "", rows, ""]
    return lines


def columns(file: Path) -> dict[str, list[str]]:
    """Columns of a CSV file by name."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def chart(title: str, kind: str, labels: list[str], values: list[str], y_title: str) -> list[str]:
    """A chart of Mermaid (xychart-beta); empty values are left out, of many the means are drawn."""
    drawn = [(label, float(value)) for label, value in zip(labels, values, strict=True) if value]
    if not drawn:
        return []
    step = -(-len(drawn) // MAX_POINTS)
    groups = [drawn[at : at + step] for at in range(0, len(drawn), step)]
    points = [(group[-1][0], fmean(value for _, value in group)) for group in groups]
    names = ", ".join(f'"{label}"' for label, _ in points)
    numbers = ", ".join(f"{value:.4g}" for _, value in points)
    top, bottom = max(value for _, value in points), min(value for _, value in points)
    low = 0.0 if kind == "bar" else bottom
    # A chart whose two ends are the same number is refused.
    axis = f'    y-axis "{y_title}" {low:.4g} --> {max(top * 1.05, low + 1e-3):.4g}'
    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{title}"',
        f"    x-axis [{names}]",
        axis,
        f"    {kind} [{numbers}]",
        "```",
        "",
    ]


def charts(plots: Path) -> list[str]:
    """The training's losses, perplexity before and after, and what each quantised type lost."""
    lines = []
    if (plots / "train_log.csv").is_file():
        log = columns(plots / "train_log.csv")
        lines += chart("training loss by step", "line", log["step"], log["train_loss"], "nats per token")
        lines += chart("validation loss by step", "line", log["step"], log["validation_loss"], "nats per token")
    if (plots / "perplexity.csv").is_file():
        table = columns(plots / "perplexity.csv")
        names = [f"{source} {model}" for source, model in zip(table["source"], table["model"], strict=True)]
        lines += chart("held-out perplexity", "bar", names, table["perplexity"], "perplexity")
    if (plots / "quantization.csv").is_file():
        table = columns(plots / "quantization.csv")
        lines += chart("Kullback-Leibler divergence by type", "bar", table["type"], table["mean_kl"], "nats per token")
    return lines


def leaves(tree: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every number and text."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def metrics(folder: Path) -> list[str]:
    """A table for each stage, folded up: `dvc metrics show` makes one row of 300 columns of them."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        rows = [f"| {name} | {json.dumps(value)} |" for name, value in leaves(json.loads(file.read_text("utf-8")))]
        lines += [f"<details><summary>{file.stem}</summary>", "", "| metric | value |", "|---|---|", *rows, ""]
        lines += ["</details>", ""]
    return lines


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="commit to compare with, such as HEAD^")
    parser.add_argument("--artifact", required=True, help="address of the uploaded pages; may be empty")
    options = parser.parse_args()
    pages = "report/index.html (the run) and dvc_plots/index.html (all plots)"
    link = f"[Metrics, plots and pages]({options.artifact}): {pages}" if options.artifact else "Nothing was uploaded."
    lines = ["## Run of the pipeline", "", link, ""]
    lines += [*compared(options.base), "### Plots", "", *charts(Path("plots"))]
    lines += ["### Metrics", "", *metrics(Path("metrics")), "### Pipeline", "", dvc("dag", "--md"), ""]
    sys.stdout.write("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
