"""A child program: trains the tiny model as one of several processes. argv: base, tokenizer, folder, trainings.

A training is `name=strategy,method,stop_step`; stop_step 0 lets it run to its end, another one sends SIGINT to the
first process at that step, and then trains on from the checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.runtime import pin_cpu_code_path

pin_cpu_code_path()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny_training import CPU, KEPT  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from training_settings import PLAIN, make_lora, make_settings  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from finetune.errors import StoppedError  # noqa: E402
from finetune.evaluation.perplexity import mean_loss  # noqa: E402
from finetune.io import write_json  # noqa: E402
from finetune.training import loop  # noqa: E402
from finetune.training.device import make_deterministic  # noqa: E402
from finetune.training.distribution import relaunch_if_needed, writes_files  # noqa: E402
from finetune.training.method import make_trainable, save_trained  # noqa: E402
from finetune.training.model import load_extended  # noqa: E402
from finetune.training.vocabulary import Extension  # noqa: E402
from finetune.training_sections import Distribution, EarlyStopping, TrainQlora  # noqa: E402

SEED, MODULE = 3, "two_processes"
NEW_TOKENS = Extension((5, 29, 30), 31)
# What a method changes of the plain one, which trains an adapter on float32 weights.
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {"early_stopping": EarlyStopping(patience=9, min_improvement=0.0)},
    "pairs": {"batch_rows": 2, "epochs": 2},
    "nf4": {},
    "tokens": {},
    "full": {"method": "full", "lora": None, "learning_rate": 0.002},
}


def uneven_rows(new_tokens: bool) -> Dataset:
    """Eleven rows of one to three documents of 3 to 17 tokens: windows of four leave three for the last one."""
    rows = []
    for row in range(11):
        lengths = [3 + (7 * row + 5 * document) % 15 for document in range(1 + row % 3)]
        documents = [[1, *((3 + (row + 3 * at) % 26) for at in range(length - 2)), 2] for length in lengths]
        ids = [token for document in documents for token in document]
        if new_tokens:
            ids = [{7: 29, 8: 30}.get(token, token) for token in ids]
        labels = [-100 if at % 4 == row % 4 else token for at, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels, "seq_lengths": lengths})
    return Dataset.from_list(rows)


def settings_of(strategy: str, method: str, **changes: Any) -> TrainQlora:
    """Twelve steps of four rows: `single` takes them one after the other, two processes two each."""
    plain = {
        "lora": make_lora(),
        "epochs": 4,
        "batch_rows": 4,
        "micro_batch_rows": 1,
        "learning_rate": 0.02,
        "save_every_steps": 4,
        "distribution": Distribution(strategy=strategy, processes=1 if strategy == "single" else 2),  # type: ignore[arg-type]
    }
    quantization = {} if method == "nf4" else {"quantization": PLAIN}
    return make_settings(**{**plain, **quantization, **CHANGES[method], **changes})


def train(
    base: Path, words: Any, use: TrainQlora, folder: Path, *, new_tokens: bool = False, stop_step: int = 0
) -> None:
    """Train once; the first process writes what was trained, the log, and the share of the weights that it holds."""
    make_deterministic(SEED, 1)
    extension = NEW_TOKENS if new_tokens else KEPT
    model = make_trainable(load_extended(base, extension, use.quantization, torch.float32, CPU), use, extension)

    shares: list[float] = []

    def seen(step: int, _tokens: int) -> None:
        held = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
        shares.append(sum(each.numel() for each in held) / sum(each.numel() for each in model.parameters()))
        if step == stop_step and writes_files():
            os.kill(os.getpid(), signal.SIGINT)

    entries = loop.train(
        model,
        words,
        uneven_rows(new_tokens),
        use,
        seed=SEED,
        folder=folder / "run",
        validate=lambda model: mean_loss(
            model, [{"input_ids": [1, 4, 9, 14, 2], "trained": [False, True, True, True, True]}]
        ),
        begin=lambda _: None,
        seen=seen,
    )
    if writes_files():
        save_trained(model, {}, folder / "trained")
        write_json(folder / "log.json", {"entries": entries, "share": min(shares)})


def main(base: Path, tokenizer: Path, folder: Path, trainings: list[str]) -> None:
    """Do the trainings one after the other, in one process group."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    for training in trainings:
        name, _, plan = training.partition("=")
        strategy, method, stop_step = plan.split(",")
        use, new_tokens = settings_of(strategy, method), method == "tokens"
        if int(stop_step):
            with suppress(StoppedError):
                train(base, words, use, folder / name, new_tokens=new_tokens, stop_step=int(stop_step))
            if (folder / name / "log.json").exists():
                raise RuntimeError(f"{name} was not stopped")
        train(base, words, use, folder / name, new_tokens=new_tokens)


if __name__ == "__main__":
    relaunch_if_needed(Distribution(strategy="ddp", processes=2), MODULE, [], 1)
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
