from __future__ import annotations

import math

import numpy as np
import pytest

from finetune.evaluation.intervals import ratio_interval, resampled_means, share_interval


def test_two_groups_can_be_drawn_in_three_ways() -> None:
    means = resampled_means([-1.0, -3.0], [1, 3], 1000, 7)
    # Both of the first: -2 / 2. One of each: -4 / 4. Both of the second: -6 / 6.
    assert set(means.tolist()) == {-1.0}
    means = resampled_means([-1.0, -1.0], [1, 3], 1000, 7)
    assert sorted(set(means.tolist())) == [-1.0, -0.5, -1 / 3]
    assert 400 < (means == -0.5).sum() < 600


def test_the_interval_is_the_same_number_in_every_run() -> None:
    sums, tokens = [-4.0, -1.0, -2.5, 0.5, -3.0], [5, 3, 4, 2, 6]
    interval = ratio_interval(sums, tokens, 1000, 42)
    assert interval == {"low": 0.4965853037914095, "high": 0.8464817248906141}
    assert interval["low"] < math.exp(-10 / 20) < interval["high"]
    assert ratio_interval(sums, tokens, 1000, 43) != interval


def test_the_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, tokens = [float(value) for value in range(10)], [1] * 10
    at_once = resampled_means(sums, tokens, 500, 1)
    monkeypatch.setattr("finetune.evaluation.intervals.DRAWN_AT_ONCE", 70)
    assert resampled_means(sums, tokens, 500, 1).tolist() == at_once.tolist()


def test_the_interval_holds_the_true_ratio_in_about_95_of_100_repetitions() -> None:
    generator = np.random.default_rng(2024)
    truth, repetitions, held = math.exp(-0.5), 500, 0
    for repetition in range(repetitions):
        tokens = generator.integers(5, 60, 80)
        # Groups differ more than chance between their tokens would have it, as conversations do.
        sums = tokens * generator.normal(-0.5, 0.4, 80) + np.sqrt(tokens) * generator.normal(0, 0.5, 80)
        interval = ratio_interval(sums.tolist(), tokens.tolist(), 300, repetition)
        held += interval["low"] <= truth <= interval["high"]
    assert 0.92 <= held / repetitions <= 0.98


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (0, 8, 0.0, 0.3244),
        (8, 8, 0.6756, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (300, 400, 0.7053, 0.7899),
    ],
)
def test_wilsons_interval_of_a_share(hits: int, total: int, low: float, high: float) -> None:
    interval = share_interval(hits, total)
    assert (round(interval["low"], 4), round(interval["high"], 4)) == (low, high)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_wilsons_interval_holds_the_true_share_about_95_times_in_100(share: float) -> None:
    total, covered = 60, 0.0
    for hits in range(total + 1):
        interval = share_interval(hits, total)
        if interval["low"] <= share <= interval["high"]:
            covered += math.comb(total, hits) * share**hits * (1 - share) ** (total - hits)
    assert 0.92 <= covered <= 0.98
