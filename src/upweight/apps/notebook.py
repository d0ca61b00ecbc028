"""What notebooks show of the apps' results: tables whose rows are called by number and name, and sentences below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

import upweight as uw
from upweight.apps.names import name_in_text

LINES = 12  # of a table
NOTHING = "–"  # in a cell


def row(number: Any, ids: NDArray[Any] | None, place: int | None = None) -> str:
    """A row's number, and its name where it has one.

    Args:
        number: as it is shown.
        ids: names.
        place: of the row among these; None where the number is its place.
    """
    return uw.markup.text(f"{number}{name_in_text(ids, int(number) if place is None else place)}")


def plain(value: Any, form: str = "") -> str:
    """A text, a label or a number as a cell."""
    return uw.markup.text(format(value, form) if form else str(value))


def signed(value: float) -> str:
    """A predicted change of the loss, blue where what is named helps and red where it harms; nothing for NaN."""
    return uw.markup.signed(float(value)) if value == value else NOTHING


def change(before: Any, after: Any) -> str:
    """A label and the one in its place; one that stays says so."""
    same = "stays" if before == after else f"→ {after}"
    return uw.markup.text(f"{before} {same}")


def table(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]], count: int | None = None) -> str:
    """The first lines of a table, and how many more there are: of `count`, or of those that are given."""
    every = list(lines)
    count = len(every) if count is None else count
    more = f"… and {count - LINES:,} more" if count > LINES else ""
    return uw.markup.table(caption, head, every[:LINES]) + uw.markup.remark(more)


def shown(*parts: str, said: Iterable[str] = ()) -> str:
    """Tables as one answer of a notebook, and sentences below them."""
    return uw.markup.frame(*parts, *map(uw.markup.remark, said))
