"""Small vector drawings for reports: budget gauges, intervals on an axis, curves, bars. SVG, no scripts.

Every function returns markup whose texts are escaped; numbers are the only other thing that goes in. Colours
come from the page's style sheet by class, so that screen and paper can differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]


def gauge(*, spent: float, promised: float | None, colluding: float, label: str) -> Markup:
    """One site's budget: a bar up to ``spent`` on a track up to ``promised``, a mark at ``colluding``.

    Args:
        spent, colluding: Epsilons; infinite fills the track.
        promised: The plan's epsilon; None where it promises nothing.
        label: Text for readers who do not see the drawing.
    """
    width, left, right, top, height = 640.0, 8.0, 8.0, 24.0, 16.0
    finite = [value for value in (spent, colluding, promised or 0.0) if math.isfinite(value)]
    largest = max([*finite, 1e-9]) * 1.06
    over = promised is None or not spent <= promised

    def x(value: float) -> float:
        return left + (width - left - right) * min(value / largest, 1.0)

    parts = [
        _box("track", left, top, x(promised if promised is not None else largest) - left, height),
        _box("fill over" if over else "fill", left, top, x(spent) - left, height),
    ]
    if promised is not None:
        parts.append(_tick("limit", x(promised), top - 6, top + height + 6))
        parts.append(_text("limit-text", x(promised), top - 10, f"promised {promised:g}", "end"))
    if math.isfinite(colluding):
        parts.append(_tick("other", x(colluding), top - 2, top + height + 12))
        words = f"all others collude {colluding:.2f}"
        parts.append(_text("other-text", x(colluding), top + height + 24, words, "end"))
    shown = f"spent {spent:.2f}" if math.isfinite(spent) else "spent: infinite"
    inside = x(spent) - left > 90
    place = (x(spent) - 6, "end", "on-fill") if inside else (x(spent) + 6, "start", "plain")
    parts.append(_text(place[2], place[0], top + 12.5, shown, place[1]))
    return _svg("gauge", width, top + height + 30, label, parts)


def interval_on_axis(
    *,
    estimate: float,
    low: float,
    high: float,
    marks: Sequence[tuple[float, str, str]],
    axis: tuple[float, float] = (0.0, 1.0),
    label: str,
) -> Markup:
    """An interval with its estimate, and named marks (value, words, class) above the axis."""
    width, left, right = 640.0, 12.0, 12.0
    row = 24.0 + 15.0 * len(marks)
    low_end, high_end = axis

    def x(value: float) -> float:
        share = (min(max(value, low_end), high_end) - low_end) / (high_end - low_end)
        return left + (width - left - right) * share

    parts = [_tick(kind, x(value), 6 + 15 * i, row + 16) for i, (value, _, kind) in enumerate(marks)]
    parts += [
        _beside(x(value), 14 + 15 * i, words, kind, width) for i, (value, words, kind) in enumerate(marks)
    ]
    parts.append(_tick_line("axis", left, row + 16, width - right, row + 16))
    for value in _round_numbers(low_end, high_end):
        parts.append(_tick("axis", x(value), row + 16, row + 20))
        parts.append(_text("scale", x(value), row + 33, f"{value:g}", "middle"))
    parts.append(_box("interval", x(low), row - 4, max(x(high) - x(low), 2.0), 10))
    parts.append(
        Markup('<circle class="estimate" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(x(estimate), row + 1)
    )
    return _svg("strip", width, row + 36, label, parts)


def curves(
    *,
    lines: Sequence[tuple[str, Sequence[Point]]],
    shaded: Sequence[Point] = (),
    words: Sequence[tuple[float, float, str, str]] = (),
    x_title: str,
    y_title: str,
    label: str,
) -> Markup:
    """Curves in the unit square. ``lines`` are (class, points), ``words`` are (x, y, class, text)."""
    side, left, bottom, top = 300.0, 46.0, 40.0, 10.0

    def place(point: Point) -> str:
        x, y = (min(max(value, 0.0), 1.0) for value in point)
        return f"{left + side * x:.1f},{top + side * (1 - y):.1f}"

    parts = []
    if shaded:
        parts.append(
            Markup('<polygon class="shade" points="{}"/>').format(" ".join(place(point) for point in shaded))
        )
    for step in range(1, 5):
        at = step / 5
        parts.append(_tick_line("grid", left, top + side * at, left + side, top + side * at))
        parts.append(_tick_line("grid", left + side * at, top, left + side * at, top + side))
    parts.append(_box("frame", left, top, side, side))
    for kind, points in lines:
        parts.append(
            Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(place(p) for p in points))
        )
    for step in range(6):
        at = step / 5
        parts.append(_text("scale", left + side * at, top + side + 15, f"{at:g}", "middle"))
        parts.append(_text("scale", left - 6, top + side * (1 - at) + 4, f"{at:g}", "end"))
    for x, y, kind, text in words:
        parts.append(_text(kind, left + side * x, top + side * (1 - y), text, "start"))
    parts.append(_text("title", left + side / 2, top + side + 33, x_title, "middle"))
    turned = f"rotate(-90 12 {top + side / 2:.1f})"
    parts.append(
        Markup('<text class="title" x="12" y="{:.1f}" text-anchor="middle" transform="{}">{}</text>').format(
            top + side / 2, turned, y_title
        )
    )
    return _svg("square", left + side + 14, top + side + bottom, label, parts)


def dots_on_axis(
    *,
    rows: Sequence[tuple[str, str, Sequence[float]]],
    marks: Sequence[tuple[float, str, str]],
    label: str,
    with_zero: bool = True,
) -> Markup:
    """One dot for each value, by row (words, class, values), on one common axis; marks as above.

    Args:
        with_zero: Whether the axis reaches zero, however far the values are from it.
    """
    width, left, right = 640.0, 110.0, 14.0
    values = [value for _, _, group in rows for value in group] + [value for value, _, _ in marks]
    low, high = (min([*values, 0.0]), max([*values, 1e-9])) if with_zero else (min(values), max(values))
    span = (high - low) or 1.0
    low, high = low - 0.03 * span, high + 0.03 * span
    top = 10.0 + 15.0 * len(marks)

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    bottom = top + 34.0 * len(rows)
    parts = [_tick(kind, x(value), 4 + 15 * i, bottom) for i, (value, _, kind) in enumerate(marks)]
    parts += [
        _beside(x(value), 12 + 15 * i, words, kind, width) for i, (value, words, kind) in enumerate(marks)
    ]
    for index, (words, kind, group) in enumerate(rows):
        y = top + 34 * index + 17
        parts.append(_text("row", left - 10, y + 4, words, "end"))
        parts.append(_tick_line("grid", left, y, width - right, y))
        for number, value in enumerate(group):
            shift = ((number * 7) % 11 - 5) * 1.6
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(
                    kind, x(value), y + shift
                )
            )
    for value in _round_numbers(low, high):
        parts.append(_text("scale", x(value), bottom + 14, f"{value:g}", "middle"))
    return _svg("strip", width, bottom + 20, label, parts)


def _round_numbers(low: float, high: float) -> list[float]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _beside(x: float, y: float, words: str, kind: str, width: float) -> Markup:
    """Words right of a mark, or left of it where they would leave the drawing."""
    to_the_right = x + 6.6 * len(words) + 8 < width
    return _text(
        f"{kind}-text", x + (5 if to_the_right else -5), y, words, "start" if to_the_right else "end"
    )


def _svg(kind: str, width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        kind, width, height, label, Markup("").join(parts)
    )


def _box(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="3"/>').format(
        kind, x, y, max(width, 0.0), height
    )


def _tick(kind: str, x: float, top: float, bottom: float) -> Markup:
    return _tick_line(kind, x, top, x, bottom)


def _tick_line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _text(kind: str, x: float, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(words)
    )
