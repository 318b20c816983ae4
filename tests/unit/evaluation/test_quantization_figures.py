from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from finetune.errors import DataError, ExportError
from finetune.evaluation.perplexity import Score
from finetune.evaluation.quantization import (
    PLOT_COLUMNS,
    Measured,
    check_budgets,
    context_tokens,
    measure_beside,
    measure_types,
    metrics,
    pareto_front,
    plot_rows,
    quantised_figures,
    sample_rows,
    table,
)
from finetune.sections import QuantizedType, QuantizeGguf

# Two letters of the tiny vocabulary, of which the last is trained: "a" after "b".
IDS, TRAINED = [4, 3], [False, True]
# At the one trained position: three quarters to the wrong token (2), one to the right one (3), and the other way round.
NEVER = -1e9
MERGED = torch.tensor([[NEVER, NEVER, math.log(0.75), math.log(0.25)], [0.0] * 4])
OTHER = torch.tensor([[NEVER, NEVER, math.log(0.25), math.log(0.75)], [0.0] * 4])


def figures(size: int, kl: float, ratio: float = 1.0, top1: float = 1.0) -> dict[str, float]:
    return {"size_bytes": size, "mean_kl": kl, "perplexity_ratio": ratio, "top1_agreement": top1}


def budget(name: str, ratio: float = 1.0, kl: float = 0.0, top1: float = 1.0) -> QuantizedType:
    return QuantizedType.model_validate(
        {"type": name, "max_perplexity_ratio": ratio, "max_mean_kl": kl, "min_top1_agreement": top1}
    )


def test_figures_keep_the_digits_that_hold_on_every_machine() -> None:
    measured = {"perplexity": 12.00006789, "bits_per_byte": 1.23456789, "mean_kl": 0.00012345, "top1_agreement": 1 / 3}
    assert quantised_figures(measured, 12.0) == {
        "perplexity": 12.0001,
        "perplexity_ratio": 1.00001,
        "bits_per_byte": 1.23457,
        "mean_kl": 0.000123,
        "top1_agreement": 1 / 3,
    }


def test_each_model_is_measured_beside_the_merged_one_in_one_pass(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked: list[list[int]] = []

    def reference(ids: list[int]) -> torch.Tensor:
        asked.append(ids)
        return MERGED

    rows = [{"input_ids": IDS, "trained": TRAINED, "source": "a"}] * 2
    rows.append({"input_ids": IDS, "trained": [True, False], "source": "a"})
    others = {"same": lambda _: MERGED, "other": lambda _: OTHER}
    words = tiny_tokenizer.backend_tokenizer
    whole, measured = measure_beside(reference, others, iter(rows), 2, words, "test")
    assert asked == [IDS, IDS]
    assert whole.summary()["perplexity"] == pytest.approx(4.0, rel=1e-6)
    # Each of two tokens is the letter a behind a space, at 2 bits: 4 bits in 4 bytes.
    assert (whole.summary()["bytes"], whole.summary()["bits_per_byte"]) == (4, pytest.approx(1.0, rel=1e-6))
    assert measured["other"]["bytes"] == 4
    assert (measured["same"]["mean_kl"], measured["same"]["top1_agreement"]) == (0.0, 1.0)
    assert measured["other"]["perplexity"] == pytest.approx(4 / 3, rel=1e-6)
    # 0.75 ln(0.75 / 0.25) + 0.25 ln(0.25 / 0.75) = ln(3) / 2
    assert measured["other"]["mean_kl"] == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert measured["other"]["top1_agreement"] == 0.0


def test_types_are_measured_group_by_group_and_answer_every_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    open_now: list[str] = []
    seen: list[tuple[list[str], int]] = []

    def continued(ids: list[int], most: int, ends: Collection[int]) -> list[int]:
        seen.append((list(open_now), most))
        assert set(ends) == {2, 6}
        return [3 + ids[-1] % 3, 6]

    @contextmanager
    def opened(group: Sequence[str]) -> Iterator[dict[str, Any]]:
        open_now.extend(group)
        yield {name: (lambda _: OTHER, continued) for name in group}
        open_now.clear()

    rows = [{"input_ids": IDS, "trained": TRAINED, "source": "a"}]
    prompts: list[dict[str, Any]] = [
        {"prompt_ids": [1, 4], "max_new_tokens": 7, "stop_ids": [2, 6]},
        {"prompt_ids": [1, 5], "max_new_tokens": 9, "stop_ids": [2, 6]},
        {"prompt_ids": [1, 4], "max_new_tokens": 7, "stop_ids": [2, 6]},
    ]
    groups = (opened(names) for names in (["F16", "Q8_0"], ["Q4_K_M"]))
    measured = measure_types(lambda _: MERGED, groups, lambda: iter(rows), prompts, tiny_tokenizer)
    assert measured.merged.tokens == 1
    assert {name: each["perplexity_ratio"] for name, each in measured.types.items()} == {
        "F16": 0.33333,
        "Q8_0": 0.33333,
        "Q4_K_M": 0.33333,
    }
    assert measured.answers == {name: ["b", "c", "b"] for name in ("F16", "Q8_0", "Q4_K_M")}
    assert seen == [(["F16", "Q8_0"], 7), (["F16", "Q8_0"], 9)] * 2 + [(["Q4_K_M"], 7), (["Q4_K_M"], 9)]


def test_metrics_hold_the_figures_of_text_file_and_tasks() -> None:
    merged = Score(nats=math.log(8), tokens=1, correct=1, text_bytes=3)
    prompts = [{"task": "samples", "source": "a", "prompt_ids": [1], "reference": "x", "expected": None}]
    measured = Measured(merged, {"F16": {"mean_kl": 0.0}}, {"F16": ["x"]})
    numbers = metrics(measured, prompts, {"F16": {"size_bytes": 5}})
    figures = {"perplexity": 8.0, "token_accuracy": 1.0, "tokens": 1, "bits_per_byte": 1.0, "bytes": 3}
    assert numbers == {
        "merged_perplexity": pytest.approx(8.0),
        "merged": pytest.approx(figures),
        "types": {"F16": {"mean_kl": 0.0, "size_bytes": 5, "tasks": {}}},
    }


def test_samples_show_the_answers_of_all_types(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [
        {"task": "style.a", "source": "a", "prompt_ids": [1, 5], "reference": "x"},
        {"task": "samples", "source": "b", "prompt_ids": [1, 4], "reference": "d e"},
    ]
    assert sample_rows(prompts, {"F16": ["no", "yes"], "Q8_0": ["no", "y"]}, tiny_tokenizer) == [
        {"source": "b", "prompt": "<s> b", "reference": "d e", "answers": {"F16": "yes", "Q8_0": "y"}}
    ]


def test_the_context_holds_rows_and_answers_as_far_as_the_positions_go() -> None:
    rows = [{"input_ids": [1] * length, "trained": [False] * (length - 1) + [True]} for length in (3, 9, 5)]
    rows.append({"input_ids": [1] * 20, "trained": [True] + [False] * 19})
    assert context_tokens(rows, [], 64) == 9
    assert context_tokens(rows, [{"prompt_ids": [1] * 8, "max_new_tokens": 7}], 64) == 15
    assert context_tokens(rows, [{"prompt_ids": [1] * 8, "max_new_tokens": 7}], 12) == 12
    with pytest.raises(DataError, match="no row has a trained token"):
        context_tokens(rows[3:], [{"prompt_ids": [1], "max_new_tokens": 7}], 12)


@pytest.mark.parametrize(
    ("types", "front"),
    [
        ({"a": figures(4, 0.0), "b": figures(2, 0.1), "c": figures(1, 0.2)}, {"a", "b", "c"}),
        ({"a": figures(4, 0.2), "b": figures(2, 0.1)}, {"b"}),
        ({"a": figures(4, 0.1), "b": figures(2, 0.1)}, {"b"}),
        ({"a": figures(2, 0.1), "b": figures(2, 0.2)}, {"a"}),
        ({"a": figures(2, 0.1), "b": figures(2, 0.1)}, {"a", "b"}),
    ],
)
def test_a_type_is_on_the_front_unless_another_is_as_small_and_as_near(
    types: dict[str, dict[str, float]], front: set[str]
) -> None:
    assert pareto_front(types) == front


def test_the_plot_has_a_line_for_each_type_in_its_order() -> None:
    types = {"Q8_0": figures(4, 0.2, 1.01, 0.9), "Q4_K_M": figures(2, 0.1, 1.02, 0.8)}
    assert PLOT_COLUMNS == ("type", "size_bytes", "perplexity_ratio", "mean_kl", "top1_agreement", "pareto")
    assert plot_rows(types) == [("Q8_0", 4, 1.01, 0.2, 0.9, "no"), ("Q4_K_M", 2, 1.02, 0.1, 0.8, "yes")]


def test_a_type_at_its_budget_passes() -> None:
    settings = QuantizeGguf(importance_matrix_rows=None, types=[budget("Q8_0", 1.01, 0.005, 0.97)])
    check_budgets(settings, {"Q8_0": figures(1, 0.005, 1.01, 0.97)})


def test_every_budget_that_is_exceeded_is_named_with_what_was_seen() -> None:
    entries = [budget("F16", 1.0, 0.0, 1.0), budget("Q8_0", 1.01, 0.005, 0.97), budget("Q4_K_M", 1.1, 0.1, 0.85)]
    settings = QuantizeGguf(importance_matrix_rows=None, types=entries)
    types = {
        "F16": figures(3, 0.0),
        "Q8_0": figures(2, 0.0051, 1.01, 0.97),
        "Q4_K_M": figures(1, 0.2, 1.1001, 0.8499),
    }
    with pytest.raises(ExportError) as caught:
        check_budgets(settings, types)
    assert caught.value.what.splitlines() == [
        "quantisation costs more than its budget:",
        "  Q8_0: mean_kl is 0.0051, max_mean_kl is 0.005",
        "  Q4_K_M: perplexity_ratio is 1.1001, max_perplexity_ratio is 1.1",
        "  Q4_K_M: mean_kl is 0.2, max_mean_kl is 0.1",
        "  Q4_K_M: top1_agreement is 0.8499, min_top1_agreement is 0.85",
    ]
    assert "metrics/quantize_gguf.json" in caught.value.remedy


def test_the_table_shows_cost_and_speed_of_each_type() -> None:
    types = {"F16": figures(3 << 20, 0.0), "Q8_0": figures(1 << 20, 0.000079, 1.00053, 0.99375)}
    speed = {
        "F16": {"prompt_tokens_per_s": 1234.5, "new_tokens_per_s": 99.9, "peak_rss_mib": 84.7},
        "Q8_0": {"prompt_tokens_per_s": 2000.0, "new_tokens_per_s": 150.0, "peak_rss_mib": None},
    }
    assert [line.split() for line in table(types, speed).splitlines()[1:]] == [
        ["F16", "3.0", "1.0000", "0.000000", "100.0%", "1234", "100", "85", "Pareto"],
        ["Q8_0", "1.0", "1.0005", "0.000079", "99.4%", "2000", "150", "?", "Pareto"],
    ]
