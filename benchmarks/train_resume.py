"""The same 20-step QLoRA run in this project and in plain TRL, killed and resumed: `python benchmarks/train_resume.py`.

A tiny random Llama in NF4, packed rows, dropout on, two epochs of ten steps, a checkpoint every third step. Each run is
a process of its own: twice under two hash seeds; killed with SIGKILL at steps 7 and 15 and started again; killed at
step 15, its newest checkpoint damaged in five ways with a good older one beside it, and started again. Equal means the
adapter's bytes. TRL resumes as its documentation shows it. Takes about five minutes; writes train_resume.json.
"""

from __future__ import annotations

from finetune.runtime import pin_cpu_code_path

# As the stages do, before numpy is imported.
pin_cpu_code_path()

import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from process_tree import machine  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from finetune.io import read_json, sha256_file, write_json  # noqa: E402
from finetune.params import load_params  # noqa: E402

HERE = Path(__file__).resolve().parent
SCRIPTS = {"ours": [str(HERE / "train_resume.py"), "ours"], "trl": [str(HERE / "plain_trl.py")]}
KILLS = {"epoch_1": 7, "epoch_2": 15}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
THREADS, SEED = 1, 5
ROWS, DOCUMENTS, DOCUMENT_TOKENS = 40, 2, 48
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CHANGES: dict[str, Any] = {
    "epochs": 2,
    "batch_rows": 4,
    "micro_batch_rows": 2,
    "learning_rate": 0.003,
    "weight_decay": 0.01,
    "evaluate_every_steps": 1000,
    "save_every_steps": 3,
}
LORA_CHANGES = {"rank": 8, "alpha": 16, "dropout": 0.1}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
# What is damaged in the newest checkpoint, by the file's name in each; a checkpoint of ours holds weights and optimizer
# in one file. `cut`: its second half is missing. `flipped`: one bit in the middle, which no format's header notices.
DAMAGES: dict[str, dict[str, tuple[str, str]]] = {
    "optimizer_cut": {"ours": ("tensors-*.safetensors", "cut"), "trl": ("optimizer.pt", "cut")},
    "optimizer_missing": {"ours": ("tensors-*.safetensors", "missing"), "trl": ("optimizer.pt", "missing")},
    "weights_cut": {"ours": ("tensors-*.safetensors", "cut"), "trl": (WEIGHTS, "cut")},
    "state_missing": {"ours": ("state.json", "missing"), "trl": ("trainer_state.json", "missing")},
    "bit_flipped": {"ours": ("tensors-*.safetensors", "flipped"), "trl": (WEIGHTS, "flipped")},
}


def section() -> dict[str, Any]:
    """The smoke recipe's train_qlora with what this benchmark changes: NF4 in float32, dropout, 20 steps."""
    smoke = load_params(HERE.parent / "recipes/smoke/params.yaml").train_qlora.model_dump()
    return {**smoke, **CHANGES, "lora": {**smoke["lora"], **LORA_CHANGES}}


def make_inputs(folder: Path) -> None:
    """`base`, a tiny Llama with a tokenizer beside it, and `packed.parquet`, rows of random documents."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder / "base")
    write_json(folder / "base" / "base.json", {"kind": "scratch"})
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(SHAPE["vocab_size"] - 3))]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)})),
        **SPECIAL_TOKENS,
    ).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        ids = generator.integers(3, SHAPE["vocab_size"], (DOCUMENTS, DOCUMENT_TOKENS))
        ids[:, 0], ids[:, -1] = 1, 2
        labels = ids.copy()
        labels[:, : DOCUMENT_TOKENS // 4] = -100
        lengths = [DOCUMENT_TOKENS] * DOCUMENTS
        rows.append({"input_ids": ids.ravel().tolist(), "labels": labels.ravel().tolist(), "seq_lengths": lengths})
    Dataset.from_list(rows).to_parquet(str(folder / "packed.parquet"))


def ours(run: dict[str, Any]) -> None:
    """This project's training of RUN.json, which is described in plain_trl.py."""
    import torch
    from transformers import AutoTokenizer

    from finetune.log import setup_logging
    from finetune.training.device import make_deterministic
    from finetune.training.loop import open_rows, train
    from finetune.training.method import make_trainable
    from finetune.training.model import load_extended, save_adapter
    from finetune.training.vocabulary import Extension
    from finetune.training_sections import TrainQlora

    setup_logging("train")
    settings = TrainQlora.model_validate(run["train_qlora"])
    folder, kept = Path(run["checkpoints"]), Extension((), 0)
    make_deterministic(run["seed"], run["threads"])
    model = load_extended(Path(run["base"]), kept, settings.quantization, torch.float32, torch.device("cpu"))
    model = make_trainable(model, settings, kept)

    def seen(step: int, _tokens: int) -> None:
        if step == run["kill_at_step"]:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        model,
        AutoTokenizer.from_pretrained(run["tokenizer"]),
        open_rows(Path(run["rows"]), folder),
        settings,
        seed=run["seed"],
        folder=folder,
        validate=lambda _model: 0.0,
        begin=lambda step: write_json(Path(run["report"]), {"from_step": step}),
        seen=seen,
    )
    save_adapter(model, Path(run["adapter"]))


def request(inputs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """What RUN.json holds for a run whose files lie in `folder`."""
    return {
        "base": str(inputs / "base"),
        "tokenizer": str(inputs / "base"),
        "rows": str(inputs / "packed.parquet"),
        "validation": None,
        "adapter": str(folder / "adapter"),
        "checkpoints": str(folder / "checkpoints"),
        "report": str(folder / "report.json"),
        "seed": SEED,
        "threads": THREADS,
        "train_qlora": section(),
        "resume": None,
        "kill_at_step": None,
        "float32_adapter": False,
        **changes,
    }


def start(way: str, inputs: Path, folder: Path, *, hash_seed: int = 1, **changes: Any) -> tuple[int, str]:
    """Run one way in a process of its own; returns exit code and the last lines of stderr."""
    write_json(folder / "run.json", request(inputs, folder, **changes))
    done = subprocess.run(
        [sys.executable, *SCRIPTS[way], str(folder / "run.json")],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr[-4000:]


def must(result: tuple[int, str], exit_code: int) -> None:
    """Stop the benchmark when a run that has to end with `exit_code` ends otherwise."""
    if result[0] != exit_code:
        raise SystemExit(f"exit code {result[0]} where {exit_code} was expected:\n{result[1]}")


def damage(checkpoint: Path, pattern: str, how: str) -> None:
    """Cut, remove or flip one bit of the last file of that name."""
    file = sorted(checkpoint.glob(pattern))[-1]
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        # The lowest bit of a mantissa would change nothing worth a look: the highest byte of a float32 value.
        content[len(content) * 3 // 4 // 4 * 4 + 3] ^= 0x01
    file.write_bytes(content)


def newest(folder: Path) -> Path:
    """The checkpoint of the highest step."""
    return max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def difference(some: Path, other: Path) -> float:
    """Largest absolute difference between two adapters."""
    one, two = load_file(some / WEIGHTS), load_file(other / WEIGHTS)
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def compared(adapter: Path, reference: Path) -> dict[str, Any]:
    """Whether two adapters are the same bytes, and how far apart they are."""
    equal = sha256_file(adapter / WEIGHTS) == sha256_file(reference / WEIGHTS)
    return {"equal_bytes": equal, "max_abs_difference": difference(adapter, reference)}


def exception_name(stderr: str) -> str:
    """The exception that ended a process, as its last line names it."""
    names = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception))\b", stderr, re.MULTILINE)
    return names[-1].rpartition(".")[2] if names else "no exception was named"


def after_damage(
    way: str, kind: str, inputs: Path, killed: Path, references: dict[str, Path], folder: Path
) -> dict[str, Any]:
    """What a restart makes of a damaged newest checkpoint; `references`: `whole`, and `resumed` from an intact one."""
    shutil.copytree(killed, folder)
    damage(newest(folder), *DAMAGES[kind][way])
    exit_code, stderr = start(way, inputs, folder, resume=True)
    if exit_code:
        return {"outcome": "crashed", "exception": exception_name(stderr)}
    facts = {"from_step": read_json(folder / "report.json")["from_step"]}
    facts |= {f"beside_{name}": compared(folder / "adapter", reference) for name, reference in references.items()}
    if facts["beside_whole"]["equal_bytes"]:
        return {"outcome": "equal to an uninterrupted run", **facts}
    if facts["beside_resumed"]["equal_bytes"]:
        return {"outcome": "equal to its other resumed run", **facts}
    return {"outcome": "continued silently with a wrong state", **facts}


def measure(way: str, inputs: Path, folder: Path) -> dict[str, Any]:
    """All runs of one way, their adapters below `folder`."""
    whole = folder / "whole"
    must(start(way, inputs, whole, hash_seed=1), 0)
    must(start(way, inputs, folder / "again", hash_seed=2), 0)
    configs = {sha256_file(folder / name / "adapter" / CONFIG) for name in ("whole", "again")}
    result: dict[str, Any] = {"rerun": compared(folder / "again" / "adapter", whole / "adapter")}
    result["adapter_config_equal_under_two_hash_seeds"] = len(configs) == 1
    for name, step in KILLS.items():
        must(start(way, inputs, folder / name, kill_at_step=step), -signal.SIGKILL)
        shutil.copytree(folder / name, folder / f"killed_{name}")
        must(start(way, inputs, folder / name, resume=True), 0)
        facts = {"killed_at": step, "from_step": read_json(folder / name / "report.json")["from_step"]}
        result[f"resume_{name}"] = {**facts, **compared(folder / name / "adapter", whole / "adapter")}
    references = {"whole": whole / "adapter", "resumed": folder / "epoch_2" / "adapter"}
    result["torn"] = {
        kind: after_damage(way, kind, inputs, folder / "killed_epoch_2", references, folder / kind) for kind in DAMAGES
    }
    return result


def lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the printed table for one way."""

    def bytes_of(facts: dict[str, Any]) -> str:
        return "equal bytes" if facts["equal_bytes"] else f"differs by {facts['max_abs_difference']:.1e}"

    def torn(facts: dict[str, Any]) -> str:
        detail = facts.get("exception") or f"from step {facts['from_step']}"
        return f"{facts['outcome']} ({detail})"

    config = "equal" if result["adapter_config_equal_under_two_hash_seeds"] else "differs"
    table = [("two equal runs", bytes_of(result["rerun"])), ("config, two hash seeds", config)]
    table += [(f"kill -9 at step {step}", bytes_of(result[f"resume_{name}"])) for name, step in KILLS.items()]
    return table + [(kind.replace("_", " "), torn(facts)) for kind, facts in result["torn"].items()]


def passed(result: dict[str, Any]) -> bool:
    """Whether every run ended in the bytes of the first, with the same configuration."""
    runs = [result["rerun"], *(result[f"resume_{name}"] for name in KILLS)]
    whole = [facts.get("beside_whole", {"equal_bytes": False}) for facts in result["torn"].values()]
    config: bool = result["adapter_config_equal_under_two_hash_seeds"]
    return config and all(facts["equal_bytes"] for facts in [*runs, *whole])


def main() -> int:
    """Run both ways, print them side by side, and write the result; fails when a run of ours ends in other bytes."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        inputs = Path(name) / "inputs"
        make_inputs(inputs)
        ways = {way: measure(way, inputs, Path(name) / way) for way in SCRIPTS}
    libraries = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")}
    result = {**machine(), "libraries": libraries, "steps": 20, "ways": ways, "passed": passed(ways["ours"])}
    write_json(Path(__file__).with_suffix(".json"), result)
    sys.stdout.write(f"{'':24}{'this project':58}plain TRL\n")
    for (label, own), (_, other) in zip(lines(ways["ours"]), lines(ways["trl"]), strict=True):
        sys.stdout.write(f"{label:24}{own:58}{other}\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    ours(read_json(Path(sys.argv[2])))
