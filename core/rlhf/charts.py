"""Line charts as inline SVG: no script, no library, nothing outside the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, TypeGuard

Points = Sequence[tuple[float, float | None]]
"""(step, value) by step; None is a gap."""

STRETCHES = 400
"""Longer curves are drawn by the lowest and the highest point of so many stretches, so that no spike is lost."""

COLUMNS = 150
"""Of more steps, neighbours share a column."""


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1.7e308


def written(value: Any) -> str:
    """A number in four digits, a whole one as it is; "-" for anything else."""
    if not is_number(value):
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def chart(name: str, points: Points) -> str:
    """A line chart as inline SVG.

    Args:
        points: at a gap the line breaks, nothing is interpolated. A step at which the metric wasn't reported at all is
            no gap, and not among the points.
    """
    missing = sum(value is None for _, value in points)
    values = [value for _, value in points if value is not None]
    caption = escape(name)
    note = f" ({missing} of {len(points)} not finite)" if missing else ""
    if not values:
        return f"<figure><figcaption>{caption}</figcaption><p>no finite value{note}</p></figure>"
    left, right, low, high = points[0][0], points[-1][0], min(values), max(values)

    def x(step: float) -> float:
        return 4 + 292 * (step - left) / (right - left) if right > left else 150

    def y(value: float) -> float:
        # Halved before subtracting: the difference of two finite numbers may not be finite.
        return 116 - 106 * ((value / 2 - low / 2) / (high / 2 - low / 2)) if high / 2 > low / 2 else 63

    lines: list[list[str]] = [[]]
    for step, value in _thinned(points):
        if value is None:
            lines.append([])
        else:
            lines[-1].append(f"{x(step):.1f} {y(value):.1f}")
    path = "".join("M" + "L".join(line) for line in lines if len(line) > 1)
    # A line of one point is invisible.
    dots = "".join('<circle cx="{}" cy="{}" r="2.5"/>'.format(*line[0].split()) for line in lines if len(line) == 1)
    label = escape(f"{name}: {written(values[0])} at first, {written(values[-1])} at last{note}")
    return (
        f"<figure><figcaption>{caption} <b>{written(values[-1])}</b>{note}</figcaption>"
        f'<svg viewBox="0 0 300 130" role="img" aria-label="{label}">'
        f'<path class="frame" d="M4 10H296M4 116H296"/><path class="line" d="{path}"/>{dots}'
        f'<text x="4" y="8">{written(high)}</text><text x="4" y="126">{written(low)}</text>'
        f'<text x="296" y="126" text-anchor="end">steps {written(left)} to {written(right)}</text>'
        "</svg></figure>"
    )


def _thinned(points: Points) -> Points:
    """At most two points and a gap for each of `STRETCHES` stretches: the lowest and the highest, in their order."""
    if len(points) <= 2 * STRETCHES:
        return points
    kept: list[tuple[float, float | None]] = []
    for at in range(STRETCHES):
        stretch = points[at * len(points) // STRETCHES : (at + 1) * len(points) // STRETCHES]
        finite = [(value, step) for step, value in stretch if value is not None]
        ends = sorted({(step, value) for value, step in (min(finite), max(finite))}) if finite else []
        kept.extend(ends)
        if len(finite) < len(stretch):
            kept.append((stretch[-1][0], None))
    return kept


def bar(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """What something is made of, as one bar: parts in order, each as wide as its share. Inline SVG.

    Args:
        parts: (name, value >= 0), not all 0.
    """
    total = sum(value for _, value in parts)
    pieces, left = [], 4.0
    for at, (name, value) in enumerate(parts):
        width = 592 * value / total
        label = escape(f"{name}: {written(value)} {unit}, {value / total:.1%}")
        pieces.append(f'<rect class="p{at}" x="{left:.1f}" y="4" width="{width:.1f}" height="24">'
                      f"<title>{label}</title></rect>")  # fmt: skip
        left += width
    return f'<svg viewBox="0 0 600 32" role="img">{"".join(pieces)}</svg>'


def columns(name: str, steps: Sequence[tuple[float, Sequence[float]]], unit: str) -> str:
    """A column a step, of parts on top of each other, the first lowest. Inline SVG.

    Args:
        steps: (step, parts, each >= 0) by step; of more than `COLUMNS`, neighbours are drawn as their mean.
    """
    count = min(len(steps), COLUMNS)
    drawn = []
    for i in range(count):
        stretch = [parts for _, parts in steps[i * len(steps) // count : (i + 1) * len(steps) // count]]
        drawn.append([sum(values) / len(stretch) for values in zip(*stretch, strict=True)])
    high = max((sum(parts) for parts in drawn), default=0.0) or 1.0
    pieces = []
    for i, parts in enumerate(drawn):
        left, width, foot = 4 + 592 * i / count, 592 / count, 116.0
        for at, value in enumerate(parts):
            height = 106 * value / high
            foot -= height
            pieces.append(
                f'<rect class="p{at}" x="{left:.1f}" y="{foot:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
    label = escape(f"{name}, at most {written(high)} {unit}")
    ends = f"steps {written(steps[0][0])} to {written(steps[-1][0])}" if steps else ""
    return (
        f'<svg viewBox="0 0 600 130" role="img" aria-label="{label}">{"".join(pieces)}'
        f'<path class="frame" d="M4 10H596M4 116H596"/><text x="4" y="8">{written(high)} {escape(unit)}</text>'
        f'<text x="596" y="126" text-anchor="end">{ends}</text></svg>'
    )
