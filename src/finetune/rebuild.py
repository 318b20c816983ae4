"""A registered version -> the same bytes again, or which of them differ: computed in a work tree of its own.

    python -m finetune.rebuild NAME/NUMBER [--from STAGE] [--keep]

The version's commit is checked out below .cache/rebuild, DVC takes what comes before STAGE (clean, unless named) out of
the cache or the remote, and every later stage but `register` runs: nothing can hand the recorded bytes back. Exit code:
0 equal, 1 different or refused, 75 stopped (the same command goes on).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finetune.doctor import repro
from finetune.errors import FinetuneError, StoppedError
from finetune.lineage import Outputs, content_tags, repository_root, without_passwords
from finetune.log import logger, setup_logging
from finetune.reproduction import compare_outs, comparison_table, machine_facts, read_processor, read_stages
from finetune.tracking.rebuilt import note_rebuild
from finetune.tracking.versions import Version, find_version, open_registry
from finetune.transfer.recorded import LOCK, Recorded, read_recorded
from finetune.transfer.work_tree import FOLDER, prepare, remove

EXAMPLE = "make rebuild VERSION=finetune-smoke/1, or VERSION=finetune-smoke@champion"
FIRST = "clean"


def rebuild(name: str, first: str, *, keep: bool) -> int:
    """Compute a version again, print the comparison, and return the exit code."""
    root = repository_root()
    client = open_registry()
    version = find_version(client, name, EXAMPLE)
    tree = root / FOLDER / f"{version.model}-{version.number}"
    with tempfile.TemporaryDirectory(prefix="finetune-rebuild-") as folder:
        recorded = read_recorded(client, version, root, Path(folder))
    stages = prepare(recorded, root, tree, first)
    code = run_stages(tree, root, stages)
    if code == StoppedError.exit_code:
        logger.warning("stopped; `make rebuild VERSION=%s` goes on from what was saved", name)
    if code != 0:
        return code
    equal, told = report(version, recorded, tree, stages[: stages.index(first)])
    note_rebuild(client, version, f"{told} (computed from {first} on)", read_processor()[0], equal=equal)
    if keep:
        sys.stdout.write(f"kept: {tree}\n")
    else:
        remove(root, tree)
    return 0 if equal else 1


def run_stages(tree: Path, root: Path, stages: Sequence[str]) -> int:
    """Run the stages in the work tree, by its own code and this environment's tools; returns DVC's exit code."""
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tree / "src"),
        "FINETUNE_TOOLS": str((root / os.environ.get("FINETUNE_TOOLS", ".tools")).resolve()),
        # What the training logs on the way is not another run of the version.
        "MLFLOW_TRACKING_URI": f"sqlite:///{tree / 'mlflow.db'}",
        "DVC_NO_ANALYTICS": "1",
    }
    # DVC gives its stages the root that an outer DVC had.
    os.environ.pop("DVC_ROOT", None)
    return repro.run(tree, [*stages, "--no-run-cache"])


def report(version: Version, recorded: Recorded, tree: Path, taken: Sequence[str]) -> tuple[bool, str]:
    """Print each out of the version beside the rebuilt one; returns whether all hashes are equal, and that in words."""
    compared = compare_outs(recorded.stages, read_stages((tree / LOCK).read_text(encoding="utf-8")))
    tags = content_tags(
        Outputs(
            adapter=tree / "models/adapter",
            merged=tree / "models/merged",
            gguf=tree / "models/gguf",
            ollama=tree / "models/ollama",
            base=tree / "models/base",
            base_manifest=tree / "data/base_manifest.json",
            raw_manifest=tree / "data/raw/manifest.json",
            metrics=tree / "metrics",
            plots=tree / "plots",
            dvc_lock=tree / LOCK,
        )
    )
    wrong = [key for key, digest in tags.items() if version.tags.get(key) != digest]
    different = [out.path for out in compared if not out.equal]
    lines = [f"{recorded.title}, commit {recorded.commit}", *comparison_table(compared, taken)]
    lines += [f"tag {key}: {'DIFFERENT' if key in wrong else 'equal'}" for key in tags]
    equal = not different and not wrong
    told = f"all {len(compared)} outs and {len(tags)} tags are equal"
    if not equal:
        told = f"{len(different)} of {len(compared)} outs differ"
    lines.append(f"{'rebuilt' if equal else 'NOT rebuilt'}: {told}")
    if not equal:
        lines += machine_facts(tree)
        lines.append("see `Bit-exact` in README.md: on another kind of device training gives other bytes")
    sys.stdout.write("\n".join(lines) + "\n")
    return equal, told


def main(arguments: Sequence[str]) -> int:
    """Rebuild the version that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make rebuild", description="compute a registered version again, and compare")
    parser.add_argument("version", help="name/number or name@alias, such as finetune-smoke/1")
    parser.add_argument(
        "--from", dest="first", default=FIRST, metavar="STAGE", help="take earlier stages from the cache"
    )
    parser.add_argument("--keep", action="store_true", help="leave the work tree, with all that was made")
    options = parser.parse_args(arguments)
    setup_logging("rebuild")
    try:
        return rebuild(options.version, options.first, keep=options.keep)
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, without_passwords(str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("stopped; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
