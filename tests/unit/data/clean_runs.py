"""Runs the clean stage on small files for the tests of its parts."""

import json
from dataclasses import dataclass
from pathlib import Path

from finetune.data.fetching.sources import MANIFEST, RawFile
from finetune.data.splits import assign
from finetune.io import read_json, read_jsonl, sha256_file, write_json
from finetune.params import load_params
from finetune.source_sections import Source
from finetune.stages import clean

ROOT = Path(__file__).parents[3]
SMOKE = load_params(ROOT / "recipes" / "smoke" / "params.yaml")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.1


@dataclass(frozen=True)
class CleanRun:
    """What one run of the stage left in a folder."""

    folder: Path

    def rows(self, name="records"):
        return list(read_jsonl(self.folder / f"clean/{name}.jsonl"))

    def numbers(self):
        return read_json(self.folder / "clean.json")

    def dropped(self):
        """(file, line) -> the line of dropped.jsonl."""
        return {(row["file"], row["line"]): row for row in self.rows("dropped")}


def chat(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def source_of(name, **changes):
    values = {
        "name": name,
        "format": "messages",
        "use": "training",
        "origin": {"kind": "local", "files": f"{name}.jsonl"},
        "license": "MIT",
        "language": "en",
        "columns": {},
        "filters": [],
        "group_characters": None,
        "prompt": None,
        "paths": None,
    }
    return Source.model_validate({**values, **changes})


def run_clean(folder, rows_by_source, sources=None, **rules):
    """Clean rows (dictionaries, or bytes as they stand) of one JSON-lines file for each source."""
    sources = sources or [source_of(name) for name in rows_by_source]
    entries = []
    for source in sources:
        path = f"{source.name}/{source.name}.jsonl"
        target = folder / "raw" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows_by_source[source.name]]
        target.write_bytes(b"".join(line + b"\n" for line in lines))
        file = RawFile(path, sha256_file(target), target.stat().st_size)
        entries.append({"name": source.name, "files": [file.to_row()]})
    write_json(folder / "raw" / MANIFEST, {"sources": entries})
    outs = (folder / "clean", folder / "clean.json", folder / "funnel.csv", folder / "sources.csv")
    clean.run(
        folder / "raw",
        *outs,
        fetch=SMOKE.fetch.model_copy(update={"sources": sources}),
        clean=SMOKE.clean.model_copy(update=rules),
        validation_share=VALIDATION_SHARE,
        test_share=TEST_SHARE,
    )
    return CleanRun(folder)


def split_of(group, source="a"):
    return assign(f"{source}/{group}", VALIDATION_SHARE, TEST_SHARE)


def groups_of(split, count, source="a"):
    """Names of groups that fall into a split."""
    names = (f"g{number}" for number in range(100_000))
    found = (name for name in names if split_of(name, source) == split)
    return [next(found) for _ in range(count)]
