from __future__ import annotations

from finetune.evaluation.perplexity import Score
from finetune.evaluation.report import perplexity_rows, quantised_figures, side_by_side


def test_figures_of_llama_cpp_keep_the_digits_that_hold_everywhere() -> None:
    measured = {"perplexity": 12.00006789, "mean_kl": 0.00012345, "top1_agreement": 1 / 3, "tokens": 1803}
    assert quantised_figures(measured, 12.0) == {
        "perplexity": 12.0001,
        "perplexity_ratio": 1.00001,
        "mean_kl": 0.000123,
        "top1_agreement": 1 / 3,
        "tokens": 1803,
    }


def test_base_and_tuned_stand_side_by_side_by_source_and_over_all_tokens() -> None:
    base = {"a": Score(nats=4.0, tokens=2, correct=0), "b": Score(nats=2.0, tokens=1, correct=1)}
    tuned = {"a": Score(nats=2.0, tokens=2, correct=1), "b": Score(nats=1.0, tokens=1, correct=1)}
    numbers = side_by_side(base, tuned)
    assert round(numbers["base"]["perplexity"], 6) == 7.389056
    assert round(numbers["perplexity_ratio"], 6) == 0.367879
    assert numbers["tuned"]["token_accuracy"] == 2 / 3
    assert [(source, model, round(value, 3)) for source, model, value in perplexity_rows(numbers)] == [
        ("a", "base", 7.389),
        ("a", "tuned", 2.718),
        ("b", "base", 7.389),
        ("b", "tuned", 2.718),
    ]
