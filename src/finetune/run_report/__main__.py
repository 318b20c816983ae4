"""The finished run of the current folder -> report/index.html; `make report` and `make repro` call it."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.io import write_text
from finetune.lineage import Outputs, version_tags
from finetune.params import load_params
from finetune.run_report.facts import RUN_CARD_FILE, SPEED_FILE, read_facts
from finetune.run_report.page import render_page

# It names the commit and the speed of this machine, so it is no out of DVC; git ignores the folder.
REPORT = Path("report/index.html")


def write_report(root: Path) -> Path:
    """Read what lies below `root`, write its page and return the page's path; raises DataError for what is missing."""
    params = load_params(root / "params.yaml")
    made, data = root / "models", root / "data"
    outputs = Outputs(
        adapter=made / "adapter",
        merged=made / "merged",
        gguf=made / "gguf",
        ollama=made / "ollama",
        base=made / "base",
        base_manifest=data / "base_manifest.json",
        raw_manifest=data / "raw/manifest.json",
        metrics=root / "metrics",
        plots=root / "plots",
        dvc_lock=root / "dvc.lock",
    )
    facts = read_facts(
        outputs,
        params,
        samples=data / "evaluation/samples.jsonl",
        quantized_samples=data / "quantization/samples.jsonl",
        speed=root / SPEED_FILE,
        run_card=root / RUN_CARD_FILE,
        tags=version_tags(outputs, params.recipe, root),
    )
    write_text(root / REPORT, render_page(facts, data_page="../data/report/index.html"))
    return root / REPORT


def main() -> None:
    """Write the page of the current folder's run and print where it is."""
    try:
        sys.stdout.write(f"report: {write_report(Path())} (open it in a browser; it needs nothing else)\n")
    except FinetuneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
