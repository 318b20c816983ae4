from __future__ import annotations

from typing import Any

import pytest

from finetune.evaluation.style import divergence_bits, score_style, word_counts


def pair(opening: str, text: str, other: str = "") -> tuple[dict[str, Any], str]:
    return {"expected": {"opening": opening, "other": other}}, text


def test_figures_of_three_answers_counted_by_hand() -> None:
    figures = score_style(
        [
            pair("Le vélo", " est prêt ! #vélo", "Le train"),
            pair("VOIR", " https://a.fr 🚲", "Le bus"),
            pair("@ann", ": merci", ""),
        ]
    )
    distance = figures.pop("vocabulary_distance")
    # 24, 19 and 11 characters. Of the 46 that are no white space, punctuation: ! # : / / . @ :
    # Of the 37 letters, capitals: L V O I R.
    assert figures == {
        "answers": 3,
        "mean_characters": 54 / 3,
        "mean_words": (5 + 4 + 2) / 3,
        "punctuation_share": 8 / 46,
        "capital_share": 5 / 37,
        "emoji_share": 1 / 3,
        "hashtag_share": 1 / 3,
        "link_share": 1 / 3,
        "mention_share": 1 / 3,
        "distinct_share": 1.0,
    }
    assert 0.5 < distance < 1


def test_equal_answers_are_seen() -> None:
    assert score_style([pair("a", "b"), pair("", "ab"), pair("", "c")])["distinct_share"] == 2 / 3


@pytest.mark.parametrize(("text", "emoji"), [("☀", True), ("✨", True), ("🇫🇷", True), ("€ → 3 ©", False), ("", False)])
def test_what_an_emoji_is(text: str, emoji: bool) -> None:
    assert score_style([pair("", text)])["emoji_share"] == emoji


@pytest.mark.parametrize(("text", "hashtag", "mention"), [("#a @b", 1, 1), ("no.1#a b@c.fr", 0, 0), ("# @ 3", 0, 0)])
def test_hashtags_and_mentions_stand_alone(text: str, hashtag: int, mention: int) -> None:
    figures = score_style([pair("", text)])
    assert (figures["hashtag_share"], figures["mention_share"]) == (hashtag, mention)


def test_divergence_of_words_in_bits() -> None:
    one = word_counts(["Le vélo"])
    assert divergence_bits(one, word_counts(["le VÉLO le vélo"])) == 0.0
    assert divergence_bits(one, word_counts(["un train"])) == 1.0
    # Shares (1/2, 1/2, 0) and (1/2, 0, 1/2): half of each is shared.
    assert divergence_bits(one, word_counts(["le train"])) == pytest.approx(0.5, rel=1e-12)
    assert divergence_bits(one, word_counts(["le"])) == pytest.approx(0.31127812445913283, rel=1e-12)
    assert divergence_bits(one, word_counts(["..."])) == 1.0


def test_no_letters_are_no_division_by_zero() -> None:
    figures = score_style([pair("", "")])
    assert (figures["punctuation_share"], figures["capital_share"], figures["mean_characters"]) == (0, 0, 0)
