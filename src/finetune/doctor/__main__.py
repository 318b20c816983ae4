"""`make doctor`: everything that would stop or spoil a run of params.yaml, before it starts; exit code 1 on a fault.

python -m finetune.doctor [--json] [--card-gib 24]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from finetune.data_sections import HubBase
from finetune.doctor import accelerator, budget, disk, services
from finetune.doctor.base_files import BaseFiles, look
from finetune.doctor.libraries import check_libraries
from finetune.doctor.repository import check_repository
from finetune.doctor.result import GIB, Result, as_json, table, worst
from finetune.errors import DataError, DeviceError
from finetune.io import read_json
from finetune.lineage import shown_uri, tracking_uri
from finetune.log import quiet_libraries
from finetune.params import Params
from finetune.runtime import caller_is_offline, pin_cpu_code_path

SERVE_PORT = 8000
RUN_CARD = Path(".cache/run_card.json")
SPLIT_METRICS = Path("metrics/split.json")


def examine(root: Path, card_gib: float | None) -> list[Result]:
    """Every check, in the order of the table. `card_gib`: memory of the card to plan for, None for this machine's."""
    results = check_libraries(root, sys.version_info[:2])
    repository, params = check_repository(root)
    results += repository
    if params is not None and find_spec("torch") is not None:
        results += _machine(root, params, card_gib)
    if params is not None:
        results += _hub(root, params)
    return results + _ports() + [services.mlflow_result(shown_uri(), services.mlflow_refusal(tracking_uri()))]


def _machine(root: Path, params: Params, card_gib: float | None) -> list[Result]:
    """Device, memory, time and disk."""
    from finetune.export.memory import free_memory_bytes
    from finetune.hardware import cpu_model

    found, settings, free_bytes = accelerator.accelerators(), params.train_qlora, free_memory_bytes()
    card_bytes = int(card_gib * GIB) if card_gib else min((gpu.memory_bytes for gpu in found.gpus), default=None)
    results = [
        accelerator.build_result(found),
        accelerator.gpus_result(found, settings.distribution.processes),
        accelerator.hardware_result(settings),
        accelerator.bitsandbytes_result(settings),
    ]
    plan: budget.TrainingPlan | None = None
    try:
        plan = budget.plan(root, params, card_bytes)
        place = (
            f"a card of {card_gib:g} GiB" if card_gib else found.gpus[0].name if found.gpus else "this machine, free"
        )
        results.append(budget.memory_result(plan, card_bytes or free_bytes, place))
    except (DataError, DeviceError) as reason:
        results.append(budget.unknown_memory(reason))
    base = _base_files(root, params)
    size = disk.size_of_base(params, base.weight_bytes)
    results.append(budget.merge_result(params, size.parameters, free_bytes, on_card=bool(found.gpus)))
    counted = budget.steps_of(read_json(root / SPLIT_METRICS), settings) if (root / SPLIT_METRICS).is_file() else None
    card = read_json(root / RUN_CARD) if (root / RUN_CARD).is_file() else {}
    results.append(budget.time_result(counted, budget.measured_speed(card, found, cpu_model())))
    return results + _disks(root, params, size, base, plan)


def _disks(
    root: Path, params: Params, size: disk.Size, base: BaseFiles, plan: budget.TrainingPlan | None
) -> list[Result]:
    from huggingface_hub import constants

    config = root / ".dvc/config"
    missing = base.missing_bytes
    if missing is None and isinstance(params.fetch.base_model, HubBase) and size.parameters is not None:
        missing = size.parameters * disk.HUB_BYTES_PER_PARAMETER - (base.weight_bytes or 0)
    needs = disk.run_needs(
        params,
        size,
        missing_base_bytes=missing,
        trained_bytes=plan.still.adapter if plan else None,
        optimizer_bytes=plan.still.optimizer if plan else None,
        copies=disk.stored_times(config.read_text(encoding="utf-8") if config.is_file() else ""),
        uploads=tracking_uri().startswith(services.SQLITE),
    )
    places = {"repository": root, "HF_HOME": Path(constants.HF_HUB_CACHE), "TMPDIR": Path(tempfile.gettempdir())}
    return disk.disk_results(needs, {place: disk.read_disk(folder) for place, folder in places.items()})


def _base_files(root: Path, params: Params) -> BaseFiles:
    base = params.fetch.base_model
    return look(root, base) if isinstance(base, HubBase) else BaseFiles(0, None)


def _hub(root: Path, params: Params) -> list[Result]:
    from huggingface_hub import constants, get_token

    offline, token = caller_is_offline(), get_token()
    repos = services.hub_repositories(root, params, _base_files(root, params).fetched)
    statuses: dict[str, int | None] = {}
    for repo in repos if not offline else []:
        statuses[repo.path] = services.status_of(constants.ENDPOINT, repo.path, token)
        if statuses[repo.path] is None:
            # The next one would take as long, and not answer either.
            break
    return services.hub_results(repos, statuses, endpoint=constants.ENDPOINT, token=bool(token), offline=offline)


def _ports() -> list[Result]:
    port = int(os.environ.get("MLFLOW_PORT", "5000"))
    wanted = [(SERVE_PORT, "make serve", f"make serve PORT={SERVE_PORT + 1}")]
    # With a server of its own, the address is this port's or `make mlflow` starts nothing.
    if not urlsplit(tracking_uri()).scheme.startswith("http"):
        wanted.insert(0, (port, "make mlflow", f"make mlflow MLFLOW_PORT={port + 1}"))
    results = []
    for number, use, remedy in wanted:
        free = services.is_free(number)
        holder = None if free else services.listener(number)
        results.append(services.port_result(number, use, holder, free=free, remedy=remedy))
    return results


def main(arguments: list[str]) -> int:
    """Examine the current folder and show what was found; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make doctor", description="what would stop or spoil a run of params.yaml")
    parser.add_argument("--json", action="store_true", help="the same for machines")
    parser.add_argument("--card-gib", type=float, help="plan for a card of so much memory, not for this machine's")
    options = parser.parse_args(arguments)
    # Notes the caller's own wish to stay offline before it switches the Hub's client off for this process.
    pin_cpu_code_path()
    quiet_libraries()
    results = examine(Path.cwd(), options.card_gib)
    shown = json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n" if options.json else table(results)
    sys.stdout.write(shown)
    return 1 if worst(results) == "fault" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
