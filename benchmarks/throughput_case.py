"""One case of train_throughput.py in this process, `throughput_case.py CASE.json` -> result.json beside it.

A case that cannot be measured ends this process with an exception, which the benchmark takes for its result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "liger-kernel", "triton")
LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def random_state(shape: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """Weights of a Llama of that shape by name; projections of one shape are one tensor in all layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(**shape)).state_dict()
    shared: dict[Any, Any] = {}

    def values(name: str, size: Any) -> Any:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        if name.endswith("_proj.weight") and size in shared:
            return shared[size]
        tensor = torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)
        if name.endswith("_proj.weight"):
            shared[size] = tensor
        return tensor

    return {name: values(name, tensor.shape) for name, tensor in names.items()}


def random_model(scale: Mapping[str, Any], attention: str, *, double_quantization: bool) -> Any:
    """A frozen random Llama with its layers in NF4, as transformers loads one from files."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    device, dtype = torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), getattr(torch, scale["dtype"])
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig(**scale["shape"]),
        state_dict=random_state(scale["shape"], dtype, device),
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attention,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    return model.requires_grad_(False)


def word_tokenizer() -> Any:
    """A tokenizer that the trainers ask for, and nobody uses: the rows are ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), **special)


def settings_of(case: Mapping[str, Any], scale: Mapping[str, Any]) -> Any:
    """The section train_qlora of a case: the smoke recipe's, with what this benchmark changes."""
    from throughput_work import RANK, TARGETS

    from finetune.params import load_params
    from finetune.training_sections import TrainQlora

    smoke = load_params(HERE.parent / "recipes/smoke/params.yaml").train_qlora.model_dump()
    changes = {
        "quantization": {"format": "nf4", "double_quantization": case["double_quantization"]},
        "compute_dtype": scale["dtype"],
        "lora": {**smoke["lora"], "rank": RANK, "alpha": RANK, "dropout": 0.0, "target_modules": TARGETS},
        "epochs": 1,
        "batch_rows": scale["batch_rows"],
        "micro_batch_rows": scale["batch_rows"],
        "learning_rate": 1e-4,
        "gradient_checkpointing": case["checkpointing"],
        "attention": case["attention"],
        "liger_kernels": case["liger"],
        "deterministic": case.get("deterministic", False),
        **{f"{name}_every_steps": 10_000 for name in ("log", "evaluate", "save")},
    }
    return TrainQlora.model_validate({**smoke, **changes})


def ours(case: Mapping[str, Any], scale: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """This project's training loop on the random model; returns what else is to be known of the case."""
    from finetune.runtime import pin_cpu_code_path

    # As the stages do, before torch is imported.
    pin_cpu_code_path()
    import torch
    from datasets import Dataset
    from throughput_work import packed_rows
    from transformers.integrations.liger import apply_liger_kernel

    from finetune.log import setup_logging
    from finetune.training import loop
    from finetune.training.device import make_deterministic
    from finetune.training.method import make_trainable
    from finetune.training.vocabulary import Extension

    setup_logging("train")
    if case.get("deterministic", False):
        make_deterministic(0, torch.get_num_threads())
    attention = "sdpa"
    if case["attention"] == "varlen":
        # Here, so that a torch without the kernel costs these cases alone.
        from finetune.training.attention import VARLEN, register_varlen

        register_varlen()
        attention = VARLEN
    model = random_model(scale, attention, double_quantization=case["double_quantization"])
    if case["liger"]:
        apply_liger_kernel(model, LIGER)
    settings = settings_of(case, scale)
    model = make_trainable(model, settings, Extension((), 0))
    measured = start_clock(scale)
    loop.train(
        model,
        word_tokenizer(),
        Dataset.from_list(packed_rows(scale)),
        settings,
        seed=0,
        folder=folder,
        validate=lambda _model: 0.0,
        begin=lambda _step: None,
        seen=lambda _step, _tokens: None,
    )
    patched = [module for module in model.modules() if "liger" in getattr(module.forward, "__module__", "")]
    figures: dict[str, Any] = measured()
    return {**figures, "modules_with_liger_kernels": len(patched)}


def trl(case: Mapping[str, Any], scale: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain TRL on the same rows: all its defaults, or all but gradient checkpointing."""
    import torch
    from datasets import Dataset
    from plain_trl import train_with_defaults
    from throughput_work import packed_rows

    model = random_model(scale, "sdpa", double_quantization=False)
    changes = {} if case["checkpointing"] == "full" else {"gradient_checkpointing": False}
    if not torch.cuda.is_available():
        changes |= {"use_cpu": True, "bf16": False}
    measured = start_clock(scale)
    rows = Dataset.from_list(packed_rows(scale))
    train_with_defaults(model, word_tokenizer(), rows, folder, scale["batch_rows"], **changes)
    figures: dict[str, Any] = measured()
    return figures


def start_clock(scale: Mapping[str, Any]) -> Any:
    """Start the clock behind each optimizer step; the function returned gives its figures."""
    import torch
    from throughput_work import GIB, Clock, memory_figures
    from torch.optim.optimizer import register_optimizer_step_post_hook

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, scale["warmup_steps"], scale["steps"])
    hook = register_optimizer_step_post_hook(clock)
    loaded = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        loaded = {"model_gib": round(torch.cuda.memory_allocated(device) / GIB, 2)}

    def figures() -> dict[str, Any]:
        hook.remove()
        tokens = scale["row_tokens"] * scale["batch_rows"]
        return {**clock.figures(tokens), **loaded, **memory_figures(device)}

    return figures


def device_facts(_case: Mapping[str, Any], scale: Mapping[str, Any], _folder: Path) -> dict[str, Any]:
    """The device, the libraries, and the rate of a matrix product, on which the ceilings stand."""
    import torch
    from throughput_work import GIB, matmul_flops

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {"device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / GIB, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    rate = matmul_flops(device, getattr(torch, scale["dtype"]), scale["matmul_size"])
    return {**facts, "libraries": versions, "matmul_tflops": round(rate / 1e12, 3), "matmul_flops": rate}


def driver() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as fault:
        return f"unknown ({fault})"
    return shown.stdout.split("\n", maxsplit=1)[0].strip()


def main() -> None:
    """Run the case of the request and leave its figures beside it."""
    file = Path(sys.argv[1])
    request = json.loads(file.read_text(encoding="utf-8"))
    name = request["name"]
    work = device_facts if name == "device" else ours if name.startswith("ours") else trl
    with tempfile.TemporaryDirectory() as folder:
        result = work(request["case"], request["scale"], Path(folder))
    file.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
