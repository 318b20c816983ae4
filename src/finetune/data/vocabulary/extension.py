"""A base's tokenizer and the tokens of a recipe -> the extended tokenizer, and which embedding rows it takes.

`reserved` renames a token that the base keeps unused, `add` takes the next id, and `text` changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.chat_template import TOKENIZER, TOKENIZER_CONFIG, TRAINING_TEMPLATE, read_template, special_tokens
from finetune.data.vocabulary.tokenizer_files import base_rows
from finetune.data.vocabulary.tokenizer_report import rendered_probes, token_count
from finetune.data_sections import NewToken
from finetune.errors import DataError
from finetune.io import read_json, write_json

EXTENSION = "extension.json"
WHERE = "tokenizer.tokens"
SHOWN_TOKENS = 20
# Files of a base's tokenizer that name its special tokens; those that a base does not have are left out.
NAMING_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")


def extend_base(folder: Path, tokens: Sequence[NewToken], manifest: dict[str, Any]) -> dict[str, Any]:
    """Extend the tokenizer of a base that is in `folder` with its template; returns what each token costs.

    By text: its place, and how many tokens it is before and after.
    """
    before = Tokenizer.from_file(str(folder / TOKENIZER))
    rendered = rendered_probes(read_template(folder, TRAINING_TEMPLATE))
    extend(folder, tokens, rendered, base_rows(manifest))
    after = Tokenizer.from_file(str(folder / TOKENIZER))
    return {
        token.text: {
            "place": token.place,
            "tokens_before": token_count(before, token.text),
            "tokens": token_count(after, token.text),
        }
        for token in tokens
    }


def extend(folder: Path, tokens: Sequence[NewToken], rendered: Iterable[str], rows_before: int) -> None:
    """Extend the tokenizer in `folder`, and say in extension.json which rows are trained, if there are any.

    `rendered`: what the recipe's template writes. `rows_before`: embedding rows of the base, often more than it has
    tokens. Raises DataError for a token that is there already, and for a reserved one that is not there or in use.
    """
    content = read_json(folder / TOKENIZER)
    vocabulary = Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab(with_added_tokens=True)
    if there := sorted(token.text for token in tokens if token.text in vocabulary):
        raise DataError(f"{', '.join(there)}: the base has this token already", WHERE, "leave it out of the list")
    taken = {token.reserved: token.text for token in tokens if token.reserved is not None}
    _check_reserved(taken, content, folder, "\n".join(rendered))
    rows = {text: vocabulary[reserved] for reserved, text in taken.items()}
    next_id = max(vocabulary.values()) + 1
    for offset, token in enumerate(token for token in tokens if token.place == "add"):
        rows[token.text] = next_id + offset
    if not rows:
        return
    _rename(content, taken)
    _add(content, rows)
    write_json(folder / TOKENIZER, content)
    for name in NAMING_FILES:
        if (folder / name).is_file():
            write_json(folder / name, _replaced(read_json(folder / name), taken))
    extended = Tokenizer.from_file(str(folder / TOKENIZER))
    if wrong := sorted(text for text, row in rows.items() if extended.token_to_id(text) != row):
        raise DataError(f"{', '.join(wrong)} did not get its id", folder / TOKENIZER, "choose another reserved token")
    last = max(extended.get_vocab(with_added_tokens=True).values())
    numbers = {"trained_rows": rows, "rows_before": rows_before, "rows_after": max(rows_before, last + 1)}
    write_json(folder / EXTENSION, numbers)


def _check_reserved(taken: Mapping[str, str], content: Mapping[str, Any], folder: Path, rendered: str) -> None:
    # A token outside this list is one that merges make, or a byte.
    added = {token["content"] for token in content["added_tokens"]}
    used = set(special_tokens(folder).values())
    for reserved in taken:
        if reserved not in added:
            shown = ", ".join(sorted(added)[:SHOWN_TOKENS])
            raise DataError(
                f"{reserved} is none of the {len(added)} added tokens of the base, such as {shown}",
                WHERE,
                "name one that is reserved for such use, or use `add`",
            )
        if reserved in rendered or reserved in used:
            raise DataError(f"{reserved} is in use", WHERE, "name a token that the base and its template do not use")


def _rename(content: dict[str, Any], taken: Mapping[str, str]) -> None:
    """Give reserved tokens their new texts, with their old ids."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict):
        content["model"]["vocab"] = {taken.get(text, text): row for text, row in vocab.items()}
    else:
        content["model"]["vocab"] = [[taken.get(text, text), score] for text, score in vocab]
    for key in ("added_tokens", "post_processor"):
        content[key] = _replaced(content[key], taken)


def _add(content: dict[str, Any], rows: Mapping[str, int]) -> None:
    """List every new token as a special one, which the text is searched for before it is split into words."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    others = [token for token in content["added_tokens"] if token["content"] not in rows]
    own = [{"id": row, "content": text, **flags} for text, row in rows.items()]
    content["added_tokens"] = sorted([*others, *own], key=lambda token: int(token["id"]))


def _replaced(value: Any, taken: Mapping[str, str]) -> Any:
    """The JSON value with each text, and each name of an object, that is a reserved token replaced by its new text."""
    if isinstance(value, str):
        return taken.get(value, value)
    if isinstance(value, list):
        return [_replaced(item, taken) for item in value]
    if isinstance(value, dict):
        return {taken.get(name, name): _replaced(item, taken) for name, item in value.items()}
    return value
