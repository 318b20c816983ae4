"""answers of a source whose style is learned -> their length, signs, words and variety."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Pictographs, dingbats, transport, flags, and the older signs that are drawn as emoji. Arrows and digits are text.
EMOJI = re.compile("[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55\u231a\u231b\u23e9-\u23f3]")
HASHTAG, MENTION = re.compile(r"(?<!\w)#\w"), re.compile(r"(?<!\w)@\w")
LINK = re.compile(r"https?://|www\.", re.IGNORECASE)
WORD = re.compile(r"\w+")


def score_style(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    """Means over answers and shares; `vocabulary_distance` is to held-out texts of other rows.

    Each prompt ends with the held-out answer's first words (`expected.opening`), for prompts of a style are often all
    the same; the text measured is that opening with the model's continuation. `expected.other` is another row's
    answer: the held-out answers themselves have a distance to these, beside which a model's is read.
    punctuation_share: of characters that are no white space. capital_share: of letters. emoji, hashtag, link and
    mention shares, distinct_share: of answers.
    """
    texts = [prompt["expected"]["opening"] + text for prompt, text in pairs]
    characters = Counter(unicodedata.category(sign)[0] for text in texts for sign in text if not sign.isspace())
    letters = [sign for text in texts for sign in text if sign.isalpha()]
    return {
        "answers": len(texts),
        "mean_characters": _mean(len(text) for text in texts),
        "mean_words": _mean(len(WORD.findall(text)) for text in texts),
        "punctuation_share": characters["P"] / max(1, characters.total()),
        "capital_share": sum(letter.isupper() for letter in letters) / max(1, len(letters)),
        "emoji_share": _mean(EMOJI.search(text) is not None for text in texts),
        "hashtag_share": _mean(HASHTAG.search(text) is not None for text in texts),
        "link_share": _mean(LINK.search(text) is not None for text in texts),
        "mention_share": _mean(MENTION.search(text) is not None for text in texts),
        "distinct_share": len(set(texts)) / len(texts),
        "vocabulary_distance": divergence_bits(
            word_counts(texts), word_counts(prompt["expected"]["other"] for prompt, _ in pairs)
        ),
    }


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word stands in the texts, case folded; a word is a run of letters, digits and underscores."""
    return Counter(word for text in texts for word in WORD.findall(text.casefold()))


def divergence_bits(some: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Jensen-Shannon divergence of two word frequencies in bits (logarithm to base 2): 0 if equal, 1 if disjoint.

    Texts without a word share none: 1. J. Lin, Divergence measures based on the Shannon entropy (1991).
    """
    sizes = [sum(counts.values()) for counts in (some, others)]
    if 0 in sizes:
        return 1.0
    parts = []
    for word in {*some, *others}:
        shares = [counts.get(word, 0) / size for counts, size in zip((some, others), sizes, strict=True)]
        middle = sum(shares) / 2
        parts += [share / 2 * math.log2(share / middle) for share in shares if share]
    # The order of a set of texts differs between runs; an exact sum does not depend on it.
    return math.fsum(parts)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
