"""One data stage on one source of JSON lines with the smoke recipe's rules: `stage_folder.py STAGE FOLDER FORMAT`.

FOLDER/raw/web holds the files and FOLDER/raw the manifest (`write_manifest`); the outs of the stages lie beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from finetune.data.fetching.sources import MANIFEST, RawFile
from finetune.io import sha256_file, write_json
from finetune.params import Params, load_params
from finetune.source_sections import Source
from finetune.stages import clean, split, tokenize, tokenizer

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "web"
VOCAB_SIZE = 32_000
# A tenth of the records is held out, half of it for validation.
SHARES: dict[str, Any] = {"validation_share": 0.05, "test_share": 0.05}


def write_manifest(raw: Path, files: list[Path]) -> None:
    """The manifest that fetch would have written."""
    entries = [RawFile(str(file.relative_to(raw)), sha256_file(file), file.stat().st_size).to_row() for file in files]
    write_json(raw / MANIFEST, {"sources": [{"name": SOURCE, "files": entries}]})


def run_clean(folder: Path, params: Params, file_format: str) -> None:
    """raw -> clean."""
    source: dict[str, Any] = {
        "name": SOURCE,
        "format": file_format,
        "use": "training",
        "origin": {"kind": "local", "files": "*.jsonl"},
        "license": "CC0-1.0",
        "language": None,
        "columns": {},
        "filters": [],
        "group_characters": None,
        "prompt": None,
        "paths": None,
    }
    clean.run(
        folder / "raw",
        *(folder / name for name in ("clean", "clean.json", "funnel.csv", "sources.csv")),
        fetch=params.fetch.model_copy(update={"sources": [Source.model_validate(source)]}),
        # A made-up word is no word of a language, and some of these texts are long.
        clean=params.clean.model_copy(update={"max_record_characters": 100_000}),
        **SHARES,
    )


def run_tokenizer(folder: Path, params: Params) -> None:
    """clean -> tokenizer, of VOCAB_SIZE tokens."""
    template = str(ROOT / params.tokenizer.chat_template)
    section = params.tokenizer.model_copy(update={"vocab_size": VOCAB_SIZE, "chat_template": template})
    outs = (folder / "tokenizer", folder / "tokenizer.json")
    tokenizer.run(folder / "clean", folder / "none.json", *outs, tokenizer=section, pack_tokens=2048, **SHARES)


def run_tokenize(folder: Path, params: Params) -> None:
    """clean, tokenizer -> tokens; what is too long is cut between turns."""
    section = params.tokenize.model_copy(update={"max_tokens": 2048, "over_length": "split"})
    outs = (folder / "tokens", folder / "tokenize.json", folder / "lengths.csv")
    tokenize.run(folder / "clean", folder / "tokenizer", *outs, tokenize=section)


def run_split(folder: Path, params: Params) -> None:
    """tokens -> split, without the data page."""
    section = params.split.model_copy(update={**SHARES, "pack_tokens": 2048})
    outs = (folder / "split", folder / "split.json", folder / "split.csv", folder / "mix.csv")
    split.split_rows(folder / "tokens", *outs, seed=params.seed, split=section)


def main() -> None:
    """Run the stage named first."""
    stage, folder, params = sys.argv[1], Path(sys.argv[2]), load_params(ROOT / "recipes/smoke/params.yaml")
    match stage:
        case "clean":
            run_clean(folder, params, sys.argv[3])
        case "tokenizer":
            run_tokenizer(folder, params)
        case "tokenize":
            run_tokenize(folder, params)
        case "split":
            run_split(folder, params)


if __name__ == "__main__":
    main()
