"""params.yaml, metrics, manifests, samples, tags -> RunFacts: everything that the page and the card of a run say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.io import read_csv, read_json, read_jsonl
from finetune.lineage import Outputs, read_curves, read_datasets
from finetune.params import Params

# Written by quantize_gguf beside its outs: what a machine does in an hour is no result of the pipeline.
SPEED_FILE = Path(".cache/speed.json")
# Written by train_qlora in the same way: machine, libraries, times and energy of a training.
RUN_CARD_FILE = Path(".cache/run_card.json")
STAGES = (
    "fetch", "clean", "split", "base", "train_qlora", "evaluate", "merge", "quantize_gguf", "ollama_modelfile"
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """What is known of one run.

    `metrics`: stage -> metrics/<stage>.json. `sources`: the entries of data/raw/manifest.json, each with its `sha256`
    over all its files. `base`: the base manifest. `curves`: step -> figure -> value. `samples`: rows {source, prompt,
    reference, base, tuned}, each with `answers`: GGUF type -> text. `speed`: figures of those GGUF types whose present
    file was measured on this machine. `run_card`: on what the present adapter was trained (`finetune.machine_card`),
    empty where that is not known. `pareto`: the types that no other one beats in both size and loss. `tags`:
    `finetune.lineage.version_tags`.
    """

    params: Params
    metrics: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    base: Mapping[str, Any]
    curves: Mapping[int, Mapping[str, float]]
    samples: Sequence[Mapping[str, Any]]
    speed: Mapping[str, Mapping[str, Any]]
    run_card: Mapping[str, Any]
    pareto: frozenset[str]
    tags: Mapping[str, str]

    @property
    def types(self) -> list[str]:
        """The GGUF types, largest file first."""
        made = self.metrics["quantize_gguf"]["types"]
        return sorted(
            made, key=lambda name: (-number(self.metrics, "quantize_gguf", "types", name, "size_bytes"), name)
        )


def read_facts(
    outputs: Outputs,
    params: Params,
    *,
    samples: Path,
    quantized_samples: Path,
    speed: Path,
    run_card: Path,
    tags: Mapping[str, str],
) -> RunFacts:
    """Read a run's files; `quantized_samples`, `speed` and `run_card` may be missing, all others raise DataError.

    Raises DataError too when the GGUF files that were measured are not the ones that `params` asks for.
    """
    metrics = {stage: read_json(outputs.metrics / f"{stage}.json") for stage in STAGES}
    types = entry(metrics, "quantize_gguf", "types")
    asked = [budget.type for budget in params.quantize_gguf.types]
    if set(types) != set(asked):
        what = f"measured are the types {', '.join(sorted(types))}, params.yaml asks for {', '.join(sorted(asked))}"
        raise DataError(what, outputs.metrics / "quantize_gguf.json", "run `dvc repro`")
    return RunFacts(
        params=params,
        metrics=metrics,
        sources=_with_hashes(outputs.raw_manifest),
        base=read_json(outputs.base_manifest),
        curves=read_curves(outputs.plots / "train_log.csv"),
        samples=_with_answers(list(read_jsonl(samples)), quantized_samples),
        speed=_of_these_files(read_json(speed) if speed.is_file() else {}, types),
        run_card=_of_this_adapter(read_json(run_card) if run_card.is_file() else {}, tags),
        pareto=_pareto(outputs.plots / "quantization.csv"),
        tags=tags,
    )


def entry(metrics: Mapping[str, Any], stage: str, *keys: str) -> Any:
    """One value of metrics/<stage>.json; raises DataError that names what is missing and which stage makes it."""
    value = metrics[stage]
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            remedy = f"run `dvc repro --force --single-item {stage}`"
            raise DataError(f"figure {'.'.join(keys)} is missing", f"metrics/{stage}.json", remedy)
        value = value[key]
    return value


def number(metrics: Mapping[str, Any], stage: str, *keys: str) -> float:
    """`entry`, for a number."""
    value = entry(metrics, stage, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        remedy = f"run `dvc repro --force --single-item {stage}`"
        raise DataError(f"figure {'.'.join(keys)} is {value!r}, not a number", f"metrics/{stage}.json", remedy)
    return value


def _with_hashes(raw_manifest: Path) -> list[dict[str, Any]]:
    hashes = {dataset.name: dataset.sha256 for dataset in read_datasets(raw_manifest)}
    return [{**source, "sha256": hashes[source["name"]]} for source in read_json(raw_manifest)["sources"]]


def _with_answers(samples: list[dict[str, Any]], quantized: Path) -> list[dict[str, Any]]:
    rows: Iterable[Mapping[str, Any]] = read_jsonl(quantized) if quantized.is_file() else ()
    answers = {(row["source"], row["prompt"]): row["answers"] for row in rows}
    return [{**row, "answers": answers.get((row["source"], row["prompt"]), {})} for row in samples]


def _of_these_files(
    speed: Mapping[str, Mapping[str, Any]], types: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Speed of a file that has since been replaced says nothing about the one that is there."""
    return {name: row for name, row in speed.items() if row["sha256"] == types.get(name, {}).get("sha256")}


def _of_this_adapter(card: Mapping[str, Any], tags: Mapping[str, str]) -> Mapping[str, Any]:
    """The card of another training says nothing about the adapter that is there: it may have come from a cache."""
    return card if card.get("sha256", {}).get("adapter") == tags["adapter_sha256"] else {}


def _pareto(plot: Path) -> frozenset[str]:
    rows = read_csv(plot)
    if rows and "pareto" not in rows[0]:
        raise DataError("column pareto is missing", plot, "run `dvc repro --force --single-item quantize_gguf`")
    return frozenset(row["type"] for row in rows if row["pareto"] == "yes")
