"""Pictures of distributions as SVG, with attributes for styles, colours by class, and a text for readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _EDGE = 320, 96, 18


def bars(found: Mapping[str, Any], title: str, *, signs: bool = False, mark: float | None = None) -> Markup:
    """A histogram.

    Args:
        found: counts and edges, as `index.histogram` gives them.
        title: what it is of.
        signs: whether bars below 0 harm and those above help.
        mark: a place that is marked.
    """
    counts, edges = found["counts"], found["edges"]
    if not counts:
        return Markup('<p class="note">No numbers.</p>')
    low, high, most = edges[0], edges[-1], max(counts)
    wide = _WIDTH / len(counts)
    inside = _HEIGHT - _EDGE
    parts = []
    for place, count in enumerate(counts):
        tall = inside * math.sqrt(count / most)
        if count:
            middle = (edges[place] + edges[place + 1]) / 2
            kind = ("helps" if middle > 0 else "harms") if signs else "bar"
            parts.append(
                f'<rect class="{kind}" x="{place * wide:.2f}" y="{inside - tall:.2f}" '
                f'width="{max(wide - 0.6, 0.4):.2f}" height="{tall:.2f}"/>'
            )
    for value in [] if mark is None else [mark]:
        x = _WIDTH * (min(max(value, low), high) - low) / (high - low)
        parts.append(f'<line class="mark" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{inside}"/>')
    if low < 0 < high:
        x = _WIDTH * -low / (high - low)
        parts.append(f'<line class="zero" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{inside}"/>')
    parts.append(_texts([(0, "start", low), (_WIDTH, "end", high)]))
    told = f"{title}: {sum(counts):,} numbers, almost all from {low:.3g} to {high:.3g}; heights are roots of counts"
    return _svg(parts, told)


def dots(points: Sequence[Mapping[str, Any]], x: str, y: str, title: str, *, diagonal: bool = False) -> Markup:
    """A scatter plot of points {x, y, kind?, title?}.

    Args:
        points: what is drawn; those with a number missing are left out.
        x: what the horizontal axis is.
        y: what the vertical axis is.
        title: what it is of.
        diagonal: whether the line on which both are equal is drawn, and both axes have one scale.
    """
    known = [one for one in points if _finite(one["x"]) and _finite(one["y"])]
    if not known:
        return Markup('<p class="note">No numbers.</p>')
    size, left, low = (360, 240), 8, 28
    across, up = ([one[axis] for one in known] for axis in "xy")
    ranges = [_range(across), _range(up)]
    if diagonal:
        ranges = [(min(a for a, _ in ranges), max(b for _, b in ranges))] * 2

    def place(one: Mapping[str, Any]) -> tuple[float, float]:
        (a, b), (c, d) = ranges
        return (
            left + (size[0] - 2 * left) * (one["x"] - a) / (b - a),
            (size[1] - low) - (size[1] - low - left) * (one["y"] - c) / (d - c),
        )

    parts = []
    if diagonal:
        (a, b), _ = ranges
        (x1, y1), (x2, y2) = place({"x": a, "y": a}), place({"x": b, "y": b})
        parts.append(f'<line class="zero" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    elif ranges[1][0] < 0 < ranges[1][1]:
        _, height = place({"x": ranges[0][0], "y": 0.0})
        parts.append(f'<line class="zero" x1="{left}" y1="{height:.1f}" x2="{size[0] - left}" y2="{height:.1f}"/>')
    for one in known:
        cx, cy = place(one)
        dot = f'<circle class="{escape(one.get("kind", "bar"))}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>'
        label = f"<title>{escape(one['title'])}</title>" if one.get("title") else ""
        dot = dot.replace("/>", f">{label}</circle>") if label else dot
        parts.append(dot)
    (a, b), (c, d) = ranges
    parts.append(_texts([(left, "start", a), (size[0] - left, "end", b)], size[1] - 14))
    parts.append(f'<text class="axis" x="{size[0] / 2}" y="{size[1] - 2}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text class="axis" x="{left}" y="10">{escape(y)}: {_told(c)} … {_told(d)}</text>')
    told = f"{title}: {len(known):,} points; {x} from {a:.3g} to {b:.3g}, {y} from {c:.3g} to {d:.3g}"
    return _svg(parts, told, size)


def _svg(parts: Sequence[str], told: str, size: tuple[int, int] = (_WIDTH, _HEIGHT)) -> Markup:
    return Markup(
        f'<svg class="drawing" role="img" viewBox="0 0 {size[0]} {size[1]}" preserveAspectRatio="xMidYMid meet">'
        f"<title>{escape(told)}</title>{''.join(parts)}</svg>"
    )


def _texts(places: Sequence[tuple[float, str, float]], y: float = _HEIGHT - 4) -> str:
    return "".join(
        f'<text class="axis" x="{x}" y="{y}" text-anchor="{anchor}">{_told(value)}</text>'
        for x, anchor, value in places
    )


def _told(value: float) -> str:
    return f"{value:.3g}".replace("-", "−", 1 if value < 0 else 0)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
