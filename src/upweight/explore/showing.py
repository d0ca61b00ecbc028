"""How numbers, texts and distributions are shown: what the templates call."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlencode

from upweight.explore import drawing

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


FILTERS: dict[str, Any] = {
    "signed": signed,
    "number": number,
    "percent": percent,
    "digits": digits,
    "plain": plain,
    "shade": shade,
    "direction": direction,
    "shortened": shortened,
}
GLOBALS: dict[str, Any] = {"with_query": with_query, "bars": drawing.bars, "dots": drawing.dots}
