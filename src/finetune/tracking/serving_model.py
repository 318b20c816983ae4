"""A registered version in mode `serving` -> OpenAI's chat completions, by `mlflow models serve` or `mlflow.pyfunc`.

MLflow copies this file and the package into the version and runs it when the version is loaded: code, and no pickle.
The version holds the Modelfile; the GGUF is looked for where it may lie, and taken only if its SHA-256 is the
registered one. https://mlflow.org/docs/latest/ml/model/models-from-code/
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from finetune.errors import DataError, FinetuneError, TrackingError
from finetune.io import sha256_file
from finetune.serving.calls import with_tool_calls
from finetune.serving.requests import RequestError, offered_tools, read_request, tool_names
from finetune.serving.served import ServedModel, open_served
from finetune.tracking.client import PATIENT, connect, refusals

MODEL_DIR = "FINETUNE_MODEL_DIR"
HERE = Path("models/gguf")


def find_gguf(config: Mapping[str, str]) -> Path:
    """The version's GGUF, by name and SHA-256: in the folder FINETUNE_MODEL_DIR, else in models/gguf of this folder.

    Where it is in neither, `finetune.pull` fetches the version into FINETUNE_MODEL_DIR, or below models/pulled: from
    DVC's cache or remote. Raises FinetuneError where that cannot be done, or FINETUNE_MODEL_DIR holds another file.
    """
    given = Path(os.environ[MODEL_DIR]) if os.environ.get(MODEL_DIR) else None
    file = (given or HERE) / config["served_gguf"]
    if file.is_file() and sha256_file(file) == config["served_gguf_sha256"]:
        return file
    if given is not None and file.is_file():
        what = f"this is not the registered file, whose SHA-256 is {config['served_gguf_sha256']}"
        raise DataError(what, file, f"`unset {MODEL_DIR}`, or let it name a folder that is new: the file is fetched")
    from finetune.pull import pull

    same = f"name = '{config['name']}' and tags.content_sha256 = '{config['content_sha256']}'"
    with refusals("python -m mlflow models serve ..."):
        known = connect(PATIENT).search_model_versions(same)
    if not known:
        what = f"the registry has no version of {config['name']} with this content any more"
        raise TrackingError(what, config["content_sha256"], "`make register` in the clone that made it")
    _, folder = pull(f"{config['name']}/{known[0].version}", given, "", "")
    fetched = folder / config["served_gguf"]
    if sha256_file(fetched) != config["served_gguf_sha256"]:
        raise DataError("the tags of this version and the model in it name different files", fetched, "`make register`")
    return fetched


def open_beside(modelfile: bytes, gguf: Path) -> ServedModel:
    """Open a Modelfile whose FROM, ../gguf/NAME, is not there, with this GGUF in the place that it names."""
    with tempfile.TemporaryDirectory() as folder:
        file, named = Path(folder) / "ollama/Modelfile", Path(folder) / "gguf" / gguf.name
        for path in (file, named):
            path.parent.mkdir()
        file.write_bytes(modelfile)
        named.symlink_to(gguf.absolute())
        return open_served(file, weights=True)


class GgufModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers `{"messages": [...], "max_tokens": ..., "tools": [...]}` as `make serve` does, without streams."""

    def load_context(self, context: Any) -> None:
        """Find the GGUF, verify it and open it with the version's Modelfile."""
        config = context.model_config
        self.name = config["name"]
        self.lock = threading.Lock()
        modelfile = Path(context.artifacts["modelfile"])
        if sha256_file(modelfile) != config["modelfile_sha256"]:
            raise DataError("the Modelfile is not the registered one", modelfile, "`make register`, then load it again")
        self.served = open_beside(modelfile.read_bytes(), find_gguf(config))

    # Without types: mlflow would make a schema of them.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """One completion, in a list as MLflow's own chat models answer; what cannot be answered is refused with 400."""
        try:
            return [self._complete(model_input)]
        except (RequestError, FinetuneError) as fault:
            raise MlflowException.invalid_parameter_value(str(fault)) from None

    def _complete(self, body: Any) -> dict[str, Any]:
        if not isinstance(body, dict) or "messages" not in body:
            raise RequestError('the body is {"messages": [...]}', "messages")
        if body.get("stream"):
            raise RequestError("MLflow's server has no streams: `make serve` has", "stream")
        given = {key: value for key, value in body.items() if value is not None}
        asked, tools = read_request(given, self.served.modelfile, self.name), offered_tools(given)
        _, ids = self.served.prompt(given["messages"], tools)
        self.served.check_room(ids)
        stops = [asked.stop] if isinstance(asked.stop, str) else (asked.stop or [])
        # llama.cpp has one context; MLflow's server asks from several threads.
        with self.lock:
            made: Any = self.served.llama.create_completion(
                ids,
                max_tokens=asked.max_tokens or self.served.modelfile.num_ctx - len(ids),
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                min_p=asked.min_p,
                repeat_penalty=asked.repeat_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                seed=asked.seed,
                stop=[*self.served.modelfile.stops, *stops],
            )
        choice = made["choices"][0]
        message = {"role": "assistant", "content": choice["text"]}
        completion = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": choice["finish_reason"]}],
            "usage": made["usage"],
        }
        return with_tool_calls(completion, tool_names(tools))


mlflow.models.set_model(GgufModel())
