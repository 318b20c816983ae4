"""Positions of drawings and texts of numbers, computed by hand."""

from __future__ import annotations

import pytest

from finetune.run_report.charts import (
    Bar,
    Dot,
    Range,
    Tick,
    curve_plot,
    funnel_bars,
    log_steps,
    loss_plot,
    means,
    pareto_plot,
    ratio_ranges,
    round_steps,
)
from finetune.run_report.formats import count, exact, interval, percent, ratio, shorten, significant, size, visible


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [
        (0, 365, [0, 100, 200, 300, 400]),
        (1.4, 4.3, [1, 2, 3, 4, 5]),
        (0, 4, [0, 1, 2, 3, 4]),
        (2.0, 2.0, [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]),
    ],
)
def test_axes_have_round_steps(low: float, high: float, steps: list[float]) -> None:
    assert round_steps(low, high) == pytest.approx(steps)


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [
        (0.45, 1.0, [0.25, 0.5, 1]),
        (1.0, 1.0, [1, 2]),
        (0.9, 1.1, [0.5, 1, 2]),
        (0.001, 3.0, [1 / 1024, 1 / 256, 1 / 64, 1 / 16, 0.25, 1, 4]),
    ],
)
def test_ratios_have_powers_of_two_that_hold_one(low: float, high: float, steps: list[float]) -> None:
    assert log_steps(low, high) == steps
    assert 1 in steps


def test_a_long_curve_becomes_means_of_equal_runs() -> None:
    assert means([(1, 2.0), (2, 4.0), (3, 9.0)], most=2) == (2, [(1.5, 3.0), (3.0, 9.0)])
    assert means([(1, 2.0)], most=2) == (1, [(1, 2.0)])
    assert len(means([(float(step), 1.0) for step in range(100_001)])[1]) <= 120


def test_a_loss_curve_lies_between_its_axes() -> None:
    plot = loss_plot({1: {"train_loss": 4.0}, 2: {"train_loss": 2.0, "validation_loss": 3.0}, 4: {"train_loss": 1.0}})
    assert plot.x_ticks == (Tick(0, "0"), Tick(25, "1"), Tick(50, "2"), Tick(75, "3"), Tick(100, "4"))
    assert plot.y_ticks == (Tick(100, "1"), Tick(66.67, "2"), Tick(33.33, "3"), Tick(0, "4"))
    assert [(line.name, line.points) for line in plot.lines] == [
        ("training", "25,0 50,66.67 100,100"),
        ("validation", "50,33.33"),
    ]
    assert plot.dots == (Dot(50, 33.33, "", "held"),)


def test_a_learning_rate_begins_at_zero_and_keeps_its_digits() -> None:
    curves = {1: {"learning_rate": 0.0}, 2: {"learning_rate": 0.0002}, 4: {"learning_rate": 0.0001}}
    plot = curve_plot(curves, "learning_rate", "learning rate")
    assert [tick.label for tick in plot.y_ticks] == ["0", "0.00005", "0.0001", "0.00015", "0.0002"]
    assert [(line.name, line.points) for line in plot.lines] == [("learning rate", "25,100 50,0 100,50")]
    assert [line.points for line in curve_plot({}, "gradient_norm", "gradient norm").lines] == [""]


def test_a_run_without_a_logged_step_has_empty_curves() -> None:
    assert [line.points for line in loss_plot({}).lines] == ["", ""]


def test_sizes_and_losses_of_files() -> None:
    types = {
        "F16": {"size_bytes": 3 * 1024**3, "mean_kl": 0.0},
        "Q8_0": {"size_bytes": 2 * 1024**3, "mean_kl": 0.001},
        "Q4_K_M": {"size_bytes": 1024**3, "mean_kl": 0.1},
        "Q3_K_M": {"size_bytes": 1024**3, "mean_kl": 0.01},
    }
    plot = pareto_plot(types, {"F16", "Q8_0", "Q3_K_M"})
    assert [tick.label for tick in plot.x_ticks] == ["0", "1 GiB", "2 GiB", "3 GiB", "4 GiB"]
    # A decade is a third of the height, and the lowest one stands for 0.
    assert plot.y_ticks == (Tick(100, "0"), Tick(66.67, "0.001"), Tick(33.33, "0.01"), Tick(0, "0.1"))
    assert plot.dots == (
        Dot(75, 100, "F16", "tuned"),
        Dot(25, 33.33, "Q3_K_M", "tuned"),
        Dot(25, 0, "Q4_K_M", "base"),
        Dot(50, 66.67, "Q8_0", "tuned"),
    )
    assert plot.lines[0].points == "25,33.33 50,66.67 75,100"


def test_one_file_without_a_loss_can_be_drawn() -> None:
    plot = pareto_plot({"F16": {"size_bytes": 10, "mean_kl": 0.0}}, {"F16"})
    assert [(dot.label, dot.y) for dot in plot.dots] == [("F16", 100)]


def test_ratios_are_dots_on_lines_and_one_is_marked() -> None:
    ranges = ratio_ranges([("all", 0.5, {"low": 0.25, "high": 1.0}), ("chat", 1.0, None)])
    assert ranges.rows == (
        Range("all", "×\u00a00.5000 (0.2500 to 1.0000)", 0, 50, 100),
        Range("chat", "×\u00a01.0000", 100, 100, 100),
    )
    assert (ranges.one, [tick.label for tick in ranges.ticks]) == (100, ["× 0.25", "× 0.5", "× 1"])


def test_the_funnel_begins_with_what_came_in() -> None:
    lost = {"dropped": {"a": 1, "b": 2}, "quarantined": {}, "duplicates": 1, "near_duplicates": 0}
    bars = funnel_bars({"rows_in": 8, "kept": 4, **lost})
    assert bars[0] == Bar("rows in", "8 (100.0\u00a0%)", 1.0, "in")
    assert bars[2] == Bar("dropped by a rule", "3 (37.5\u00a0%)", 0.375, "lost")
    assert bars[-1] == Bar("kept", "4 (50.0\u00a0%)", 0.5, "kept")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(1234567), "1,234,567"),
        (significant(0.0000793), "0.0000793"),
        (significant(65.649, 4), "65.65"),
        (significant(12345.6), "12,346"),
        (significant(0.0), "0"),
        (significant(-0.00012), "-0.000120"),
        (exact(0.0002), "0.0002"),
        (exact(2e-06), "0.000002"),
        (exact(100.0), "100"),
        (ratio(1.00159), "×\u00a01.0016"),
        (ratio(12345.6), "×\u00a012,346"),
        (percent(0.36105), "36.1\u00a0%"),
        (size(7), "7\u00a0bytes"),
        (size(1722624), "1.64\u00a0MiB"),
        (size(16 * 1024**3), "16.0\u00a0GiB"),
        (interval(None, percent), "not measured"),
        (interval({"low": 0.1, "high": 0.25}, percent), "10.0\u00a0% to 25.0\u00a0%"),
        (visible("a\x00\x1b\x7f\x85\ud800é\n\t🙂"), "a\u2400\u241b\u2421\ufffd\ufffdé\n\t🙂"),
        (shorten("abcdef", 4), "abcd… (2 more characters)"),
    ],
)
def test_numbers_and_texts(text: str, expected: str) -> None:
    assert text == expected
