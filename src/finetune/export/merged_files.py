"""the base's configuration and the tokenizer's -> the files beside the merged weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig

from finetune.chat_template import (
    SERVING_TEMPLATE,
    TOKENIZER,
    TRAINING_TEMPLATE,
    read_template,
    special_tokens,
    turn_end,
)
from finetune.errors import ExportError
from finetune.export.weights import INDEX, Planned
from finetune.io import read_json, write_json
from finetune.log import logger

CONFIG, GENERATION, TOKENIZER_MODEL = "config.json", "generation_config.json", "tokenizer.model"
# Settings that only sampling reads: without do_sample, transformers 5.23 refuses to save them
# (generation/configuration_utils.py, validate).
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
# What says who wrote the file, and that it holds nothing but the config's own ids: no longer so.
WRITTEN_BY = ("transformers_version", "_from_model_config")
Files = Mapping[str, Mapping[str, Planned]]


def write_config(base: Path, target: Path, dtype: str, table_rows: int, *, tied: bool) -> None:
    """config.json: the base's, with the merged model's dtype, vocabulary and tables."""
    config = read_json(base / CONFIG)
    # It names code of a repository, which nothing here runs.
    config.pop("auto_map", None)
    changes = {"dtype": dtype, "tie_word_embeddings": tied, "vocab_size": table_rows}
    # Some architectures keep these in a part of their own, and read them there.
    for part in [config, *(value for key, value in config.items() if key.endswith("_config"))]:
        part.pop("torch_dtype", None)
        part |= {key: value for key, value in changes.items() if key in part}
    write_json(target / CONFIG, {**config, "dtype": dtype, "tie_word_embeddings": tied})


def write_index(base: Path, target: Path, files: Files) -> None:
    """The index of several files; a base of one file has none."""
    if (base / INDEX).is_file():
        tensors = [(name, shard, planned) for shard, each in files.items() for name, planned in each.items()]
        write_json(
            target / INDEX,
            {
                "metadata": {"total_size": sum(planned.size_bytes for _, _, planned in tensors)},
                "weight_map": {name: shard for name, shard, _ in tensors},
            },
        )


def write_tokenizer(base: Path, tokenizer: Path, target: Path, *left_out: str) -> None:
    """The tokenizer's files but for those of training, its ids in the configuration, and the base's tokenizer.model.

    llama.cpp's converter reads scores in a SentencePiece model that tokenizer.json does not hold, and transformers 5
    does not save it.
    """
    if (base / TOKENIZER_MODEL).is_file():
        shutil.copyfile(base / TOKENIZER_MODEL, target / TOKENIZER_MODEL)
    for file in sorted(tokenizer.iterdir()):
        if file.name not in (TRAINING_TEMPLATE, *left_out):
            shutil.copyfile(file, target / file.name)
    write_generation(base, tokenizer, target)


def write_generation(base: Path, tokenizer: Path, target: Path) -> None:
    """generation_config.json: the base's, with this tokenizer's ids, and config.json's pad token with them.

    Generation ends at the tokenizer's eos, at the token that ends an answer in the chat template, and where the base's
    did; never at pad, which fills up shorter rows of a batch: an answer would end where it begins. Settings that
    transformers refuses to save are left out, and named in the log. Raises ExportError when pad is eos.
    """
    words, names = Tokenizer.from_file(str(tokenizer / TOKENIZER)), special_tokens(tokenizer)
    ids = {name: words.token_to_id(names[name]) for name in ("bos_token", "eos_token", "pad_token") if name in names}
    pad, eos = ids.get("pad_token"), ids.get("eos_token")
    if pad is not None and pad == eos:
        raise ExportError(
            f"{names['pad_token']!r} is both the end and the padding: a batch would end its answers at once",
            tokenizer,
            "give tokenizer.pad_token another token",
        )
    held = read_json(base / GENERATION) if (base / GENERATION).is_file() else {}
    ends = [eos, _turn_end_id(tokenizer, words), *_as_list(held.get("eos_token_id"))]
    content: dict[str, Any] = {key: value for key, value in held.items() if key not in WRITTEN_BY}
    content |= {f"{name}_id": value for name, value in ids.items()}
    content["eos_token_id"] = _without(ends, pad)
    write_json(target / GENERATION, _saveable(content))
    config = read_json(target / CONFIG)
    if pad is not None:
        config["pad_token_id"] = pad
        if pad in _as_list(config.get("eos_token_id")):
            config["eos_token_id"] = _without([*_as_list(config["eos_token_id"]), eos], pad)
    write_json(target / CONFIG, config)


def _turn_end_id(tokenizer: Path, words: Tokenizer) -> int | None:
    end = turn_end(read_template(tokenizer, SERVING_TEMPLATE))
    added = {token.content: index for index, token in words.get_added_tokens_decoder().items()}
    return added.get(max((text for text in added if end.startswith(text)), key=len, default=""))


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])


def _without(ends: list[int | None], pad: int | None) -> list[int]:
    return [end for end in dict.fromkeys(ends) if end is not None and end != pad]


def _saveable(content: dict[str, Any]) -> dict[str, Any]:
    kept = content
    if content.get("do_sample") is not True:
        kept = {key: value for key, value in content.items() if key not in SAMPLING}
    try:
        GenerationConfig.from_dict(kept).validate(strict=True)
    except ValueError:
        kept = {key: value for key, value in content.items() if key.endswith("_token_id")}
    if left_out := sorted(set(content) - set(kept)):
        logger.info("%s: left out %s, which transformers refuses to save", GENERATION, ", ".join(left_out))
    return kept
