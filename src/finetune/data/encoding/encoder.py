"""Text -> token ids: by tiktoken where that provably gives the ids of the `tokenizers` library, else by that library.

tiktoken (https://github.com/openai/tiktoken) is about seven times as fast and keeps no offsets; a token's place follows
from the sizes of the tokens before it. Both split a text at its added tokens, split the rest into words by a pattern,
and merge the bytes of each word pair by pair. The preconditions below make each of the three steps equal. A normaliser
must be NFC, if there is one, and then a text that NFC changes goes the other way.

1. Added tokens: none trims or asks for word borders, and no two can overlap, so the order of the search is no matter.
2. Words: the pattern is one of `PATTERNS`, whose classes match the same code points in both engines (tested over all).
3. Merges. `tokenizers` merges the pair that is first in its list; tiktoken merges the pair whose joined bytes have the
   lowest rank, listed or not. Ranks are given in the order of the list, so the two differ only where tiktoken joins an
   unlisted pair (x, y). What happens inside the bytes xy before that does not depend on their surroundings, so merging
   xy alone by the list then stops at [x, y]. That is looked for in every token of the vocabulary, and must not occur.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import groupby, permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer
from tokenizers.models import BPE

from finetune.errors import DataError
from finetune.pretokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, byte_characters

# What ByteLevel(use_regex=True) of the tokenizers library splits by: GPT-2's pattern.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
BYTES = 256

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """Ids of a text, and where each token starts and ends, in bytes of its UTF-8 or in characters."""

    ids: Ids
    starts: Offsets
    ends: Offsets
    in_bytes: bool


@dataclass(frozen=True)
class FastPath:
    """tiktoken's encoding, whose ranks are mapped to ids (`ids`) and to sizes in bytes (`sizes`).

    `nfc`: whether the tokenizer normalises.
    """

    encoding: tiktoken.Encoding
    nfc: bool
    added: frozenset[str]
    ids: Ids
    sizes: Offsets


@dataclass(frozen=True)
class Encoder:
    """The tokenizer, and its fast path or the reason why it has none."""

    tokenizer: Tokenizer
    fast: FastPath | None
    refusal: str | None


class _Unproven(Exception):  # noqa: N818 (a reason, not an error: the other path is taken)
    """A precondition does not hold."""


def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder of a tokenizer; from then on the tokenizer neither truncates nor pads, which its file may ask for."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        return Encoder(tokenizer, _fast_path(tokenizer), None)
    except _Unproven as reason:
        return Encoder(tokenizer, None, str(reason))


def encode_text(encoder: Encoder, text: str) -> Tokens:
    """Ids of a text in which added tokens are spelled out, and no more; raises DataError when bytes get lost."""
    fast = encoder.fast
    if fast is None or (fast.nfc and not _surely_nfc(text)):
        return _encode_slowly(encoder.tokenizer, text)
    try:
        ranks = fast.encoding.encode_to_numpy(text, allowed_special=fast.added, disallowed_special=())
    except ValueError:
        # Its regular expressions give up on a million white space characters in a row.
        return _encode_slowly(encoder.tokenizer, text)
    sizes = fast.sizes[ranks]
    ends = np.cumsum(sizes)
    size_bytes = len(text) if text.isascii() else len(text.encode())
    if (int(ends[-1]) if len(ends) else 0) != size_bytes:
        raise DataError(
            f"the ids of a text of {size_bytes} bytes stand for {ends[-1:]} bytes", text[:80], "report this as a bug"
        )
    return Tokens(fast.ids[ranks], ends - sizes, ends, in_bytes=True)


def without_fast_path(encoder: Encoder) -> Encoder:
    """The same tokenizer by the tokenizers library alone: what the fast path is compared with."""
    return Encoder(encoder.tokenizer, None, "to compare")


def _encode_slowly(tokenizer: Tokenizer, text: str) -> Tokens:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1], in_bytes=False)


def _fast_path(tokenizer: Tokenizer) -> FastPath:
    state = json.loads(tokenizer.to_str())
    normalizer = state["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise _Unproven(f"its normalizer {normalizer['type']} may change the text")
    pattern = _pattern(state["pre_tokenizer"])
    added = _added_tokens(state["added_tokens"], tokenizer)
    merged = _merged_tokens(state["model"], set(added))
    alphabet = byte_characters()
    vocabulary = state["model"]["vocab"]
    if missing := [character for character in alphabet if character not in vocabulary]:
        raise _Unproven(f"{len(missing)} of the {BYTES} bytes are not in its vocabulary")
    value = {character: byte for byte, character in enumerate(alphabet)}
    if strange := [token for token in merged if not value.keys() >= set(token)]:
        raise _Unproven(f"its token {strange[0]!r} is not made of bytes")
    spelled = [bytes([byte]) for byte in range(BYTES)] + [bytes(value[c] for c in token) for token in merged]
    first_added = len(spelled)
    encoding = tiktoken.Encoding(
        "models/tokenizer",
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(spelled)},
        special_tokens={token: first_added + index for index, token in enumerate(added)},
    )
    ids = [vocabulary[token] for token in (*alphabet, *merged)] + list(added.values())
    sizes = [len(token) for token in spelled] + [len(token.encode()) for token in added]
    return FastPath(
        encoding, normalizer is not None, frozenset(added), np.array(ids, np.int32), np.array(sizes, np.int64)
    )


def _surely_nfc(text: str) -> bool:
    """Whether NFC leaves the text as it is, by this Python's Unicode and by any later one."""
    return text.isascii() or (unicodedata.is_normalized("NFC", text) and _unassigned().search(text) is None)


@cache
def _unassigned() -> re.Pattern[str]:
    """The code points that this Python's Unicode does not know, so that a later one may compose or order them."""
    unknown = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Cn"]
    starts = [code for code, before in zip(unknown, [-1, *unknown], strict=False) if code != before + 1]
    ends = [code for code, after in zip(unknown, [*unknown[1:], -1], strict=True) if code + 1 != after]
    return re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True)) + "]")


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or steps[-1]["add_prefix_space"]:
        raise _Unproven(f"its pre-tokenizer is not a known byte-level one: {', '.join(kinds) or 'none'}")
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return GPT2_PATTERN
    pattern = steps[0].get("pattern", {}).get("Regex")
    isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    if pattern not in PATTERNS or not isolated or steps[-1]["use_regex"]:
        raise _Unproven(f"its words are split by a pattern that was not compared: {pattern}")
    return str(pattern)


def _added_tokens(added: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, int]:
    if tokenizer.encode_special_tokens:
        raise _Unproven("it is set to read special tokens as text")
    for token in added:
        content = token["content"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not content or not _surely_nfc(content):
            raise _Unproven(f"its added token {content!r} trims, is not NFC, or asks for word borders")
    texts = {token["content"]: token["id"] for token in added}
    for first, second in permutations(texts, 2):
        if _overlap(first, second):
            raise _Unproven(f"its added tokens {first!r} and {second!r} can overlap")
    return texts


def _overlap(first: str, second: str) -> bool:
    """Whether `second` may begin inside `first`."""
    places = (at for at, character in enumerate(first) if character == second[0])
    return any(first.startswith(second[: len(first) - at], at) for at in places)


def _merged_tokens(model: dict[str, Any], added: set[str]) -> list[str]:
    """The tokens of several bytes, in the order of the merges, once the third precondition is shown."""
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[key] for key in plain):
        raise _Unproven(f"its model is not a plain BPE: {model['type']}, {[model[key] for key in plain]}")
    pairs = [tuple(pair) for pair in model["merges"]]
    merged = [token for token, _ in groupby(first + second for first, second in pairs)]
    if len(set(merged)) < len(merged):
        raise _Unproven("the merges of one of its tokens are apart, so that its rank is not known")
    whole_words = bool(model["ignore_merges"])
    by_list = BPE(model["vocab"], pairs)
    for token in merged:
        parts = len(by_list.tokenize(token))
        # Words that are tokens are looked up before any merge by tiktoken, as by tokenizers with `ignore_merges`.
        if parts == 2 or (parts > 1 and not whole_words):
            raise _Unproven(f"its token {token!r} is not what its own merges make")
    return merged + _words_without_merge(model["vocab"], merged, added) if whole_words else merged


def _words_without_merge(vocabulary: dict[str, int], merged: list[str], added: set[str]) -> list[str]:
    """The tokens that no merge makes, which `ignore_merges` takes as whole words; no two tokens may join to one."""
    alphabet = byte_characters()
    words = sorted(vocabulary.keys() - set(merged) - set(alphabet) - added)
    known = {*merged, *alphabet, *words}
    for word in words:
        if any(word[:at] in known and word[at:] in known for at in range(1, len(word))):
            raise _Unproven(f"two of its tokens join to {word!r}, and no merge says so")
    return words
