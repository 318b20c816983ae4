"""Clean texts -> a byte-level BPE tokenizer, and what it costs per language."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from finetune.data.record import Record
from finetune.data_sections import TrainTokenizer
from finetune.errors import DataError
from finetune.pretokenizer import LLAMA3_PATTERN

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


def train(texts: Iterable[str], params: TrainTokenizer) -> Tokenizer:
    """Train on `texts`; special tokens get ids 0, 1, 2, ... in the order pad, bos, eos, role markers.

    No post-processor: the chat template writes BOS, and nothing may write a second one.
    """
    tokenizer = Tokenizer(BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(LLAMA3_PATTERN), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=params.vocab_size,
        min_frequency=params.min_frequency,
        special_tokens=[params.pad_token, params.bos_token, params.eos_token, *params.role_markers],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


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


def fertility(records: Iterable[Record], tokenizer: Tokenizer) -> dict[str, Any]:
    """Per language: records, and tokens per word and per character of their text; unlabelled text is `unknown`."""
    sums: dict[str, list[int]] = {}
    for record in records:
        text = record.all_text()
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        counts = (1, tokens, len(re.findall(r"\S+", text)), len(text))
        before = sums.get(record.language or "unknown", [0, 0, 0, 0])
        sums[record.language or "unknown"] = [old + new for old, new in zip(before, counts, strict=True)]
    return {
        language: {
            "records": records_seen,
            "tokens_per_word": round(tokens / max(words, 1), 4),
            "tokens_per_character": round(tokens / max(characters, 1), 4),
        }
        for language, (records_seen, tokens, words, characters) in sorted(sums.items())
    }


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """What the tokenizer is trained on: every text of every record, without template or markers."""
    return (record.all_text() for record in records)


def _is_nfc_only(normalizer: Any) -> bool:
    """Whether a normaliser of the tokenizers library, or the sequence that it is, does NFC and nothing else."""
    if normalizer is None:
        return False
    state = json.loads(normalizer.__getstate__())
    return all(step["type"] == "NFC" for step in state.get("normalizers", [state]))
