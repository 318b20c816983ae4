"""A GGUF found anywhere, or a registered version -> where it came from, and the commands that make it again.

    python -m finetune.origin FILE.gguf
    python -m finetune.origin --version name@alias      (or name/number)

The file's own metadata says what it learned from; the git history of this repository says which commit made it. The
text is ASCII, and escapes whatever a foreign file may hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, FinetuneError, TrackingError
from finetune.export.gguf_header import read_header
from finetune.export.provenance import PREFIX, licence_of_all
from finetune.git_history import COMMIT, Recorded, clone_source, find_file, read_commit
from finetune.io import sha256_file
from finetune.lineage import MIB, flatten, repository_root, without_passwords
from finetune.log import logger, setup_logging

LABEL_WIDTH = 12
# Facts of one line each, in this order: the label, and the name that the registry's tags and `finetune.*` keys share.
LINES = (
    ("adapter", "adapter_sha256"),
    ("merged", "merged_sha256"),
    ("GGUF files", "gguf_sha256"),
    ("content", "content_sha256"),
    ("dvc.lock", "dvc_lock_sha256"),
    ("template", "chat_template_sha256"),
    ("image", "container_image"),
    ("python", "python"),
)
SOURCE_HEADINGS = ("source", "use", "licence", "files", "bytes", "SHA-256", "origin")


@dataclass(frozen=True)
class Origin:
    """What a file or a version tells: `facts` by name, one mapping for each source, parameters by dotted key.

    `commit`, `dirty` and `version` (name/number) are the registry's, empty for a file; `recorded` is what git holds of
    that commit.
    """

    title: str
    facts: Mapping[str, str]
    sources: Sequence[Mapping[str, Any]]
    params: Mapping[str, Any]
    recorded: Recorded | None
    commit: str = ""
    dirty: str = ""
    sha256: str = ""
    version: str = ""


def origin_of_file(path: Path, root: Path) -> Origin:
    """Read a GGUF, and look its SHA-256 up in the git history of `root`.

    Raises ExportError for a file that is no whole GGUF, or that this pipeline did not make.
    """
    metadata = read_header(path)
    facts = {key.removeprefix(PREFIX): str(value) for key, value in metadata.items() if key.startswith(PREFIX)}
    if "params" not in facts or "data_sources" not in facts:
        maker = metadata.get("general.author") or metadata.get("general.organization") or "unknown"
        known = f"its general.name is {metadata.get('general.name')!r}, its maker {maker!r}"
        raise ExportError(
            f"this GGUF holds no provenance of a finetune pipeline; {known}",
            path,
            "ask its maker; a file of this pipeline that is older has none: make it again with `make repro`",
        )
    facts["license"] = str(metadata.get("general.license", ""))
    sha256 = sha256_file(path)
    return Origin(
        title=f"{path.name}  ({path.stat().st_size / MIB:.1f} MiB)",
        facts=facts,
        sources=json.loads(facts["data_sources"]),
        params=flatten(json.loads(facts["params"])),
        recorded=find_file(root, sha256),
        sha256=sha256,
    )


def origin_of_version(name: str, root: Path) -> Origin:
    """Read a registered version, `name@alias` or `name/number`; raises TrackingError when there is none such."""
    from finetune.tracking.client import PATIENT, connect, refusals

    model, _, alias = name.removeprefix("models:/").partition("@")
    model, _, number = model.partition("/")
    if not model or bool(alias) == bool(number):
        remedy = "make lineage VERSION=finetune-smoke@challenger, or VERSION=finetune-smoke/1"
        raise TrackingError("a version is name@alias or name/number", name, remedy)
    client = connect(PATIENT)
    with refusals():
        entry = client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, number)
        run = client.get_run(entry.run_id)
    tags = dict(entry.tags)
    # A registry is written by others: what is no hash is no commit, and must not become part of a command.
    commit = tags.get("git.commit", "") if COMMIT.fullmatch(tags.get("git.commit", "")) else ""
    return Origin(
        title=f"{model} version {entry.version}",
        facts={**tags, "license": licence_of_all(json.loads(tags.get("licenses", "[]")))},
        sources=[_dataset(each.dataset) for each in run.inputs.dataset_inputs],
        params=dict(run.data.params),
        recorded=read_commit(root, commit) if commit else None,
        commit=commit,
        dirty=tags.get("git.dirty", ""),
        version=f"{model}/{entry.version}",
    )


def _dataset(dataset: Any) -> dict[str, Any]:
    return {"name": dataset.name, **json.loads(dataset.source), **json.loads(dataset.profile)}


def describe_origin(origin: Origin, root: Path) -> str:
    """The page for a terminal: what it is, what made it, and at the end the commands that make it again."""
    lines = [origin.title, "-" * len(origin.title), *_summary(origin), *_data(origin.sources)]
    lines += ["", "parameters", *_columns([(key, str(value)) for key, value in sorted(origin.params.items())])]
    lines += ["", *_rebuild(origin, root)]
    return "\n".join(_ascii(line) for line in lines) + "\n"


def _summary(origin: Origin) -> Iterator[str]:
    facts, recorded = origin.facts, origin.recorded
    if origin.sha256:
        yield _line("SHA-256", origin.sha256)
    yield _line("recipe", facts.get("recipe", "not recorded"))
    yield _line("commit", _commit_text(origin))
    yield _line("tree", _tree_text(origin))
    # The figures of a commit are those of a version only when the version was made from it as it is.
    if recorded is not None and origin.dirty != "true":
        for name, figures in sorted(recorded.types.items()):
            if origin.sha256 in ("", figures.get("sha256")):
                ratio, agreement = figures["perplexity_ratio"], figures["top1_agreement"]
                yield _line("quantised", f"{name}: perplexity x {ratio:.4f} of merged, first choice {agreement:.1%}")
    repo, revision = facts.get("base.repo"), facts.get("base.revision")
    yield _line("base", f"{repo} at {revision}" if repo else "a model made from scratch, by these parameters")
    yield _line("licence", facts["license"] or "not recorded")
    yield from (_line(label, facts[key]) for label, key in LINES if key in facts)
    packages = [f"{key.removeprefix('package.')} {facts[key]}" for key in sorted(facts) if key.startswith("package.")]
    yield _line("packages", ", ".join(packages) or "not recorded")
    yield _line("data", f"manifest {facts.get('data_sha256', 'not recorded')}")


def _commit_text(origin: Origin) -> str:
    if origin.recorded is not None:
        return f"{origin.recorded.commit}  ({origin.recorded.date}, {origin.recorded.subject})"
    if not origin.commit:
        return "none of this repository records it"
    return f"{origin.commit}  (not in this clone: git fetch --all)"


def _tree_text(origin: Origin) -> str:
    if origin.dirty == "true":
        return "CHANGED beside this commit when it was registered: a rebuild may differ"
    if origin.recorded is None:
        return "unknown"
    if origin.recorded.changed:
        return f"CHANGED: dvc.lock names another content of {', '.join(origin.recorded.changed)}"
    return "clean: the commit holds the code, parameters and figures that its dvc.lock names"


def _data(sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [SOURCE_HEADINGS]
    for source in sources:
        origin = source["origin"] + (f" at {source['revision']}" if source["revision"] else "")
        sizes = (str(source["files"]), f"{source['size_bytes']:,}")
        rows.append(
            (source["name"], source.get("use", "-"), source.get("license", "-"), *sizes, source["sha256"], origin)
        )
    yield ""
    yield from _columns(rows)


def _rebuild(origin: Origin, root: Path) -> Iterator[str]:
    commit = origin.recorded.commit if origin.recorded else origin.commit
    if not commit:
        yield "make it again: no commit is known. Fetch all branches (git fetch --all), or run this in the repository"
        yield "that made it; what its metadata says above is all that the file itself tells."
        return
    expected = origin.recorded.expected() if origin.recorded else {}
    if origin.sha256:
        expected = {path: digest for path, digest in expected.items() if digest == origin.sha256}
    if origin.version:
        yield f"make it again beside this tree, and compare every out: make rebuild VERSION={origin.version}"
        yield f"only its files, verified: make pull NAME={origin.version}"
    yield "make it again, and compare:"
    yield f"    git clone {clone_source(root)} rebuilt"
    yield "    cd rebuilt"
    yield f"    git checkout {commit}"
    yield "    make repro"
    yield from (f'    echo "{digest}  {path}" | sha256sum --check' for path, digest in expected.items())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines; the last column is not padded."""
    widths = [max(len(_ascii(row[number])) for row in rows) for number in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [_ascii(cell) for cell in row]
        lines.append(
            "  " + "  ".join([*(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)), cells[-1]])
        )
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def _ascii(text: str) -> str:
    """Printable ASCII as it is, and everything else escaped once, such as \\xe9 or \\x1b."""
    return "".join(
        each if each.isascii() and each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def main(arguments: Sequence[str]) -> int:
    """Print the origin of what the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make lineage", description="where a GGUF or a registered version comes from")
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("file", nargs="?", type=Path, help="a GGUF: make lineage FILE=path.gguf")
    named.add_argument("--version", help="name@alias or name/number: make lineage VERSION=finetune-smoke@challenger")
    options = parser.parse_args(arguments)
    setup_logging("lineage")
    root = repository_root()
    try:
        origin = origin_of_version(options.version, root) if options.version else origin_of_file(options.file, root)
        sys.stdout.write(describe_origin(origin, root))
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, without_passwords(str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
