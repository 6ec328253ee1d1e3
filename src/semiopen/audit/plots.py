"""Plots as inline SVG that takes its colours from the page, so that one drawing serves light and dark.

The x axis is logarithmic in tokens, with the zero budget on its own at the left. Colours, shapes and dashes each tell
the series apart, so that none of them alone has to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

Axis = Callable[[float], float]  # a value's place, px

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 46  # margins, px
_START = 34  # from the zero budget to the smallest other, px
_DODGE = 3.0  # px between series at one budget
_BETWEEN_LABELS = 42  # px


@dataclass(frozen=True)
class Series:
    """A line through (tokens, value, low, high); `colour` is a class of the page, 0 to 2."""

    name: str
    points: tuple[tuple[int, float, float, float], ...]
    colour: int
    square: bool
    dashed: bool


@dataclass(frozen=True)
class Mark:
    """A point by itself."""

    name: str
    tokens: int
    value: float
    colour: int


@dataclass(frozen=True)
class Plot:
    """What to draw. `lines` are (value, words) across the plot; `top` is the highest value of the y axis."""

    id: str
    title: str
    description: str
    percent: bool
    top: float
    series: tuple[Series, ...]
    marks: tuple[Mark, ...]
    lines: tuple[tuple[float, str], ...]


def draw(plot: Plot, width: int) -> str:
    """The drawing at one width in px, at which its text has the size of the page's."""
    height = 380 if width > 500 else 330
    floor, ceiling = height - _BOTTOM, _TOP
    asked = sorted({p[0] for s in plot.series for p in s.points if p[0]} | {m.tokens for m in plot.marks if m.tokens})
    least, most = asked[0], max(asked[-1], asked[0] * 2)

    def x(tokens: float) -> float:
        if tokens <= 0:
            return _LEFT + 10
        begin = _LEFT + 10 + _START
        return begin + (width - _RIGHT - 16 - begin) * math.log(tokens / least) / math.log(most / least)

    def y(value: float) -> float:
        return floor - (floor - ceiling) * min(max(value / plot.top, 0.0), 1.0)

    ids = f"{plot.id}-{width}"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{ids}-t {ids}-d" '
        f'xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{ids}-t">{escape(plot.title)}</title><desc id="{ids}-d">{escape(plot.description)}</desc>',
    ]
    for value in _ticks(plot.top):
        label = f"{value:.0%}" if plot.percent else f"{value:g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{width - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    last = -math.inf
    for tokens in (0, *asked):
        place = x(tokens)
        parts.append(f'<path class="axis" d="M{place:.1f} {floor}v5"/>')
        if place - last >= (_BETWEEN_LABELS if tokens and last > x(0) else 24):
            parts.append(
                f'<text class="tick" x="{place:.1f}" y="{floor + 19}" text-anchor="middle">{short(tokens)}</text>'
            )
            last = place
    parts.append(f'<path class="axis" d="M{_LEFT} {floor}H{width - _RIGHT}"/>')
    parts.append(
        f'<text class="tick" x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{height - 8}" text-anchor="middle">'
        "tokens asked, logarithmic</text>"
    )
    for value, words in plot.lines:
        parts.append(f'<path class="line" d="M{_LEFT} {y(value):.1f}H{width - _RIGHT}"/>')
        place, anchor = (_LEFT + 4, "start") if _is_freer_at_the_left(plot, value) else (width - _RIGHT, "end")
        parts.append(
            f'<text class="tick" x="{place}" y="{y(value) - 5:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )
    for index, series in enumerate(plot.series):
        parts.append(_series(series, x, y, (index - (len(plot.series) - 1) / 2) * _DODGE, plot.percent))
    for index, mark in enumerate(plot.marks):
        place, value = x(mark.tokens) + 7 + 4 * index, y(mark.value)
        parts.append(
            f'<path class="c{mark.colour} hollow" d="M{place:.1f} {value - 6:.1f}l6 6l-6 6l-6 -6z">'
            f"<title>{escape(mark.name)}: {_value(mark.value, plot.percent)} from {mark.tokens:,} tokens</title></path>"
        )
    return "".join([*parts, "</svg>"])


def _is_freer_at_the_left(plot: Plot, height: float) -> bool:
    """Whether fewer points crowd the name of a line at this height there than at the right."""
    ends = ([one.points[0][1] for one in plot.series], [one.points[-1][1] for one in plot.series])
    left, right = (min((abs(value - height) for value in values), default=math.inf) for values in ends)
    return left >= right


def _series(series: Series, x: Axis, y: Axis, shift: float, percent: bool) -> str:
    places = [
        (x(tokens) + (shift if tokens else 0), y(value), y(low), y(high)) for tokens, value, low, high in series.points
    ]
    line = "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in places)
    parts = [f'<g class="c{series.colour}">', f'<path class="curve{_dash(series)}" d="M{line}"/>']
    for (px, py, low, high), (tokens, value, least, most) in zip(places, series.points, strict=True):
        told = (
            f"{series.name}, {tokens:,} tokens: {_value(value, percent)} "
            f"({_value(least, percent)} to {_value(most, percent)})"
        )
        parts.append(
            f'<g><title>{escape(told)}</title><path class="bar" d="M{px - 4:.1f} {low:.1f}h8m-4 0V{high:.1f}m-4 0h8"/>'
            f"{_dot(px, py, series.square)}</g>"
        )
    return "".join([*parts, "</g>"])


def key(plot: Plot) -> str:
    """What the lines mean, as an HTML list."""
    entries = [
        f'<li><svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true"><g class="c{series.colour}">'
        f'<path class="curve{_dash(series)}" d="M1 7H33"/>{_dot(17, 7, series.square)}</g></svg>'
        f"{escape(series.name)}</li>"
        for series in plot.series
    ]
    if plot.marks:
        entries.append(
            '<li><svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
            '<path class="hollow plain" d="M17 1l6 6l-6 6l-6 -6z"/></svg>control</li>'
        )
    return f'<ul class="key">{"".join(entries)}</ul>'


def short(tokens: int) -> str:
    """A number of tokens for an axis: 512, 8.2k, 131k, 1.5M."""
    for unit, sign in ((1_000_000, "M"), (1000, "k")):
        if tokens >= unit:
            value = tokens / unit
            return f"{value:.0f}{sign}" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f}{sign}"
    return str(tokens)


def _dot(x: float, y: float, square: bool) -> str:
    if square:
        return f'<rect class="dot" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _dash(series: Series) -> str:
    return " dashed" if series.dashed else ""


def _value(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.2f}"


def _ticks(top: float) -> list[float]:
    """Round values from 0 to the top of an axis, four to six of them."""
    raw = top / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    return [round(step * index, 10) for index in range(math.floor(top / step + 1e-9) + 1)]
