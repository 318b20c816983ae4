from fractions import Fraction

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from finetune.data.mixing.quotas import mix_metrics, mix_plot_rows, quotas, row_uses
from finetune.data.mixing.row_index import RowIndex, text_hashes
from finetune.data.splits import SPLITS
from finetune.errors import DataError
from finetune.mix_sections import Mix


def mix_of(shares, *, unit="rows", total=None, on_exhausted="stop", max_repeats=1):
    return Mix(unit=unit, shares=shares, total=total, on_exhausted=on_exhausted, max_repeats=max_repeats)


def index_of(lengths, split="train"):
    """`lengths`: by source, the tokens of each of its rows; row 3 of source a has the id a3."""
    names = tuple(sorted(lengths))
    ids = [f"{name}{number}" for name in names for number in range(len(lengths[name]))]
    tokens = np.array([length for name in names for length in lengths[name]], np.int32)
    sources = np.repeat(np.arange(len(names), dtype=np.int32), [len(lengths[name]) for name in names])
    splits = np.full(len(ids), SPLITS.index(split), np.int8)
    keys = text_hashes(ids)
    return RowIndex(names, keys, keys, sources, splits, tokens, tokens - 1, np.zeros(len(ids), np.bool_))


HALVES = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        # 100 of a are 0.1 of 1,000: exactly, although 0.1 has no exact binary form.
        (mix_of({"a": 0.1, "b": 0.9}), {"a": 100, "b": 900}),
        (mix_of(HALVES), {"a": 100, "b": 100}),
        (mix_of(HALVES, total=60), {"a": 30, "b": 30}),
        (mix_of(HALVES, on_exhausted="repeat", max_repeats=3), {"a": 300, "b": 300}),
        # With 20 repeats allowed, it ends where all of b is used once.
        (mix_of(HALVES, on_exhausted="repeat", max_repeats=20), {"a": 1000, "b": 1000}),
        (mix_of(HALVES, total=3000, on_exhausted="repeat", max_repeats=15), {"a": 1500, "b": 1500}),
        (mix_of(HALVES, total=500, on_exhausted="renormalise"), {"a": 100, "b": 400}),
        (mix_of(HALVES, total=150, on_exhausted="renormalise"), {"a": 75, "b": 75}),
        (mix_of(HALVES, on_exhausted="renormalise"), {"a": 100, "b": 1000}),
        # 33.3 and 66.7 of 100.
        (mix_of({"a": 0.333, "b": 0.667}, total=100), {"a": 33, "b": 67}),
    ],
)
def test_quotas_of_100_rows_of_a_and_1000_of_b(mix, expected):
    assert quotas(mix, {"a": 100, "b": 1000}) == expected


def test_an_exhausted_source_leaves_its_share_to_the_others_in_proportion():
    mix = mix_of({"a": 0.5, "b": 0.3, "c": 0.2}, total=1000, on_exhausted="renormalise")
    # a gives 100; b and c share 900 as 3 to 2, of which b has but 400; c gives the rest.
    assert quotas(mix, {"a": 100, "b": 400, "c": 900}) == {"a": 100, "b": 400, "c": 500}


def test_a_mix_that_cannot_be_had_is_refused_and_says_what_can():
    with pytest.raises(DataError, match="no training row of b, which the mix asks for"):
        quotas(mix_of(HALVES), {"a": 100, "b": 0})
    with pytest.raises(DataError, match="no training row of b"):
        row_uses(index_of({"a": [5, 5]}), mix_of(HALVES))
    with pytest.raises(DataError, match="the mix says nothing of c"):
        quotas(mix_of(HALVES), {"a": 100, "b": 10, "c": 1})
    refused = (
        r"500 rows is asked for; on_exhausted: stop .* allows 200, as a has 100(.|\n)*lower it to 200 .*repeats: 3$"
    )
    with pytest.raises(DataError, match=refused):
        quotas(mix_of(HALVES, total=500), {"a": 100, "b": 1000})
    with pytest.raises(DataError, match=r"max_repeats: 2 allows 400, as a has 100(.|\n)*lower it to 400"):
        quotas(mix_of(HALVES, total=401, on_exhausted="repeat", max_repeats=2), {"a": 100, "b": 1000})
    with pytest.raises(DataError, match=r"1101 rows is asked for, train has 1100 \(a 100, b 1000\)"):
        quotas(mix_of(HALVES, total=1101, on_exhausted="renormalise"), {"a": 100, "b": 1000})
    with pytest.raises(DataError, match="source a would give no row: its share of the mix is 0 rows"):
        row_uses(index_of({"a": [5], "b": [5] * 9}), mix_of({"a": 0.1, "b": 0.9}, total=3))


def test_whole_rounds_then_the_first_of_the_ranking_by_the_hash_of_the_id():
    index = index_of({"a": [1] * 4, "b": [1] * 20})
    mix = mix_of(HALVES, total=20, on_exhausted="repeat", max_repeats=3)
    # Their SHA-256 begin with 4e, f5, 2c and f4: the ranking is a2, a0, a3, a1.
    assert row_uses(index, mix)[:4].tolist() == [3, 2, 3, 2]


def used_rows(lengths, mix, source):
    """Numbers of the rows of a source that are used."""
    index = index_of(lengths)
    own = row_uses(index, mix)[index.sources == sorted(lengths).index(source)]
    return set(np.flatnonzero(own).tolist())


def test_another_source_changes_nothing_about_which_rows_of_the_others_are_used():
    rows = [1] * 200
    alone = used_rows({"b": rows, "c": rows}, mix_of({"b": 0.3, "c": 0.7}, total=100), "b")
    other = used_rows({"a": rows, "b": rows, "c": rows}, mix_of({"a": 0.4, "b": 0.3, "c": 0.3}, total=100), "b")
    assert len(alone) == 30
    assert other == alone


def test_a_grown_source_keeps_the_first_of_its_earlier_choice():
    before = used_rows({"a": [1] * 200}, mix_of({"a": 1}, total=50), "a")
    after = used_rows({"a": [1] * 400}, mix_of({"a": 1}, total=50), "a")
    old_rows = {number for number in after if number < 200}
    assert len(old_rows) > 15
    assert old_rows < before
    # Twice the rows of twice the source: as good as all of the earlier ones.
    doubled = used_rows({"a": [1] * 400}, mix_of({"a": 1}, total=120), "a")
    assert before < doubled


def test_in_tokens_a_source_ends_with_the_row_nearest_to_its_quota():
    index = index_of({"a": [100] * 10, "b": [30] * 100})
    uses = row_uses(index, mix_of(HALVES, unit="tokens", total=500))
    metrics = mix_metrics(index, uses, mix_of(HALVES, unit="tokens", total=500))
    # 250 tokens of a are 2 rows or 3, equally near: the fewer; of b 8 rows are 240.
    assert metrics["sources"]["a"] == {
        "available_rows": 10,
        "rows": 2,
        "distinct_rows": 2,
        "tokens": 200,
        "trained_tokens": 198,
        "max_repeats": 1,
        "mean_repeats": 1.0,
        "requested_share": 0.5,
        "obtained_share": 0.454545,
    }
    assert (metrics["unit"], metrics["rows"], metrics["tokens"]) == ("tokens", 10, 440)
    assert mix_plot_rows(metrics)[:2] == [("a", "requested", 0.5), ("a", "obtained", 0.454545)]


def test_without_a_mix_each_training_row_is_used_once_and_no_share_is_requested():
    index = index_of({"a": [10] * 3, "b": [5] * 2})
    metrics = mix_metrics(index, row_uses(index, None), None)
    assert metrics["sources"]["a"]["requested_share"] is None
    assert mix_plot_rows(metrics) == [("a", "obtained", 0.75), ("b", "obtained", 0.25)]
    assert row_uses(index_of({"a": [1]}, split="test"), None).tolist() == [0]


@st.composite
def mixes(draw):
    """A mix, and by source the lengths of its rows."""
    names = "abcd"[: draw(st.integers(1, 4))]
    parts = {name: draw(st.integers(1, 100)) for name in names}
    shares = {name: parts[name] / sum(parts.values()) for name in names}
    shares = {"a": 1} if len(names) == 1 else shares
    policy = draw(st.sampled_from(["stop", "repeat", "renormalise"]))
    repeats = draw(st.integers(1, 4)) if policy == "repeat" else 1
    total = draw(st.one_of(st.none(), st.integers(1, 2000)))
    unit = draw(st.sampled_from(["rows", "tokens"]))
    lengths = {name: draw(st.lists(st.integers(1, 40), min_size=1, max_size=60)) for name in names}
    return mix_of(shares, unit=unit, total=total, on_exhausted=policy, max_repeats=repeats), lengths


@given(mixes())
def test_what_each_policy_promises(case):
    mix, lengths = case
    index = index_of(lengths)
    try:
        uses = row_uses(index, mix)
    except DataError as refused:
        reason = refused.what
        event("refused")
    else:
        reason = ""
    if reason:
        assert "asked for" in reason or "would give no row" in reason
        return
    metrics = mix_metrics(index, uses, mix)
    has = {name: len(own) if mix.unit == "rows" else sum(own) for name, own in lengths.items()}
    assert int(uses.max()) <= mix.max_repeats
    assert int(uses.min()) >= 0
    assert metrics["rows"] == int(uses.sum())
    quota = quotas(mix, has)
    if mix.total is not None:
        assert sum(quota.values()) == mix.total
    total = sum(quota.values())
    for name, numbers in metrics["sources"].items():
        # Within a source, uses differ by one at most, and no row is used again before all have been used.
        own = uses[index.sources == sorted(lengths).index(name)]
        assert int(own.max()) - int(own.min()) <= 1
        row = 1 if mix.unit == "rows" else max(lengths[name])
        assert abs(numbers[mix.unit] - quota[name]) * 2 <= (0 if mix.unit == "rows" else row)
        wanted = Fraction(str(mix.shares[name])) * total
        if mix.on_exhausted != "renormalise":
            assert abs(numbers[mix.unit] - wanted) <= 1 + row
        elif numbers[mix.unit] < has[name] - row:
            assert numbers[mix.unit] >= wanted - 1 - row


@pytest.mark.parametrize("unit", ["rows", "tokens"])
@pytest.mark.parametrize(("policy", "repeats"), [("stop", 1), ("repeat", 4)])
def test_shares_come_out_within_a_thousandth_where_there_are_enough_rows(unit, policy, repeats):
    rng = np.random.default_rng(0)
    rows = {"a": 3000, "b": 2000, "c": 900, "d": 400}
    lengths = {name: rng.lognormal(5.5, 0.8, count).astype(int) + 2 for name, count in rows.items()}
    mix = mix_of({"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}, unit=unit, on_exhausted=policy, max_repeats=repeats)
    index = index_of(lengths)
    metrics = mix_metrics(index, row_uses(index, mix), mix)
    obtained = {name: numbers["obtained_share"] for name, numbers in metrics["sources"].items()}
    assert obtained == pytest.approx(mix.shares, rel=0.001)
