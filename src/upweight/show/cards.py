"""What rows and queries look like, as HTML: pictures inside the page, texts, columns beside those of the query."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data import markup
from upweight.show.png import address, small
from upweight.show.token_cards import joined

Card = str | Mapping[str, Any] | NDArray[np.uint8] | list[str] | None


@dataclass(frozen=True)
class Cut:
    """How much of a card is shown.

    Args:
        pixels: on the longer side of a picture.
        letters: of a text.
        columns: beside those of a query, and twice as many alone.
    """

    pixels: int = 96
    letters: int = 600
    columns: int = 8


_WHOLE = Cut()
_WORD = re.compile(r"\w+")


def looks(card: Card, what: str, beside: Card = None, *, cut: Cut = _WHOLE) -> str:
    """A card as markup, empty where there is none.

    Args:
        card: a text, columns, a picture, or tokens.
        what: whose it is, in words, for those who do not see a picture.
        beside: the query's card, with which words in common are underlined and columns compared.
        cut: how much of it.
    """
    if card is None:
        return ""
    if isinstance(card, np.ndarray):
        return f'<img src="{address(small(card, cut.pixels))}" alt="{markup.text(what)}">'
    card = joined(card) if isinstance(card, list) else card
    beside = joined(beside) if isinstance(beside, list) else beside
    if isinstance(card, str):
        return f'<p class="uw-text text">{_text(card, beside if isinstance(beside, str) else None, cut.letters)}</p>'
    return _columns(card, what, beside if isinstance(beside, Mapping) else None, cut.columns)


def _text(card: str, beside: str | None, most: int) -> str:
    """A text, cut, in which the longer words that the query has too are underlined."""
    shown = card if len(card) <= most else card[: most - 1] + "…"
    if beside is None:
        return markup.text(shown, most)
    common = {word for word in _words(beside) if len(word) > 3}
    parts, at = [], 0
    for found in _WORD.finditer(shown):
        if found.group().lower() in common:
            parts += [markup.text(shown[at : found.start()], most), f"<u>{markup.text(found.group())}</u>"]
            at = found.end()
    return "".join([*parts, markup.text(shown[at:], most)])


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _columns(card: Mapping[str, Any], what: str, beside: Mapping[str, Any] | None, few: int) -> str:
    """Columns as a table; beside a query those that differ most from it come first, with the difference."""
    names = list(card)
    if beside is not None:
        names.sort(key=lambda name: -_apart(card[name], beside.get(name)))
    most = 2 * few if beside is None else few
    lines = [_line(name, card[name], beside) for name in names[:most]]
    more = f"<tr><td>… {len(names) - most} more</td></tr>" if len(names) > most else ""
    head = "" if beside is None else '<tr><td></td><th scope="col">value</th><th scope="col">− query</th></tr>'
    caption = f'<caption class="unseen">{markup.text(what)}</caption>'
    return f'<table class="columns">{caption}{head}{"".join(lines)}{more}</table>'


def _line(name: str, value: Any, beside: Mapping[str, Any] | None) -> str:
    cells = [_told(value)]
    if beside is not None:
        other = beside.get(name)
        if _number(value) and _number(other):
            cells.append("=" if value == other else f"{float(value) - float(beside[name]):+.5g}")
        else:
            cells.append("=" if value == other else "differs")
    return f'<tr><th scope="row">{markup.text(name, 40)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _told(value: Any) -> str:
    return f"{float(value):.5g}" if _number(value) else markup.text(value, 60)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _apart(value: Any, other: Any) -> float:
    """How far two values are apart: numbers by their difference beside their size, others by being different."""
    if _number(value) and _number(other):
        first, second = float(value), float(other)
        size = abs(first) + abs(second)
        return abs(first - second) / size if size and np.isfinite(size) else 0.0
    return float(value != other)
