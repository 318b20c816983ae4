"""counts and sums by group -> 95 % confidence intervals, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
# The normal distribution's quantile at 1 - (1 - CONFIDENCE) / 2.
NORMAL_QUANTILE = 1.959963984540054
# So many indices are drawn at a time: 8 MiB of int64.
DRAWN_AT_ONCE = 1 << 20


def resampled_means(
    sums: Sequence[float], weights: Sequence[float], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """sum(sums) / sum(weights) over groups drawn with replacement, as many as there are, `resamples` times."""
    generator = np.random.default_rng(seed)
    values, sizes = np.array(sums, np.float64), np.array(weights, np.float64)
    groups, means = len(values), np.empty(resamples)
    step = max(1, DRAWN_AT_ONCE // groups)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, groups, (min(step, resamples - start), groups))
        means[start : start + len(drawn)] = values[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def ratio_interval(
    log_ratio_sums: Sequence[float], tokens: Sequence[int], resamples: int, seed: int
) -> dict[str, float]:
    """{low, high} of exp(sum(log_ratio_sums) / sum(tokens)), one of each for every group: a percentile bootstrap.

    Groups and not rows are drawn, as the rows of a conversation or a user are no independent evidence; both models are
    seen on the same draw. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    means = resampled_means(log_ratio_sums, tokens, resamples, seed)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": math.exp(low), "high": math.exp(high)}


def share_interval(hits: int, total: int) -> dict[str, float]:
    """{low, high} of a share by Wilson's formula: a bootstrap of 8 right answers out of 8 would be sure of 100 %.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    square = NORMAL_QUANTILE**2
    centre = hits + square / 2
    reach = NORMAL_QUANTILE * math.sqrt(hits * (total - hits) / total + square / 4)
    return {
        "low": 0.0 if hits == 0 else (centre - reach) / (total + square),
        "high": 1.0 if hits == total else (centre + reach) / (total + square),
    }
