from __future__ import annotations

from typing import Any

import pytest

from finetune.evaluation.labels import normalize, score_labels

LABELS = ["Positif", "Négatif", "Neutre"]


def pair(right: str, answer: str) -> tuple[dict[str, Any], str]:
    return {"expected": {"labels": LABELS}, "reference": right}, answer


def test_accuracy_and_macro_f1_counted_by_hand() -> None:
    figures = score_labels(
        [
            pair("Positif", "positif."),
            pair("Positif", "Négatif"),
            pair("Négatif", " NÉGATIF \n"),
            pair("Négatif", "je ne sais pas"),
        ]
    )
    # Positif: 2 * 1 / (1 + 2). Négatif: 2 * 1 / (2 + 2). Neutre occurs nowhere.
    assert figures == {
        "answers": 4,
        "accuracy": 0.5,
        "accuracy_interval": {"low": pytest.approx(0.15003898915214947), "high": pytest.approx(0.8499610108478506)},
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2, rel=1e-12),
        "unknown": 1,
    }


def test_a_label_that_was_only_given_counts_as_missed() -> None:
    assert score_labels([pair("Positif", "Positif"), pair("Positif", "Neutre")])["macro_f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "normal"), [("« Oui ! »", "oui"), ("A-B", "a-b"), ("two\n words ", "two words"), ("STRASSE", "strasse")]
)
def test_normal_form_of_an_answer(text: str, normal: str) -> None:
    assert normalize(text) == normal
    assert normalize("straße") == "strasse"
