"""Figures -> the positions of a drawing, in percent of its width and height; the template draws them as inline SVG.

Positions are shares of the plot, not pixels: labels stay as large as the page's text on a phone and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetune.run_report.formats import UNITS, bare_ratio, count, exact, interval, percent, ratio, significant

MAX_LINE_POINTS = 120
# Count of metrics/clean.json -> its name and kind.
FUNNEL = {
    "rows_in": ("rows in", "in"),
    "quarantined": ("could not be read", "lost"),
    "dropped": ("dropped by a rule", "lost"),
    "duplicates": ("duplicates", "lost"),
    "near_duplicates": ("near-duplicates", "lost"),
    "kept": ("kept", "kept"),
}
Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A label at `position` percent of an axis."""

    position: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve: its name for the legend, its kind (a CSS class), and `x,y` pairs in percent from the top left."""

    name: str
    kind: str
    points: str


@dataclass(frozen=True)
class Dot:
    """A point with its label."""

    x: float
    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Plot:
    """Two axes with ticks, and what is drawn between them."""

    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Range:
    """One row of an interval chart, in percent of its width; no interval is `low = high = middle`."""

    label: str
    value: str
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Ranges:
    """Ratios on a logarithmic axis; `one` is where a ratio of 1 stands."""

    rows: tuple[Range, ...]
    ticks: tuple[Tick, ...]
    one: float


@dataclass(frozen=True)
class Bar:
    """One bar; `share` of the longest one, from 0 to 1."""

    label: str
    value: str
    share: float
    kind: str


def round_steps(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover low to high, about `wanted` of them."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [index * step for index in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def means(points: Sequence[Point], most: int = MAX_LINE_POINTS) -> tuple[int, list[Point]]:
    """How many points in a row make one, and the mean of each such run: at most `most` of them."""
    width = max(1, math.ceil(len(points) / most))
    runs = [points[start : start + width] for start in range(0, len(points), width)]
    return width, [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def loss_plot(curves: Mapping[int, Mapping[str, float]]) -> Plot:
    """Training and validation loss by optimizer step, from `finetune.lineage.read_curves`."""
    trained = [(float(step), row["train_loss"]) for step, row in sorted(curves.items()) if "train_loss" in row]
    held = [(float(step), row["validation_loss"]) for step, row in sorted(curves.items()) if "validation_loss" in row]
    width, smooth = means(trained)
    values = [y for _, y in [*smooth, *held]] or [0.0]
    x_steps, y_steps = round_steps(0, max(curves, default=1)), round_steps(min(values), max(values))
    x, y = _scale(x_steps), _scale(y_steps, flipped=True)
    name = "training" if width == 1 else f"training (mean of {width} steps)"
    return Plot(
        x_title="optimizer step",
        y_title="loss, nats a token",
        x_ticks=tuple(Tick(x(step), count(step)) for step in x_steps),
        y_ticks=tuple(Tick(y(step), exact(round(step, 6))) for step in y_steps),
        lines=(Line(name, "tuned", _points(smooth, x, y)), Line("validation", "held", _points(held, x, y))),
        dots=tuple(Dot(x(step), y(loss), "", "held") for step, loss in held),
    )


def curve_plot(curves: Mapping[int, Mapping[str, float]], figure: str, title: str) -> Plot:
    """One figure of the training log by optimizer step, from 0; `title` of its axis."""
    width, smooth = means([(float(step), row[figure]) for step, row in sorted(curves.items()) if figure in row])
    x_steps, y_steps = round_steps(0, max(curves, default=1)), round_steps(0, max((y for _, y in smooth), default=0.0))
    x, y = _scale(x_steps), _scale(y_steps, flipped=True)
    name = title if width == 1 else f"{title} (mean of {width} steps)"
    return Plot(
        x_title="optimizer step",
        y_title=title,
        x_ticks=tuple(Tick(x(step), count(step)) for step in x_steps),
        y_ticks=tuple(Tick(y(step), exact(float(f"{step:.6g}"))) for step in y_steps),
        lines=(Line(name, "tuned", _points(smooth, x, y)),),
        dots=(),
    )


def pareto_plot(types: Mapping[str, Mapping[str, float]], front: Iterable[str]) -> Plot:
    """Size against mean KL to the merged model, on a logarithmic axis with 0 at its foot; `front` is joined."""
    front = set(front)
    kl = {name: figures["mean_kl"] for name, figures in types.items()}
    positive = [value for value in kl.values() if value > 0] or [0.001]
    decades = list(range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1))
    largest = max(figures["size_bytes"] for figures in types.values())
    power = min(len(UNITS) - 1, int(math.log(max(largest, 1), 1024)))
    # Names stand on the right of their dots: the largest file leaves them a fifth of the width.
    steps = round_steps(0, 1.25 * largest / 1024**power)
    x = _scale([steps[0] * 1024**power, steps[-1] * 1024**power])
    # A lowest row of its own for what has no logarithm.
    height = _scale([decades[0] - 1.0, float(decades[-1])], flipped=True)

    def y(value: float) -> float:
        return height(math.log10(value)) if value > 0 else 100.0

    dots = tuple(
        Dot(x(types[name]["size_bytes"]), y(kl[name]), name, "tuned" if name in front else "base")
        for name in sorted(types)
    )
    joined = sorted((types[name]["size_bytes"], kl[name]) for name in front if name in types)
    return Plot(
        x_title="size of the file",
        y_title="mean KL to the merged model, nats a token",
        x_ticks=tuple(Tick(x(step * 1024**power), f"{step:g} {UNITS[power]}" if step else "0") for step in steps),
        y_ticks=(Tick(100.0, "0"), *(Tick(height(decade), significant(10.0**decade, 1)) for decade in decades)),
        lines=(Line("Pareto front: no other file is smaller and loses less", "tuned", _points(joined, x, y)),),
        dots=dots,
    )


def ratio_ranges(rows: Iterable[tuple[str, float, Mapping[str, float] | None]]) -> Ranges:
    """Rows (label, ratio, its 95 % interval or None) as dots on lines; the axis always holds 1."""
    rows = list(rows)
    seen = [1.0, *(value for _, value, _ in rows)]
    seen += [bound for _, _, bounds in rows if bounds for bound in (bounds["low"], bounds["high"])]
    ticks = log_steps(min(seen), max(seen))
    x = _scale([math.log(ticks[0]), math.log(ticks[-1])])

    def at(value: float) -> float:
        return x(math.log(value))

    drawn = tuple(
        Range(
            label,
            f"{ratio(value)}" + (f" ({interval(bounds, bare_ratio)})" if bounds else ""),
            at(bounds["low"] if bounds else value),
            at(value),
            at(bounds["high"] if bounds else value),
        )
        for label, value, bounds in rows
    )
    return Ranges(drawn, tuple(Tick(at(tick), f"× {exact(tick)}") for tick in ticks), at(1.0))


def log_steps(low: float, high: float) -> list[float]:
    """Values that a reader halves and doubles in the head: powers of two that cover low to high, both included."""
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    stride = max(1, math.ceil((last - first) / 6))
    first = math.floor(first / stride) * stride
    last = max(first + stride, math.ceil(last / stride) * stride)
    return [2.0**power for power in range(first, last + 1, stride)]


def funnel_bars(counts: Mapping[str, int | Mapping[str, int]]) -> list[Bar]:
    """What became of all rows, from the counts of FUNNEL in metrics/clean.json."""

    def total(key: str) -> int:
        value = counts[key]
        return sum(value.values()) if isinstance(value, Mapping) else value

    most = max(1, total("rows_in"))
    return [
        Bar(label, f"{count(total(key))} ({percent(total(key) / most)})", total(key) / most, kind)
        for key, (label, kind) in FUNNEL.items()
    ]


def _scale(steps: Sequence[float], *, flipped: bool = False) -> Callable[[float], float]:
    """The share in percent of the way from the first step to the last one; from the top if `flipped`."""
    low, high = steps[0], steps[-1]

    def position(value: float) -> float:
        share = 100 * (value - low) / (high - low)
        return round(100 - share if flipped else share, 2)

    return position


def _points(points: Iterable[Point], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(first):g},{y(second):g}" for first, second in points)
