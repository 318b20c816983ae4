"""A tokenizer -> what it costs per language, whether it loses text, and how many tokens each role marker takes."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from finetune.chat_template import ChatTemplate
from finetune.data.encoding.chat import Chat
from finetune.data.encoding.encoder import encode_text, make_encoder
from finetune.data.vocabulary.tokenizer_corpus import Learned, size_bytes
from finetune.data.vocabulary.word_counts import WordCounts
from finetune.errors import DataError

# Texts that byte-level tokenizers have been seen to lose or change.
HOSTILE_TEXTS = (
    "",
    " ",
    "   trois espaces   ",
    "\t\ttabs\t",
    "ligne\nligne\r\nligne\r",
    "\n\n\n",
    "\x00\x01\x7f",
    "é vs e\u0301",
    "\u00a0\u202f\u200b\ufeff",
    "L’été « déjà » coûte 12 345,67 €",
    "🧠👩🏽\u200d💻🇫🇷",
    "日本語と中文和한국어",
    "العربية עברית",
    "\u202eright to left",
    "'S 'LL it's IT'S",
    "1234567890 1e-06",
    "\U0010fffd\ufdd0",
    "<|unknown|> </s",
)
# What marks a role in the templates in use: <|user|>, <user>, </s>, [INST], <<SYS>>.
MARKER = re.compile(r"<<?/?[^\s<>]{1,60}>>?|\[/?[A-Z_]{2,40}\]")
PROBES = (("system", "user", "assistant", "user", "assistant"), ("user", "assistant"), ("user", "assistant", "tool"))


def check_round_trip(tokenizer: Tokenizer) -> None:
    """Raise DataError when decoding does not give back a hostile text, or its NFC where the normaliser is that."""
    nfc_only = _is_nfc_only(tokenizer.normalizer)
    for text in HOSTILE_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        back = tokenizer.decode(ids, skip_special_tokens=False)
        # `clean` writes NFC already, so a normaliser that does no more than that loses nothing of the data.
        if back != (unicodedata.normalize("NFC", text) if nfc_only else text):
            raise DataError(f"{text!r} comes back as {back!r}", "models/tokenizer", "choose another base tokenizer")


def check_markers(tokenizer: Tokenizer, markers: Iterable[str]) -> None:
    """Raise DataError unless each marker is one token."""
    for marker in markers:
        tokens = tokenizer.encode(marker, add_special_tokens=False).tokens
        if tokens != [marker]:
            raise DataError(f"role marker {marker} becomes {tokens}", "tokenizer.role_markers", "mend the marker")


def describe(chat: Chat) -> dict[str, Any]:
    """Size, special ids, and how many tokens each marker takes that the template writes."""
    counts = marker_tokens(chat.tokenizer, rendered_probes(chat.template))
    return {
        "vocab_size": chat.ids.vocab_size,
        "special_ids": {"bos": chat.ids.bos, "eos": chat.ids.eos, "pad": chat.ids.pad},
        # A list: a marker is no name that a metric may have.
        "markers": [{"marker": marker, "tokens": tokens} for marker, tokens in counts.items()],
    }


def training_numbers(words: WordCounts, learned: Learned) -> dict[str, Any]:
    """What a tokenizer was trained on; `obtained_shares` in bytes."""
    total_bytes = learned.bytes_by_source.total()
    return {
        "trained_on_records": learned.records,
        "trained_on_bytes": dict(sorted(learned.bytes_by_source.items())),
        "obtained_shares": {
            source: round(size / max(total_bytes, 1), 6) for source, size in sorted(learned.bytes_by_source.items())
        },
        "words": {
            "different": len(words.counts),
            "occurrences": int(words.counts.sum()) + words.forgotten_occurrences,
            "forgotten_words": words.forgotten_words,
            "forgotten_occurrences": words.forgotten_occurrences,
        },
    }


def rendered_probes(template: ChatTemplate) -> list[str]:
    """What the template makes of a few short conversations, without those whose roles it refuses."""
    texts = []
    for roles in PROBES:
        turns = [{"role": role, "content": "a"} for role in roles]
        try:
            texts.append(template.render(turns, add_generation_prompt=roles[-1] != "assistant").text)
        except TemplateError:
            # The other probes show its markers.
            continue
    return texts


def marker_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How many tokens each role marker in rendered texts takes: more than one where it is plain text to the model."""
    found = sorted({marker for text in texts for marker in MARKER.findall(text)})
    return {marker: token_count(tokenizer, marker) for marker in found}


def token_count(tokenizer: Tokenizer, text: str) -> int:
    """Number of tokens of a text by itself."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def fertility(held_out: Mapping[str, Iterable[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    """By language of the texts: records, tokens per word and per character, bytes per token."""
    encoder = make_encoder(tokenizer)
    report = {}
    for language, texts in sorted(held_out.items()):
        records = tokens = words = characters = encoded_bytes = 0
        for text in texts:
            records += 1
            tokens += len(encode_text(encoder, text).ids)
            words += len(text.split())
            characters += len(text)
            encoded_bytes += size_bytes(text)
        report[language] = {
            "records": records,
            "tokens_per_word": round(tokens / max(words, 1), 4),
            "tokens_per_character": round(tokens / max(characters, 1), 4),
            "bytes_per_token": round(encoded_bytes / max(tokens, 1), 4),
        }
    return report


def _is_nfc_only(normalizer: Any) -> bool:
    """Whether a normaliser of the tokenizers library, or the sequence that it is, does NFC and nothing else."""
    if normalizer is None:
        return False
    state = json.loads(normalizer.__getstate__())
    return all(step["type"] == "NFC" for step in state.get("normalizers", [state]))
