"""The mix of the training sources: how often each training row is used, so that the shares come out as asked.

Within a source, rows are ranked by the hash of their id. A source that is used in part gives the first of its ranking:
another source changes nothing about which, and new rows only slip in between. One that repeats gives whole rounds of
all its rows, then the first of its ranking once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.mixing.row_index import Integers, RowIndex
from finetune.errors import DataError
from finetune.mix_sections import Mix

PLOT_COLUMNS = ("source", "kind", "share")
SHARE_DECIMALS = 6


def quotas(mix: Mix, available: Mapping[str, int]) -> dict[str, int]:
    """Units (`mix.unit`) that each source gives, from the units that it has; they add up to the size of the mix.

    Each is within one unit of its share of the whole, but with `renormalise`, where an exhausted source gives all.
    Raises DataError when a source has no training row or the mix names other sources, and when `mix.total` is more
    than the policy can give.
    """
    shares = _exact_shares(mix)
    _check_sources(mix, available)
    if mix.on_exhausted == "renormalise":
        possible = largest = sum(available.values())
    else:
        possible = floor(min(available[source] * mix.max_repeats / share for source, share in shares.items()))
        # Where every row has been used, to repeat all sources would only be another epoch.
        largest = min(possible, floor(max(available[source] / share for source, share in shares.items())))
    total = largest if mix.total is None else mix.total
    if total > possible:
        raise _impossible(mix, available, shares, possible)
    if mix.on_exhausted == "renormalise":
        targets = _renormalised(shares, available, total)
    else:
        targets = {source: total * share for source, share in shares.items()}
    return _whole_numbers(targets, total)


def row_uses(index: RowIndex, mix: Mix | None) -> Integers:
    """How often each row is used, 0 for rows that are not in the mix or not in train; without a mix, train once.

    In tokens, a source ends with the row that brings it nearest to its quota: at most half a row off.
    Raises DataError as `quotas` does, and when a source's quota is less than its first row.
    """
    train = index.of_split("train")
    if mix is None:
        return train.astype(np.int32)
    rows = {name: np.flatnonzero(train & (index.sources == n)) for n, name in enumerate(index.source_names)}
    sizes = {name: _sizes(index, own, mix) for name, own in rows.items()}
    quota = quotas(mix, {name: int(own.sum()) for name, own in sizes.items()})
    uses = np.zeros(len(train), np.int32)
    for name, units in quota.items():
        own = rows[name]
        ranking = np.argsort(index.keys[own], kind="stable")
        rounds, rest = divmod(units, int(sizes[name].sum()))
        first = _nearest_prefix(sizes[name][ranking], rest)
        if rounds == 0 and first == 0:
            raise DataError(
                f"source {name} would give no row: its share of the mix is {units} {mix.unit}",
                "split.mix",
                "raise split.mix.total or this source's share, or add data to the source that has least for its share",
            )
        uses[own] = rounds
        uses[own[ranking[:first]]] += 1
    return uses


def mix_metrics(index: RowIndex, uses: Integers, mix: Mix | None) -> dict[str, Any]:
    """Per source: requested and obtained share (in `unit`), rows and tokens with repeats, distinct rows, repeats.

    `available_rows` are the source's rows in train; `max_repeats` and `mean_repeats` count how often a used row is
    used. Without a mix, the unit is tokens and the requested share null.
    """
    train = index.of_split("train")
    unit = "tokens" if mix is None else mix.unit
    sources: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(index.source_names):
        own = np.flatnonzero(train & (index.sources == number))
        used, distinct = uses[own].astype(np.int64), int((uses[own] > 0).sum())
        sources[name] = {
            "available_rows": len(own),
            "rows": int(used.sum()),
            "distinct_rows": distinct,
            "tokens": int((used * index.tokens[own]).sum()),
            "trained_tokens": int((used * index.trained_tokens[own]).sum()),
            "max_repeats": int(used.max(initial=0)),
            "mean_repeats": round(int(used.sum()) / distinct, 4) if distinct else 0.0,
        }
    totals = {key: sum(numbers[key] for numbers in sources.values()) for key in ("rows", "tokens", "trained_tokens")}
    for name, numbers in sources.items():
        numbers["requested_share"] = None if mix is None else mix.shares.get(name)
        numbers["obtained_share"] = round(numbers[unit] / totals[unit], SHARE_DECIMALS)
    return {"unit": unit, **totals, "sources": sources}


def mix_plot_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(source, `requested` or `obtained`, share) of the metrics of a mix."""
    return [
        (source, kind, numbers[f"{kind}_share"])
        for source, numbers in metrics["sources"].items()
        for kind in ("requested", "obtained")
        if numbers[f"{kind}_share"] is not None
    ]


def _exact_shares(mix: Mix) -> dict[str, Fraction]:
    """The shares as the decimals that params.yaml states, so that 0.1 of 1,000 is 100; they add up to exactly 1."""
    shares = {source: Fraction(str(share)) for source, share in mix.shares.items()}
    whole = sum(shares.values())
    return {source: share / whole for source, share in shares.items()}


def _check_sources(mix: Mix, available: Mapping[str, int]) -> None:
    if empty := sorted(source for source in mix.shares if not available.get(source)):
        raise DataError(
            f"no training row of {', '.join(empty)}, which the mix asks for",
            "split.mix.shares",
            "see metrics/clean.json and metrics/tokenize.json for what became of its rows, or take it out of the mix",
        )
    if unnamed := sorted(source for source, units in available.items() if units and source not in mix.shares):
        raise DataError(
            f"the mix says nothing of {', '.join(unnamed)}",
            "split.mix.shares",
            "give each training source a share, or take it out of fetch.sources",
        )


def _impossible(mix: Mix, available: Mapping[str, int], shares: Mapping[str, Fraction], possible: int) -> DataError:
    if mix.on_exhausted == "renormalise":
        has = ", ".join(f"{source} {available[source]}" for source in sorted(shares))
        return DataError(
            f"a mix of {mix.total} {mix.unit} is asked for, train has {possible} ({has})",
            "split.mix.total",
            f"lower it to {possible} at most, or set it to null",
        )
    least = min(sorted(shares), key=lambda source: available[source] / shares[source])
    needed = -(-(mix.total or 0) * shares[least] // available[least])
    return DataError(
        f"a mix of {mix.total} {mix.unit} is asked for; on_exhausted: {mix.on_exhausted} with max_repeats: "
        f"{mix.max_repeats} allows {possible}, as {least} has {available[least]}",
        "split.mix.total",
        f"lower it to {possible} at most, set it to null, or set on_exhausted: repeat and max_repeats: {needed}",
    )


def _renormalised(shares: Mapping[str, Fraction], available: Mapping[str, int], total: int) -> dict[str, Fraction]:
    """Each source its share of what the exhausted ones leave; those give all that they have."""
    targets: dict[str, Fraction] = {}
    while True:
        open_shares = {source: share for source, share in shares.items() if source not in targets}
        left = total - sum(targets.values())
        whole = sum(open_shares.values())
        wanted = {source: left * share / whole for source, share in open_shares.items()}
        exhausted = {source for source, units in wanted.items() if units > available[source]}
        if not exhausted:
            return {**targets, **wanted}
        targets |= {source: Fraction(available[source]) for source in exhausted}


def _whole_numbers(targets: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole units that add up to `total`: all rounded down, then one more for the largest remainders.

    None is rounded beyond what its source has, as that is a whole number itself.
    """
    numbers = {source: floor(target) for source, target in targets.items()}
    by_remainder = sorted(targets, key=lambda source: (numbers[source] - targets[source], source))
    for source in by_remainder[: total - sum(numbers.values())]:
        numbers[source] += 1
    return numbers


def _sizes(index: RowIndex, rows: npt.NDArray[np.int64], mix: Mix) -> npt.NDArray[np.int64]:
    return index.tokens[rows].astype(np.int64) if mix.unit == "tokens" else np.ones(len(rows), np.int64)


def _nearest_prefix(sizes: npt.NDArray[np.int64], units: int) -> int:
    """How many of the first sizes come nearest to `units`; of two equally near, the fewer."""
    sums = np.concatenate([[0], np.cumsum(sizes)])
    over = min(int(np.searchsorted(sums, units)), len(sizes))
    return over - 1 if over and units - int(sums[over - 1]) <= int(sums[over]) - units else over
