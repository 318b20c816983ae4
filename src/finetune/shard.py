"""`python -m finetune.shard clean --shard 3/16`: one worker's share of a stage, put where the stage will find it.

Any number of workers, on any machines that share the repository's folder, in any order; what one has done is not done
again. Then `dvc repro` runs the stage, which takes all of it and does the rest, to the same bytes as without workers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

# Pins the CPU code path, as for the stage itself.
import finetune.stages  # noqa: F401
from finetune.data.cleaning import chunk_jobs
from finetune.data.encoding import token_workers
from finetune.data.shards import SHARDS, Shard, parse_shard, store_of
from finetune.errors import DataError, FinetuneError
from finetune.log import logger, setup_logging
from finetune.params import Params, load_params

PARAMS, PIPELINE = Path("params.yaml"), Path("dvc.yaml")
STAGES = ("clean", "tokenize")


def run(stage: str, shard: Shard, params: Params, paths: list[Path]) -> tuple[int, int]:
    """Do one worker's pieces of a stage; returns how many it made, and how many were there already."""
    work = _clean if stage == "clean" else _tokenize
    made = list(work(shard, params, paths))
    return sum(made), len(made) - sum(made)


def _clean(shard: Shard, params: Params, paths: list[Path]) -> Iterator[bool]:
    rules = chunk_jobs.Rules(params.clean, params.split.validation_share, params.split.test_share)
    own = chunk_jobs.jobs_of_shard(paths[0], params.fetch.sources, shard)
    return chunk_jobs.make_shard(paths[0], own, rules, store_of("clean", rules.to_json()))


def _tokenize(shard: Shard, params: Params, paths: list[Path]) -> Iterator[bool]:
    records, tokenizer = paths[0] / "records.jsonl", paths[1]
    store = store_of("tokenize", token_workers.determinants(tokenizer, params.tokenize))
    return token_workers.make_shard(records, tokenizer, params.tokenize, shard, store)


def stage_paths(stage: str) -> list[Path]:
    """The paths that dvc.yaml gives to a stage; raises DataError without that file."""
    if not PIPELINE.is_file():
        raise DataError("file is missing", PIPELINE, "change to the root of the repository")
    content: Any = YAML(typ="safe", pure=True).load(PIPELINE.read_text(encoding="utf-8"))
    return [Path(word) for word in shlex.split(content["stages"][stage]["cmd"])[3:]]


def main(arguments: list[str]) -> int:
    """Do one worker's share; returns the exit code."""
    setup_logging("shard")
    parser = argparse.ArgumentParser(prog="python -m finetune.shard", description="One worker's share of a stage.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--shard", required=True, help="NUMBER/COUNT: which of how many workers, from 1")
    given = parser.parse_args(arguments)
    try:
        made, there = run(given.stage, parse_shard(given.shard), load_params(PARAMS), stage_paths(given.stage))
    except FinetuneError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    folder = SHARDS / given.stage
    logger.info(
        "shard %s of %s: %d piece(s) made, %d there already, in %s", given.shard, given.stage, made, there, folder
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
