"""what the runs of two versions recorded -> whether the newer one may be champion, and every reason in words.

Decides alone: nothing here asks MLflow or changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune.errors import DataError
from finetune.evaluation.intervals import ratio_interval

# Of percentile intervals over so many groups that claim 95 %, 92 % hold: tests/unit/test_registry_gate.py counts them.
MIN_GROUPS = 20
# Of the champion's scored text: on less than that, a comparison says little about what the champion was chosen for.
MIN_COMMON_SHARE = 0.5
RATIO = "evaluate.perplexity_ratio"
PARITY = "ollama_modelfile.parity"
TYPES = "quantize_gguf.types"
# Figure of a GGUF type -> its budget in params.yaml, its name in words, and whether it may not be above (else: below).
BUDGETS = {
    "perplexity_ratio": ("max_perplexity_ratio", "perplexity ×", True),
    "mean_kl": ("max_mean_kl", "mean KL", True),
    "top1_agreement": ("min_top1_agreement", "same first choice", False),
}


@dataclass(frozen=True)
class GroupScore:
    """Scored tokens of one group of test rows, their text in UTF-8 bytes, and their negative log-likelihood in nats."""

    tokens: int
    size_bytes: int
    nats: float


@dataclass(frozen=True)
class Evidence:
    """What a version's run recorded: metrics and params by dotted key, and its scores by the hash of a group's rows."""

    version: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    scores: Mapping[str, GroupScore]


@dataclass(frozen=True)
class Change:
    """How the perplexity of a text changed: the ratio, below 1 where it is lower, and its 95 % interval.

    `of`: which perplexity. Per byte where two tokenizers cut the text differently, else per token.
    `common_share`: which share of the older version's scored text both have in common.
    """

    of: str
    ratio: float
    low: float
    high: float
    groups: int
    common_share: float

    @property
    def better(self) -> bool:
        """Whether the whole interval is below 1."""
        return self.high < 1


@dataclass(frozen=True)
class Check:
    """One condition: whether it is met, what was seen, and what to type if it is not."""

    met: bool
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """Every condition in reading order, and by how much the version is better than what it was compared with."""

    checks: tuple[Check, ...]
    change: Change | None

    @property
    def passed(self) -> bool:
        """Whether every condition is met."""
        return all(check.met for check in self.checks)

    @property
    def faults(self) -> list[Check]:
        """The conditions that are not met."""
        return [check for check in self.checks if not check.met]


def judge(new: Evidence, champion: Evidence | None) -> Verdict:
    """The gate: served = trained, every GGUF type within its budget, and better than the champion beyond the interval.

    The first champion has to be better than its own base, as `evaluate` measured it.
    """
    change, better = _against_base(new) if champion is None else _against_champion(new, champion)
    return Verdict((better, *safety(new)), change)


def safety(new: Evidence) -> list[Check]:
    """The conditions that do not look at another version: they hold for a version that comes back, too."""
    return [_parity(new), *_budgets(new)]


def _parity(new: Evidence) -> Check:
    value = new.metrics.get(PARITY)
    if value is None:
        return _missing(new, PARITY)
    remedy = "mend the chat template (docs/templates.md), then `make repro`"
    return Check(
        value == 1.0, f"served = trained: {value:.2%} of the test chats have the token ids of training", remedy
    )


def _budgets(new: Evidence) -> Iterator[Check]:
    names = {key: value for key, value in new.params.items() if key.startswith(TYPES) and key.endswith(".type")}
    if not names:
        yield _missing(new, f"{TYPES}.0.type")
    for key, name in sorted(names.items()):
        yield _budget(new, key.removesuffix(".type"), name)


def _budget(new: Evidence, place: str, name: str) -> Check:
    """Every figure of one GGUF type beside its budget; `place`: the type's key in the params."""
    words, faults = [], []
    for figure, (budget, label, at_most) in BUDGETS.items():
        wanted, seen = f"{place}.{budget}", f"{TYPES}.{name}.{figure}"
        if wanted not in new.params or seen not in new.metrics:
            return _missing(new, wanted if wanted not in new.params else seen)
        value, limit = new.metrics[seen], float(new.params[wanted])
        words.append(f"{label} {value:.6g} (at {'most' if at_most else 'least'} {limit:.6g})")
        # Written so that a figure that is no number keeps no budget.
        if not (value <= limit if at_most else value >= limit):
            faults.append(words[-1])
    remedy = f"raise the budget in quantize_gguf.types or leave {name} out, then `make repro`"
    if faults:
        return Check(False, f"{name} exceeds its budget: {', '.join(faults)}", remedy)
    return Check(True, f"{name} within its budget: {', '.join(words)}")


def _missing(new: Evidence, key: str) -> Check:
    remedy = "`make register` in the clone that made it, or `make rebuild` it and register the result"
    return Check(False, f"version {new.version} has no figure {key}", remedy)


def _against_base(new: Evidence) -> tuple[Change | None, Check]:
    keys = (RATIO, f"{RATIO}_interval.low", f"{RATIO}_interval.high")
    if missing := [key for key in keys if key not in new.metrics]:
        return None, _missing(new, missing[0])
    ratio, low, high = (new.metrics[key] for key in keys)
    change = Change("perplexity", ratio, low, high, len(new.scores), 1.0)
    return change, _better(change, "its base (there is no champion yet)")


def _against_champion(new: Evidence, champion: Evidence) -> tuple[Change | None, Check]:
    for version in (new, champion):
        if not version.scores:
            return None, _missing(version, "evaluation/test_scores.csv")
    try:
        change = compare(new, champion)
    except DataError as fault:
        return None, Check(False, f"cannot be compared with version {champion.version}: {fault.what}", fault.remedy)
    return change, _better(change, f"version {champion.version} (champion)")


def compare(new: Evidence, old: Evidence) -> Change:
    """`new` over `old` on the groups of test rows that both have scored, paired: a bootstrap over groups.

    Both saw the same text, so only their difference varies: two intervals that overlap may hide a clear difference, and
    this one finds it. A group is common when its rows and the bytes of their scored text are equal. The split goes by a
    hash of the group, so what is a test group here and there was trained on by neither. Resamples and seed are those of
    the newer version's evaluation. Raises DataError when too little is common.
    """
    common = sorted(
        key for key in new.scores.keys() & old.scores.keys() if new.scores[key].size_bytes == old.scores[key].size_bytes
    )
    pairs = [(new.scores[key], old.scores[key]) for key in common]
    share = sum(then.size_bytes for _, then in pairs) / max(1, sum(each.size_bytes for each in old.scores.values()))
    if len(common) < MIN_GROUPS or share < MIN_COMMON_SHARE:
        raise DataError(
            f"their test sets have {len(common)} groups of rows in common, {share:.0%} of its scored text; "
            f"{MIN_GROUPS} groups and {MIN_COMMON_SHARE:.0%} are needed",
            "evaluation/test_scores.csv",
            f"train both on the same data, or take the alias champion from version {old.version} on the MLflow page: "
            "the next one is then judged as the first champion",
        )
    per_token = all(now.tokens == then.tokens for now, then in pairs)
    weights = [then.tokens if per_token else then.size_bytes for _, then in pairs]
    differences = [now.nats - then.nats for now, then in pairs]
    bounds = ratio_interval(differences, weights, _whole(new, "evaluate.bootstrap_resamples"), _whole(new, "seed"))
    ratio = math.exp(sum(differences) / sum(weights))
    of = "perplexity" if per_token else "perplexity per byte"
    return Change(of, ratio, bounds["low"], bounds["high"], len(pairs), share)


def _whole(version: Evidence, key: str) -> int:
    if key not in version.params:
        raise DataError(f"version {version.version} has no param {key}", key, "`make register` in its clone")
    return int(version.params[key])


def in_words(change: Change, other: str) -> str:
    """`perplexity x 0.931 of version 3, 95 % interval 0.912 to 0.951, on 70 groups of test rows`."""
    groups = f", on {change.groups} groups of test rows" if change.groups else ""
    part = f" ({change.common_share:.0%} of its test text)" if change.common_share < 1 else ""
    bounds = f"95 % interval {change.low:.4f} to {change.high:.4f}"
    return f"{change.of} × {change.ratio:.4f} of {other}, {bounds}{groups}{part}"


def _better(change: Change, other: str) -> Check:
    words = in_words(change, other)
    if change.better:
        return Check(True, f"better: {words}")
    what = "worse" if change.low > 1 else "not clearly better (the interval reaches 1)"
    remedy = "train a better one: `make repro` with other params or data registers it as challenger"
    return Check(False, f"{what}: {words}", remedy)


def read_scores(rows: Sequence[Mapping[str, str]]) -> dict[str, GroupScore]:
    """The rows of data/evaluation/test_scores.csv by the hash of a group's rows; raises DataError for other columns."""
    try:
        return {
            row["rows_sha256"]: GroupScore(int(row["tokens"]), int(row["bytes"]), float(row["tuned_nats"]))
            for row in rows
        }
    except (KeyError, ValueError) as fault:
        remedy = "`dvc repro --force --single-item evaluate`, then `make register`"
        raise DataError(f"not the scores of an evaluation: {fault}", "test_scores.csv", remedy) from None
