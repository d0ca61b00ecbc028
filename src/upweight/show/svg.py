"""Small charts as SVG text, for pages: NumPy in, one <svg> out, coloured by classes that `STYLE` holds.

Nothing here is a script or a style attribute, so that a page may forbid both. Every chart says in words what it shows
(role, title, description); kinds of dots and lines differ in shape and dashes, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

STYLE = """
.uw-chart{display:block;width:100%;max-width:32rem;height:auto;
 --c0:#2a6f97;--c1:#b3471d;--c2:#4f772d;--c3:#7b4ea3;--ink:#1b2430;--soft:#5b6675;--grid:#d6dbe2}
.uw-chart text{font:11px system-ui,sans-serif;fill:var(--ink)}
.uw-chart .uw-tick{fill:var(--soft);font-size:10px}
.uw-chart .uw-grid{stroke:var(--grid);stroke-width:1}
.uw-chart .uw-axis{stroke:var(--soft);stroke-width:1}
.uw-chart .uw-mark{stroke:var(--ink);stroke-width:1.25;stroke-dasharray:4 3}
.uw-chart .uw-k0{fill:var(--c0);stroke:var(--c0)}.uw-chart .uw-k1{fill:var(--c1);stroke:var(--c1)}
.uw-chart .uw-k2{fill:var(--c2);stroke:var(--c2)}.uw-chart .uw-k3{fill:var(--c3);stroke:var(--c3)}
.uw-chart .uw-dot{fill-opacity:.55;stroke-width:1}
.uw-chart .uw-bar{stroke:none}
.uw-chart .uw-line{fill:none;stroke-width:1.75}
.uw-chart .uw-line.uw-k1{stroke-dasharray:6 3}.uw-chart .uw-line.uw-k2{stroke-dasharray:2 3}
.uw-chart .uw-line.uw-k3{stroke-dasharray:8 3 2 3}
@media (prefers-color-scheme:dark){.uw-chart{
 --c0:#6db4e0;--c1:#f09a6f;--c2:#a3c97a;--c3:#c3a0e8;--ink:#e6e9ee;--soft:#a4adba;--grid:#39414d}}
@media print{.uw-chart{--ink:#000;--soft:#333;--grid:#ccc;--c0:#2a6f97;--c1:#b3471d;--c2:#4f772d;--c3:#7b4ea3}}
"""
WIDTH, HEIGHT = 360, 220
KINDS = 4  # of dots and lines that can be told apart
DOTS = 2000  # more are thinned
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40


def histogram(
    counts: ArrayLike,
    edges: ArrayLike,
    *,
    title: str,
    x: str,
    y: str = "rows",
    marks: Sequence[tuple[float, str]] = (),
    log: bool = False,
    signs: bool = False,
) -> str:
    """Counts between edges as bars, as `numpy.histogram` returns them.

    Args:
        counts: (k,) how many.
        edges: (k + 1,) between what.
        title: what the chart shows, read out and shown on hover.
        x: what is counted, with its unit.
        y: what is counted is how many of these.
        marks: values with a name, as dashed lines.
        log: whether heights are logarithms, so that single rows far out are seen.
        signs: whether bars below 0 are of another colour than those above.
    """
    many, ends = _numbers(counts), _numbers(edges)
    if many.size == 0 or not many.sum():
        return _empty(title)
    heights = np.log10(1 + many) if log else many
    placed = [value for value, _ in marks if np.isfinite(value)]
    chart = _Chart(_span([*ends, *placed], 0), (0.0, float(heights.max()) * 1.05))
    chart.axes(x, f"{y} (log scale)" if log else y, up=_logs_of_counts if log else None)
    for count, height, left, right in zip(many, heights, ends[:-1], ends[1:], strict=True):
        if count:
            low, high = chart.x(left), chart.x(right)
            top = min(chart.y(height), chart.y(0) - 1.5)
            name = f"{_told(count)} {y} from {_told(left)} to {_told(right)}"
            kind = "uw-bar uw-k1" if signs and left + right < 0 else "uw-bar uw-k0"
            chart.add(_rect(low, top, max(high - low - 0.5, 0.75), chart.y(0) - top, kind, name))
    for value, name in marks:
        chart.vertical(value, name)
    most = int(many.argmax())
    description = (
        f"{_told(many.sum())} {y} from {_told(ends[0])} to {_told(ends[-1])}; most, {_told(many[most])}, between "
        f"{_told(ends[most])} and {_told(ends[most + 1])}."
    )
    return chart.render(title, description + _marked(marks))


def scatter(
    x: ArrayLike,
    y: ArrayLike,
    *,
    title: str,
    x_name: str,
    y_name: str,
    kinds: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    diagonal: bool = False,
    log_x: bool = False,
) -> str:
    """One dot a pair; evenly thinned beyond 2,000 of them, which the description says.

    Args:
        x: (k,) numbers; pairs with one that is not finite are left out.
        y: (k,) numbers.
        title: what the chart shows.
        x_name: what x is, with its unit.
        y_name: what y is, with its unit.
        kinds: (k,) of up to four kinds each dot is; they differ in shape, and a legend names them.
        names: (k,) what each dot is, shown on hover.
        diagonal: whether both have the same scale and the line of equality is drawn.
        log_x: whether x is on a logarithmic scale; dots at or below 0 are left out.
    """
    across, up = _numbers(x), _numbers(y)
    there = np.isfinite(across) & np.isfinite(up)
    if log_x:
        there &= across > 0
    places = np.flatnonzero(there)
    if not places.size:
        return _empty(title)
    total, places = len(places), places[:: -(-len(places) // DOTS)]
    shown = np.log10(across[places]) if log_x else across[places]
    wide, high = _span(shown, 0.05), _span(up[places], 0.05)
    if diagonal:
        wide = high = (min(wide[0], high[0]), max(wide[1], high[1]))
    legend: list[str] = list(dict.fromkeys(kinds[int(place)] for place in places)) if kinds is not None else []
    chart = _Chart(wide, high, legend=legend)
    chart.axes(x_name, y_name, across=_powers if log_x else None)
    if diagonal:
        chart.add(_line(*chart.at(wide[0], wide[0]), *chart.at(wide[1], wide[1]), "uw-mark"))
    for left, top, place in zip(shown, up[places], places, strict=True):
        kind = legend.index(kinds[int(place)]) if kinds is not None else 0
        chart.add(_dot(*chart.at(left, top), kind, "" if names is None else names[int(place)]))
    thinned = "" if len(places) == total else f" of {total:,}, evenly chosen"
    line = " The dashed diagonal is where both are equal." if diagonal else ""
    description = (
        f"{len(places):,} dots{thinned}. {x_name} from {_told(across[places].min())} to {_told(across[places].max())}, "
        f"{y_name} from {_told(up[places].min())} to {_told(up[places].max())}.{line}"
    )
    return chart.render(title, description)


def bars(names: Sequence[str], values: ArrayLike, *, title: str, x: str) -> str:
    """One bar a name, from 0 to the right or, in another colour and with its sign written, to the left.

    Args:
        names: (k,) what each is; long ones are cut.
        values: (k,) numbers; one that is not finite has no bar.
        title: what the chart shows.
        x: what the values are, with their unit.
    """
    numbers = _numbers(values)
    if not numbers.size or not np.isfinite(numbers).any():
        return _empty(title)
    low, high = _span([*numbers[np.isfinite(numbers)], 0.0], 0)
    room, line = 118, 20
    scale = (WIDTH - room - 60 * (1 + (low < 0))) / (high - low)
    zero = room + (60 if low < 0 else 0) - low * scale
    bottom = _TOP + line * len(numbers)
    parts = [_line(zero, _TOP - 4, zero, bottom, "uw-axis")]
    for place, (name, value) in enumerate(zip(names, numbers, strict=True)):
        middle = _TOP + line * place + line / 2
        parts.append(_text(room - 6, middle + 4, _cut(name, 16), anchor="end"))
        if np.isfinite(value):
            size, kind = abs(value) * scale, "uw-k1" if value < 0 else "uw-k0"
            left = zero - size if value < 0 else zero
            parts.append(_rect(left, middle - 7, max(size, 0.75), 14, f"uw-bar {kind}", f"{name}: {_told(value)}"))
            end, anchor = (zero - size - 4, "end") if value < 0 else (zero + size + 4, "start")
            parts.append(_text(end, middle + 4, _told(value), anchor=anchor, kind="uw-tick"))
    parts.append(_text(WIDTH / 2, bottom + 20, x, anchor="middle"))
    told = ", ".join(f"{name} {_told(value)}" for name, value in zip(names[:20], numbers[:20], strict=True))
    return _svg(WIDTH, bottom + 28, title, f"{x}: {told}.", parts)


def line(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """One line a name, told apart by dashes and shapes, with a legend.

    Args:
        series: up to four, each (x, y); places that are not finite break the line.
        title: what the chart shows.
        x: what x is, with its unit.
        y: what y is, with its unit.
        log_x: whether x is on a logarithmic scale.
        marks: values of x with a name, as dashed lines.
    """
    drawn = {}
    for name, (across, up) in series.items():
        left, top = _numbers(across), _numbers(up)
        drawn[name] = (np.log10(np.where(left > 0, left, np.nan)) if log_x else left), top
    finite = {name: np.isfinite(left) & np.isfinite(top) for name, (left, top) in drawn.items()}
    if not any(kept.any() for kept in finite.values()):
        return _empty(title)
    every = [np.concatenate([one[axis][finite[name]] for name, one in drawn.items()]) for axis in (0, 1)]
    placed = [(float(np.log10(value)) if log_x else value, name) for value, name in marks if value > 0 or not log_x]
    chart = _Chart(
        _span([*every[0], *[value for value, _ in placed]], 0.02), _span(every[1], 0.06), legend=list(drawn), lines=True
    )
    chart.axes(x, y, across=_powers if log_x else None)
    for value, name in placed:
        chart.vertical(value, name)
    for kind, (name, (left, top)) in enumerate(drawn.items()):
        chart.path(left, top, finite[name], kind)
    told = "; ".join(
        f"{name}: {_told(top[finite[name]][0])} first, {_told(top[finite[name]][-1])} last"
        for name, (_, top) in drawn.items()
        if finite[name].any()
    )
    return chart.render(title, f"{y} against {x}. {told}.{_marked(marks)}")


# ---- a frame with scales ---------------------------------------------------------------------------------------------


@dataclass
class _Chart:
    """A frame with a scale on either side, to which shapes are added."""

    across: tuple[float, float]
    up: tuple[float, float]
    legend: Sequence[str] = ()
    lines: bool = False
    parts: list[str] = field(default_factory=list)

    @property
    def top(self) -> float:
        return _TOP + 16 * -(-len(self.legend) // 2)

    @property
    def bottom(self) -> float:
        return self.top + HEIGHT - _TOP - _BOTTOM

    def x(self, value: float) -> float:
        low, high = self.across
        return _LEFT + (float(value) - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.up
        return self.bottom - (float(value) - low) / (high - low) * (self.bottom - self.top)

    def at(self, across: float, up: float) -> tuple[float, float]:
        return self.x(across), self.y(up)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def axes(self, x: str, y: str, *, across: _Ticks | None = None, up: _Ticks | None = None) -> None:
        """Grid, ticks and names of both axes."""
        for tick, shown in (up or _round)(*self.up):
            at = self.y(tick)
            self.add(_line(_LEFT, at, WIDTH - _RIGHT, at, "uw-grid"))
            self.add(_text(_LEFT - 5, at + 3.5, shown, "end", "uw-tick"))
        for tick, shown in (across or _round)(*self.across):
            at = self.x(tick)
            self.add(_line(at, self.bottom, at, self.bottom + 4, "uw-axis"))
            self.add(_text(at, self.bottom + 15, shown, "middle", "uw-tick"))
        self.add(_line(_LEFT, self.bottom, WIDTH - _RIGHT, self.bottom, "uw-axis"))
        self.add(_text((WIDTH + _LEFT - _RIGHT) / 2, self.bottom + 32, x, "middle"))
        middle = (self.top + self.bottom) / 2
        self.add(_text(12, middle, y, "middle", turned=True))
        for place, name in enumerate(self.legend):
            left, top = _LEFT + (place % 2) * 150, _TOP + 2 + 16 * (place // 2)
            if self.lines:
                self.add(_line(left, top, left + 18, top, f"uw-line uw-k{place % KINDS}"))
            self.add(_dot(left + 9, top, place))
            self.add(_text(left + 24, top + 4, _cut(name, 22)))

    def vertical(self, value: float, name: str) -> None:
        """A dashed line at a value, with its name beside it."""
        if np.isfinite(value):
            at = self.x(value)
            self.add(_line(at, self.top, at, self.bottom, "uw-mark"))
            near_end = at > WIDTH - 90
            self.add(_text(at + (-4 if near_end else 4), self.top + 9, name, "end" if near_end else "start"))

    def path(self, across: NDArray[np.float64], up: NDArray[np.float64], there: NDArray[np.bool_], kind: int) -> None:
        """A broken line through what is finite, with a shape at each place unless they are many."""
        steps, pen = [], "M"
        for left, top, finite in zip(across, up, there, strict=True):
            if finite:
                steps.append(f"{pen}{self.x(left):.1f} {self.y(top):.1f}")
            pen = "L" if finite else "M"
        self.add(f'<path class="uw-line uw-k{kind % KINDS}" d="{"".join(steps)}"/>')
        if there.sum() <= 30:
            for left, top in zip(across[there], up[there], strict=True):
                self.add(_dot(*self.at(left, top), kind))

    def render(self, title: str, description: str) -> str:
        return _svg(WIDTH, self.bottom + _BOTTOM, title, description, self.parts)


_Ticks = Callable[[float, float], list[tuple[float, str]]]  # from an interval to places and what is written there


def _round(low: float, high: float, *, wanted: int = 5) -> list[tuple[float, str]]:
    """Round numbers."""
    power = 10 ** np.floor(np.log10((high - low) / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= wanted)
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [(float(number * step), _short(float(f"{number * step:.12g}"))) for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten in an interval of logarithms, or round numbers where there are none."""
    low, high = max(low, -300.0), min(high, 300.0)  # what floating-point numbers hold
    whole = range(int(np.ceil(low - 1e-9)), int(np.floor(high + 1e-9)) + 1)
    if len(whole) < 2:
        return [(float(np.log10(value)), told) for value, told in _round(10**low, 10**high, wanted=3)]
    return [(float(power), _short(10.0**power)) for power in whole[:: -(-len(whole) // 6)]]


def _logs_of_counts(_: float, high: float) -> list[tuple[float, str]]:
    """0, 1, 10, 100, … where log₁₀(1 + count) is drawn."""
    counts = [0, *(10**power for power in range(int(high) + 1))]
    return [(at, _short(count)) for count in counts if (at := float(np.log10(1 + count))) <= high]


def _span(values: ArrayLike, share: float) -> tuple[float, float]:
    """From the least to the largest and, on both sides, a share more; never empty."""
    numbers = _numbers(values)
    numbers = numbers[np.isfinite(numbers)]
    low, high = float(numbers.min()), float(numbers.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 0.5
        return low - half, high + half
    return low - share * (high - low), high + share * (high - low)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    label = escape(f"{title}. {description}")
    return (
        f'<svg class="uw-chart" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f"{''.join(parts)}</svg>"
    )


def _empty(title: str) -> str:
    return _svg(WIDTH, 60, title, "There is nothing to draw.", [_text(WIDTH / 2, 34, "nothing to draw", "middle")])


def _rect(left: float, top: float, width: float, height: float, kind: str, name: str) -> str:
    where = f'x="{left:.1f}" y="{top:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {where}><title>{escape(name)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", *, turned: bool = False) -> str:
    classes = f' class="{kind}"' if kind else ""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _dot(x: float, y: float, kind: int, name: str = "") -> str:
    """A circle, a triangle, a square or a diamond."""
    kind %= KINDS
    shapes = {1: "M0-3.6L3.4 2.8H-3.4Z", 2: "M-2.7-2.7H2.7V2.7H-2.7Z", 3: "M0-3.8L3.8 0L0 3.8L-3.8 0Z"}
    inside = f"<title>{escape(name)}</title>" if name else ""
    if kind == 0:
        return f'<circle class="uw-dot uw-k0" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{inside}</circle>'
    where = f'd="{shapes[kind]}" transform="translate({x:.1f} {y:.1f})"'
    return f'<path class="uw-dot uw-k{kind}" {where}>{inside}</path>'


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _told(value: float) -> str:
    """A number in few digits, with a true minus."""
    number = float(value)
    whole = np.isfinite(number) and number == int(number) and abs(number) < 1e7
    return (f"{int(number):,}" if whole else f"{number:.3g}").replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    """A number at an axis: thousands as k, millions as M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size * 10 <= abs(value) < 1e10 and value % (size / 10) == 0:
            return _told(value / size) + letter
    return _told(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _marked(marks: Sequence[tuple[float, str]]) -> str:
    return "".join(f" {name} at {_told(value)}." for value, name in marks)
