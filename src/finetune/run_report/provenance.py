"""RunFacts -> where a run came from: hashes, commit, packages, parameters, and what to type to make it again."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.lineage import NOT_IN_GIT, run_params
from finetune.run_report.facts import RunFacts, entry
from finetune.run_report.tables import Table, table

HASHES = {
    "data_sha256": "data (data/raw/manifest.json)",
    "base_sha256": "base (models/base)",
    "adapter_sha256": "adapter (models/adapter)",
    "merged_sha256": "merged model (models/merged)",
    "gguf_sha256": "GGUF files (models/gguf)",
    "ollama_sha256": "Modelfile (models/ollama)",
    "content_sha256": "all of these",
    "dvc_lock_sha256": "dvc.lock without register",
}


def hashes_table(facts: RunFacts) -> Table:
    """SHA-256 of every product, and of each GGUF file by itself."""
    rows = [(label, facts.tags[tag]) for tag, label in HASHES.items()]
    made = facts.metrics["quantize_gguf"]["types"]
    rows += [(f"model-{name}.gguf", made[name]["sha256"]) for name in facts.types if "sha256" in made[name]]
    return table(("what", "SHA-256"), rows)


def source_table(facts: RunFacts) -> Table:
    """The commit, the base's revision, the container image and the versions that can change a result."""
    return table(("what", "which"), _source_rows(facts))


def _source_rows(facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "git commit", facts.tags["git.commit"] if is_clean(facts) else "none"
    if facts.base["kind"] == "hub":
        yield "base", f"{facts.base['repo_id']} at {facts.base['revision']}"
    if "container_image" in facts.tags:
        yield "container image", facts.tags["container_image"]
    yield "Python", facts.tags["python"]
    packages = {name.removeprefix("package."): text for name, text in facts.tags.items() if name.startswith("package.")}
    yield from sorted(packages.items())


def origin_table(facts: RunFacts) -> Table:
    """Commit, data, base and image in four rows, for a page that has no room for `source_table`."""
    commit, state = facts.tags["git.commit"], "" if is_clean(facts) else " (with changed files beside it)"
    base = (
        f"{facts.base['repo_id']} at {facts.base['revision']}" if facts.base["kind"] == "hub" else "made from scratch"
    )
    rows = [
        ("git commit", "in no git repository" if commit == NOT_IN_GIT else f"{commit}{state}"),
        ("data", f"SHA-256 {facts.tags['data_sha256']}"),
        ("base", f"{base}, SHA-256 {facts.tags['base_sha256']}"),
        ("dvc.lock", f"SHA-256 {facts.tags['dvc_lock_sha256']}"),
        ("container image", facts.tags.get("container_image", "none: an environment of requirements/lock.txt")),
    ]
    return table(("what", "which"), rows)


def is_clean(facts: RunFacts) -> bool:
    """Whether a commit holds exactly the files that made this run."""
    return facts.tags["git.dirty"] == "false" and facts.tags["git.commit"] != NOT_IN_GIT


def rebuild_commands(facts: RunFacts) -> list[str]:
    """What to type in a clone to make this run again and to check that it is the same."""
    if not is_clean(facts):
        return []
    name = facts.params.ollama_modelfile.quantization
    served, figures = f"models/gguf/model-{name}.gguf", entry(facts.metrics, "quantize_gguf", "types", name)
    commands = [f"git checkout {facts.tags['git.commit']}", "make repro"]
    commands += [f'echo "{figures["sha256"]}  {served}" | sha256sum --check'] if "sha256" in figures else []
    return [*commands, f"make lineage FILE={served}"]


def rebuild_note(facts: RunFacts) -> str:
    """Why there is no command that rebuilds this run exactly, or what the commands are for."""
    if is_clean(facts):
        return (
            "In a clone of the repository; the last two say whether the served file is this one, and where it is from:"
        )
    if facts.tags["git.commit"] == NOT_IN_GIT:
        return "These files belong to no git commit, so no command can check them out. Commit, then `make repro`."
    return (
        f"The files differed from commit {facts.tags['git.commit']}, so no command can check them out. "
        "Commit, then `make repro`."
    )


def parameters(facts: RunFacts) -> dict[str, Table]:
    """Every value of params.yaml but the registry's, a table for each section; `(top)` holds those of none."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for key, value in run_params(facts.params).items():
        section, _, name = key.partition(".")
        sections.setdefault(section if name else "(top)", []).append((name or section, value))
    return {section: table((section, "value"), rows) for section, rows in sections.items()}
