"""How numbers, texts and distributions are shown: what the templates call."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup, escape

from upweight.show import svg

NOTHING = "–"


def signed(value: float | None) -> str:
    """A value in units of the measure, always with its sign, to three digits: +0.00123, −4.5e-07."""
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:+.3g}".replace("-", "−", 1) if value >= 0 or "e-" not in f"{value:+.3g}" else "−" + f"{-value:.3g}"


def number(value: float | None) -> str:
    """A number to three digits, whole ones with all of them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}".replace("-", "−", 1 if value < 0 else 0)


def digits(value: float | None) -> str:
    """A correlation or a slope, to four digits behind the point."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.4f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.1%}"


def direction(value: float | None) -> str:
    """The class of a value's cell: whether the row helps or harms; the sign says the same."""
    if value is None or math.isnan(value) or value == 0:
        return "neither"
    return "helps" if value > 0 else "harms"


def shortened(text: Any, most: int = 240) -> str:
    """A text that is cut where it is too long, and says so."""
    told = str(text)
    return told if len(told) <= most else f"{told[:most].rstrip()}… ({len(told):,} characters)"


def with_query(address: str, asked: dict[str, Any], **changed: Any) -> str:
    """An address with what is asked, some of it changed; what is None or empty is left out."""
    told = {name: value for name, value in {**asked, **changed}.items() if value not in (None, "", False)}
    return address + (f"?{urlencode({name: int(v) if v is True else v for name, v in told.items()})}" if told else "")


def plain(value: Any) -> str:
    """A value of the user's: a number to four digits, anything else as a short text."""
    if value is None:
        return NOTHING
    if isinstance(value, float) and not isinstance(value, bool):
        return NOTHING if math.isnan(value) else f"{value:.4g}".replace("-", "−", 1 if value < 0 else 0)
    return shortened(value, 120)


def shade(value: float | None, largest: float) -> str:
    """The class of a cell of a matrix: in three steps, how much it helps or harms."""
    if value is None or math.isnan(value) or value == 0 or not largest:
        return "neither"
    step = min(3, 1 + int(3 * abs(value) / largest)) if abs(value) > largest / 50 else 0
    return f"{direction(value)}-{step}"


def bars(found: Mapping[str, Any], title: str, x: str, *, y: str = "rows", signs: bool = False) -> Markup:
    """A histogram, as `index.histogram` gives it; where signs count, on a scale that shows single rows far out.

    It says how many lie beyond its ends, for they stand in the outermost bars.
    """
    counts, edges = found["counts"], found["edges"]
    zero = [(0.0, "")] if counts and edges[0] < 0 < edges[-1] else []
    drawn = Markup(svg.histogram(counts, edges, title=title, x=x, y=y, marks=zero, log=signs, signs=signs))
    beyond = found["beyond"]
    more = Markup('<p class="note">{} farther out {} in the outermost bars.</p>')
    return drawn + more.format(number(beyond), "stands" if beyond == 1 else "stand") if beyond else drawn


def dots(points: Sequence[Mapping[str, Any]], x: str, y: str, title: str, *, diagonal: bool = False) -> Markup:
    """Points {x, y, kind, title}, what helps before what harms; the line where both are equal, if it is asked for."""
    told = sorted(points, key=lambda one: one["kind"] != "helps")
    across, up = ([one[axis] for one in told] for axis in "xy")
    kinds, names = [one["kind"] for one in told], [one["title"] for one in told]
    drawn = svg.scatter(across, up, title=title, x_name=x, y_name=y, kinds=kinds, names=names, diagonal=diagonal)
    return Markup(drawn)


def size(value: float | None) -> float:
    """How large a value is, whatever its sign; 0 where there is none."""
    return 0.0 if value is None or math.isnan(value) else abs(value)


def breakable(name: Any) -> Markup:
    """A short name that a line may break behind its underscores and dots."""
    return Markup(re.sub(r"(_+|\.(?=\w))", r"\1<wbr>", str(escape(shortened(name, 60)))))


FILTERS: dict[str, Any] = {
    "signed": signed,
    "number": number,
    "percent": percent,
    "digits": digits,
    "plain": plain,
    "shade": shade,
    "breakable": breakable,
    "direction": direction,
    "size": size,
    "shortened": shortened,
    "typed": shlex.quote,
}
GLOBALS: dict[str, Any] = {"with_query": with_query, "bars": bars, "dots": dots}
