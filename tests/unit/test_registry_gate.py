"""The gate between two versions: what it compares, what it asks for, and what it says of a figure that is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from promotion_versions import METRICS, PARAMS, evidence, scores, without

from finetune.errors import DataError
from finetune.evaluation.intervals import ratio_interval
from finetune.tracking.gate import MIN_GROUPS, compare, in_words, judge, read_scores

FAULTS: list[tuple[dict[str, float], str]] = [
    ({"ollama_modelfile.parity": 0.99}, "served = trained: 99.00% of the test chats have the token ids of training"),
    ({"ollama_modelfile.parity": float("nan")}, "served = trained: nan%"),
    (
        {"quantize_gguf.types.Q8_0.perplexity_ratio": 1.02},
        "Q8_0 exceeds its budget: perplexity × 1.02 (at most 1.01)",
    ),
    ({"quantize_gguf.types.Q8_0.mean_kl": float("nan")}, "Q8_0 exceeds its budget: mean KL nan (at most 0.005)"),
    (
        {"quantize_gguf.types.F16.top1_agreement": 0.9},
        "F16 exceeds its budget: same first choice 0.9 (at least 0.99)",
    ),
    (
        {"evaluate.perplexity_ratio_interval.high": 1.0},
        "not clearly better (the interval reaches 1): perplexity × 0.8000 of its base (there is no champion yet), "
        "95 % interval 0.7000 to 1.0000, on 30 groups of test rows",
    ),
]


def faults(*versions: Any) -> list[str]:
    new, champion = versions if len(versions) == 2 else (versions[0], None)
    return [check.text for check in judge(new, champion).faults]


def test_the_first_champion_is_better_than_its_base_served_as_trained_and_within_its_budgets() -> None:
    verdict = judge(evidence("1"), None)
    assert verdict.passed
    assert [check.text for check in verdict.checks] == [
        "better: perplexity × 0.8000 of its base (there is no champion yet), 95 % interval 0.7000 to 0.9000, on 30 "
        "groups of test rows",
        "served = trained: 100.00% of the test chats have the token ids of training",
        "F16 within its budget: perplexity × 1 (at most 1.005), mean KL 0 (at most 0.001), same first choice 1 (at "
        "least 0.99)",
        "Q8_0 within its budget: perplexity × 1.0005 (at most 1.01), mean KL 8e-05 (at most 0.005), same first choice "
        "0.99 (at least 0.97)",
    ]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_a_condition_that_is_not_met_refuses_and_says_so(changes: dict[str, float], said: str) -> None:
    (only,) = faults(evidence("1", metrics={**METRICS, **changes}))
    assert only.startswith(said)


@pytest.mark.parametrize("key", sorted(set(METRICS) - {"train_loss"}))
def test_a_metric_that_was_not_recorded_refuses_by_its_name(key: str) -> None:
    assert faults(evidence("7", metrics=without(METRICS, key))) == [f"version 7 has no figure {key}"]


@pytest.mark.parametrize("key", [key for key in PARAMS if key.endswith(("ratio", "kl", "agreement"))])
def test_a_budget_that_was_not_recorded_refuses_by_its_name(key: str) -> None:
    assert faults(evidence("7", params=without(PARAMS, key))) == [f"version 7 has no figure {key}"]


def test_a_version_without_any_type_refuses() -> None:
    params = {key: value for key, value in PARAMS.items() if not key.startswith("quantize")}
    assert faults(evidence("7", params=params)) == ["version 7 has no figure quantize_gguf.types.0.type"]


def test_a_clear_difference_is_found_where_both_intervals_against_the_base_overlap() -> None:
    old, new = evidence("1", groups=scores(2.0)), evidence("2", groups=scores(1.9))
    change = compare(new, old)
    # Each text is exactly 0.1 nats a token easier: exp(-0.1), whatever groups are drawn.
    assert [round(each, 6) for each in (change.low, change.ratio, change.high)] == [0.904837] * 3
    assert (change.of, change.groups, change.common_share) == ("perplexity", 30, 1.0)
    # Seen one by one, the groups differ by far more than the two models do.
    alone = [ratio_interval([each.nats for each in v.scores.values()], [10] * 30, 1000, 1) for v in (old, new)]
    assert alone[0]["low"] < alone[1]["high"]
    assert judge(new, old).passed
    assert faults(old, new) == [
        "worse: perplexity × 1.1052 of version 2 (champion), 95 % interval 1.1052 to 1.1052, on 30 groups of test rows"
    ]


def test_a_difference_within_chance_is_refused() -> None:
    noise = np.random.default_rng(3).normal(0, 0.3, 30)
    new = evidence("2", groups=scores(1.99, noise=noise))
    (only,) = faults(new, evidence("1", groups=scores(2.0)))
    assert only.startswith("not clearly better (the interval reaches 1): perplexity × ")


def test_equal_figures_are_no_improvement() -> None:
    (only,) = faults(evidence("2"), evidence("1"))
    assert "not clearly better" in only


def test_another_tokenizer_is_compared_by_byte_and_decides_the_same() -> None:
    old = evidence("1", groups=scores(2.0))
    new = evidence("2", groups=scores(1.9, tokens=7))
    change = compare(new, old)
    # 40 bytes of text a group: (7 * 1.9 - 10 * 2.0) / 40 nats a byte, but for the group's own share of it.
    assert change.of == "perplexity per byte"
    assert change.better
    assert "perplexity per byte × 0." in in_words(change, "x")


def test_only_texts_that_both_have_scored_are_compared() -> None:
    old = evidence("1", groups=scores(2.0, count=40))
    groups = scores(1.9, count=40)
    for number in range(10):
        del groups[f"rows {number}"]
    groups |= {f"new rows {number}": groups["rows 20"] for number in range(50)}
    change = compare(evidence("2", groups=groups), old)
    assert (change.groups, change.common_share) == (30, 0.75)
    assert "on 30 groups of test rows (75% of its test text)" in in_words(change, "version 1")


def test_rows_of_which_another_part_was_scored_are_not_the_same_text() -> None:
    groups = scores(1.9, size_bytes=41)
    (only,) = faults(evidence("2", groups=groups), evidence("1", groups=scores(2.0)))
    assert only == (
        "cannot be compared with version 1: their test sets have 0 groups of rows in common, 0% of its scored text; "
        "20 groups and 50% are needed"
    )


@pytest.mark.parametrize(("count", "kept", "said"), [(40, 19, "19 groups"), (50, 24, "48% of its scored text")])
def test_too_little_in_common_is_refused_with_the_way_out(count: int, kept: int, said: str) -> None:
    groups = {key: entry for key, entry in scores(1.9, count=count).items() if int(key.split()[1]) < kept}
    verdict = judge(evidence("2", groups=groups), evidence("1", groups=scores(2.0, count=count)))
    (only,) = verdict.faults
    assert said in only.text
    assert "take the alias champion from version 1" in only.remedy


@pytest.mark.parametrize(("new", "old", "named"), [({}, scores(2.0), "2"), (scores(2.0), {}, "1")])
def test_the_version_without_scores_is_named(new: Any, old: Any, named: str) -> None:
    assert faults(evidence("2", groups=new), evidence("1", groups=old)) == [
        f"version {named} has no figure evaluation/test_scores.csv"
    ]


@pytest.mark.parametrize("key", ["seed", "evaluate.bootstrap_resamples"])
def test_a_param_of_the_bootstrap_that_is_missing_is_named(key: str) -> None:
    (only,) = faults(evidence("2", params=without(PARAMS, key)), evidence("1"))
    assert only == f"cannot be compared with version 1: version 2 has no param {key}"


def test_the_same_versions_give_the_same_interval() -> None:
    noise = np.random.default_rng(3).normal(0, 0.3, 30)
    pair = evidence("2", groups=scores(1.99, noise=noise)), evidence("1", groups=scores(2.0))
    assert compare(*pair) == compare(*pair)


@pytest.mark.parametrize(
    "row", [{"rows_sha256": "a"}, {"rows_sha256": "a", "tokens": "x", "bytes": 1, "tuned_nats": 1}]
)
def test_a_file_of_other_columns_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not the scores of an evaluation"):
        read_scores([row])


def test_with_so_many_groups_an_interval_holds_what_it_claims_nearly_always() -> None:
    """Of intervals over MIN_GROUPS groups without any difference, how many hold the truth, which is 1."""
    generator = np.random.default_rng(0)
    held = {}
    for groups in (5, MIN_GROUPS):
        drawn = generator.normal(0, 1, (1000, groups))
        bounds = [ratio_interval(list(each), [1.0] * groups, 400, 1) for each in drawn]
        held[groups] = sum(each["low"] <= 1 <= each["high"] for each in bounds) / len(bounds)
    assert held[MIN_GROUPS] >= 0.91
    assert held[5] < 0.87
