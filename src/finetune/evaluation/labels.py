"""labelled prompts + answers -> accuracy and macro-F1 by normalised exact match."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.intervals import share_interval

# Around a label; inside one they may be part of it.
PUNCTUATION = string.punctuation + "«»“”‘’…" + string.whitespace


def normalize(text: str) -> str:
    """Case folded, white space collapsed, punctuation at both ends taken away."""
    return " ".join(text.casefold().split()).strip(PUNCTUATION)


def score_labels(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    """Accuracy with its interval, macro-F1, and how many answers are no label at all (`unknown`).

    `expected` of each prompt is {labels: [...]}, its `reference` the right one. Macro-F1 is the mean over the labels
    that occur, as right answer or as given one; an unknown answer is a miss for its right label.
    """
    given = [normalize(text) for _, text in pairs]
    right = [normalize(prompt["reference"]) for prompt, _ in pairs]
    known = {normalize(label) for prompt, _ in pairs for label in prompt["expected"]["labels"]}
    scores = []
    for label in sorted(known & {*given, *right}):
        hits = sum(one == other == label for one, other in zip(given, right, strict=True))
        scores.append(2 * hits / (given.count(label) + right.count(label)))
    correct = sum(one == other for one, other in zip(given, right, strict=True))
    return {
        "answers": len(pairs),
        "accuracy": correct / len(pairs),
        "accuracy_interval": share_interval(correct, len(pairs)),
        "macro_f1": sum(scores) / len(scores),
        "unknown": sum(text not in known for text in given),
    }
