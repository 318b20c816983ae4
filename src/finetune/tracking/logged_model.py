"""what a run made -> the MLflow model of a version, by mode: its hashes, a server of its GGUF, or all its weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow

import finetune

# The chat template writes the first token itself; the tokenizer must not add a second one.
CHAT_PIPELINE = {"add_special_tokens": False, "do_sample": False, "max_new_tokens": 128}
UPLOAD_NEEDS = ("mlflow", "torch", "transformers")
# What finetune.tracking.serving_model imports, and nothing of the training.
SERVING_NEEDS = (
    "mlflow", "llama-cpp-python", "gguf", "jinja2", "numpy", "pyarrow", "pydantic", "ruamel.yaml", "tiktoken",
    "tokenizers", "tqdm"
)  # fmt: skip
SERVED_TAGS = ("served_gguf", "served_gguf_sha256", "modelfile_sha256", "content_sha256")


def log_reference(tags: Mapping[str, str]) -> str:
    """The id of a model that is nowhere but where DVC keeps it: only its hashes are registered."""
    return str(mlflow.create_external_model("merged", model_type="llm", tags=dict(tags)).model_id)


def log_serving(model_name: str, modelfile: Path, tags: Mapping[str, str]) -> str:
    """The id of a model of some 100 kB that finds the GGUF by its SHA-256 and answers through the served template."""
    # mlflow stores paths as they are given, that of the code whole: these say nothing of this machine.
    source = os.path.relpath(Path(finetune.__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        code = shutil.copy(f"{source}/tracking/serving_model.py", folder)
        logged = mlflow.pyfunc.log_model(
            name="served",
            python_model=code,
            code_paths=[source],
            artifacts={"modelfile": os.path.relpath(modelfile)},
            model_config={"name": model_name, **{key: tags[key] for key in SERVED_TAGS}},
            pip_requirements=_pinned(SERVING_NEEDS),
        )
    return str(logged.model_id)


def log_upload(model_name: str, merged: Path, tags: Mapping[str, str], card: str) -> str:
    """The id of a copy of the merged model, which MLflow can load by itself; `card`: its README.md."""
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", local_files_only=True, trust_remote_code=False)
    # mlflow looks this name up on the Hub and stores it: no path of this machine, and no name the Hub could have.
    model.name_or_path = f"{model_name}@{tags['content_sha256'][:12]}"
    logged = mlflow.transformers.log_model(
        {"model": model, "tokenizer": tokenizer},
        name="merged",
        task="llm/v1/chat",
        pip_requirements=_pinned(UPLOAD_NEEDS),
        model_config=CHAT_PIPELINE,
        model_card=ModelCard(card),
    )
    return str(logged.model_id)


def _pinned(packages: tuple[str, ...]) -> list[str]:
    return [f"{name}=={version(name).split('+')[0]}" for name in packages]
