"""Columns of cards: which they are, their levels, and how far their numbers spread; read off all cards, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.explore.tables import LEVELS, clean
from upweight.show.run import Card

_MOST = 40  # levels of a column by which rows are grouped
_BINS = 5  # … of a column of many numbers: of equal size
_SAMPLED = 20_000  # numbers of a column by which its bins are made
_COLUMNS = 200  # that are looked at


@dataclass(frozen=True)
class Column:
    """A column of the cards.

    Args:
        name: as the cards have it.
        mean, spread: of the training rows' numbers, and their standard deviation; None of texts.
        levels: what its groups are called: values, or ranges of numbers; empty where it has too many different values.
        edges: between ranges of numbers; empty where levels are values.
        values: of the levels; empty where they are ranges.
    """

    name: str
    mean: float | None
    spread: float | None
    levels: list[str]
    edges: list[float]
    values: list[Any]

    def code(self, card: Card) -> int:
        """The number of a card's level; -1 where it has none."""
        value = card.get(self.name) if isinstance(card, Mapping) else None
        if self.edges:
            return _bin(self.edges, float(value)) if value is not None and is_number(value) else -1
        key = _key(value)
        return self.values.index(key) if key in self.values else -1

    def told(self) -> dict[str, Any]:
        """What the index keeps of it."""
        return {"name": clean(self.name, 200), "mean": self.mean, "spread": self.spread, "levels": self.levels}


class Seen:
    """Columns while cards pass by."""

    def __init__(self) -> None:
        self._known: dict[str, _Values] = {}

    def add(self, cards: Iterable[Card], *, rows: bool = True) -> None:
        """Some more cards, of training rows or of queries."""
        for card in cards:
            if isinstance(card, Mapping):
                for name, value in card.items():
                    if name in self._known or len(self._known) < _COLUMNS:
                        self._known.setdefault(name, _Values()).add(value, rows)

    def columns(self) -> list[Column]:
        """All columns, in the order in which they were seen; those with levels are the first few that have some."""
        found, left = [], LEVELS
        for name, values in self._known.items():
            column = values.column(name, grouped=left > 0)
            left -= bool(column.levels)
            found.append(column)
        return found


class _Values:
    """The values of a column: different ones while they are few, and moments of the rows' numbers among them."""

    def __init__(self) -> None:
        self.different: set[Any] = set()
        self.numbers: list[float] = []
        self.count, self.total, self.squares, self.texts = 0, 0.0, 0.0, 0
        self.near = 0.0  # a number of the column, from which sums are taken: squares of dates would drown their spread

    def add(self, value: Any, row: bool) -> None:
        if is_number(value):
            if row:
                self.near = self.near if self.count else float(value)
                self.count += 1
                apart = float(value) - self.near
                self.total += apart
                self.squares += apart * apart  # infinite where it is too large: ** would raise
            if len(self.numbers) < _SAMPLED:
                self.numbers.append(float(value))
        elif value is not None:
            self.texts += 1
        if len(self.different) <= _MOST and (key := _key(value)) is not None:
            self.different.add(key)

    def column(self, name: str, *, grouped: bool) -> Column:
        numeric = bool(self.numbers) and not self.texts
        apart = self.total / self.count if numeric and self.count and math.isfinite(self.squares) else None
        mean = None if apart is None else self.near + apart
        spread = None if apart is None else math.sqrt(max(0.0, self.squares / self.count - apart * apart))
        if not grouped or len(self.different) < 2:
            return Column(name, mean, spread, [], [], [])
        if len(self.different) <= _MOST and (not numeric or len(self.different) <= _BINS * 2):
            values = sorted(self.different, key=lambda value: (isinstance(value, str), value))
            return Column(name, mean, spread, [clean(_called(value), 200) for value in values], [], values)
        if not numeric:
            return Column(name, mean, spread, [], [], [])
        inner = np.linspace(0, 1, _BINS + 1)[1:-1]
        edges = np.unique(np.quantile(self.numbers, inner)).tolist()
        return Column(name, mean, spread, _ranges(edges), edges, [])


def _bin(edges: list[float], value: float) -> int:
    """The range that a number lies in; a number on an edge lies above it."""
    return int(np.searchsorted(edges, value, side="right"))


def _ranges(edges: list[float]) -> list[str]:
    told = [f"{edge:.4g}" for edge in edges]
    return [f"< {told[0]}", *(f"{low} … {high}" for low, high in itertools.pairwise(told)), f"≥ {told[-1]}"]


def is_number(value: Any) -> bool:
    """Whether a value of a card is a number that can be compared: finite, and not too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _key(value: Any) -> Any:
    """A value by which rows can be grouped; None of others."""
    if isinstance(value, bool):
        return str(value)
    if is_number(value):
        return value
    return value[:200] if isinstance(value, str) else None


def _called(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
