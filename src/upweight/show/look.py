"""The rows that lead, as they look: pictures, texts or columns beside their values, in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.data import markup
from upweight.data.ids import text_of
from upweight.errors import InvalidInput
from upweight.influence.leading import Leading
from upweight.influence.scores import Extremes, Scores, SelfScores
from upweight.influence.top import TopK
from upweight.show.cards import Card, Cut, looks

_QUERIES, _ROWS = 5, 3
_SMALL = Cut(pixels=40, letters=160, columns=4)


@dataclass(frozen=True)
class Look:
    """The rows that lead, with what they look like; a notebook shows it as a table of cards.

    Args:
        caption: what the values are.
        sides: for every kind of rows, such as the most helpful, which they are.
        row: what a training row looks like, by its number.
        query: what a query looks like, by its number; None of nothing.
    """

    caption: str
    sides: Mapping[str, TopK]
    row: Callable[[int], Card]
    query: Callable[[int], Card]

    def __repr__(self) -> str:
        return f"Look({self.caption}: {', '.join(map(repr, self.sides.values()))})"

    def _repr_html_(self) -> str:
        first = next(iter(self.sides.values()))
        if first.rows.ndim == 1:
            lines = [["", *(self._cells(top.rows, top.values, top.ids, None) for top in self.sides.values())]]
            return markup.frame(markup.table(self.caption, ["", *self.sides], lines))
        lines = []
        for q in range(min(_QUERIES, len(first.rows))):
            name = f"query {q if first.query_ids is None else text_of(first.query_ids[q])}"
            card = self.query(q)
            cells = [
                self._cells(top.rows[q], top.values[q], None if top.ids is None else top.ids[q], card)
                for top in self.sides.values()
            ]
            lines.append([markup.text(name) + looks(card, name, cut=_SMALL), *cells])
        more = len(first.rows) - _QUERIES
        left = f"… and {more} more queries" if more > 0 else ""
        return markup.frame(markup.table(self.caption, ["", *self.sides], lines), markup.remark(left))

    def _cells(self, rows: Any, values: Any, ids: Any, beside: Card) -> str:
        """The first rows of one query, side by side."""
        cells = []
        for place, (row, value) in enumerate(zip(rows[:_ROWS].tolist(), values[:_ROWS].tolist(), strict=True)):
            name = f"row {row}" if ids is None else text_of(ids[place])
            card = looks(self.row(row), name, beside, cut=_SMALL)
            cells.append(f'<div class="uw-cell">{markup.text(name, 60)} {markup.signed(value)}{card}</div>')
        return f'<div class="uw-cells">{"".join(cells)}</div>'


def look(found: Scores | SelfScores | Leading | Extremes | TopK, rows: Any, queries: Any = None) -> Look:
    """The rows that lead, as they look: `look(scores, X, Xq)` at the end of a notebook's cell.

    Args:
        found: values, or the rows that lead among them.
        rows: what training rows look like: a DataFrame, a list of texts, an array of pictures (n, H, W), (n, H, W, 3)
            or (n, 3, H, W) or of a few columns (n, f), or a function of the row's number that gives a text, a dict of
            columns, a picture as uint8 or None.
        queries: the same of the queries; None shows their names alone.

    Raises:
        InvalidInput: if rows or queries are nothing of that.

    >>> import upweight as uw
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = [[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"]
    >>> influence = uw.explain(LogisticRegression().fit(X, y), X, y)
    >>> look(influence.on_loss([[1.4]], ["yes"]), ["zero", "one", "two", "three"])
    Look(Change of the query's loss, row removed: TopK(1 queries × 3 rows), TopK(1 queries × 3 rows))
    """
    row, query = _source(rows, "rows"), _source(queries, "queries")
    if isinstance(found, TopK):
        return Look("Rows that lead", {"row": found}, row, query)
    if isinstance(found, SelfScores):
        top = found.top(min(_ROWS, len(found.values)))
        return Look(f"Change of a row's own loss, {found.counterfactual}", {"largest": top}, row, query)
    if isinstance(found, Extremes):
        helpful, harmful, caption = found.helpful, found.harmful, "Change of the query's measure"
    else:
        k = min(_ROWS, found.k if isinstance(found, Leading) else found.values.shape[1])
        helpful, harmful = found.helpful(k), found.harmful(k)
        caption = f"Change of the query's {found.measure}, {found.counterfactual}"
    return Look(caption, {"most helpful": helpful, "most harmful": harmful}, row, query)


def _source(given: Any, name: str) -> Callable[[int], Card]:
    """What items look like, by their number.

    Raises:
        InvalidInput: if it is something else.
    """
    if given is None:
        return lambda _: None
    if callable(given):
        called: Callable[[int], Any] = given
        return called
    if hasattr(given, "iloc"):
        return lambda number: {str(key): value for key, value in given.iloc[number].to_dict().items()}
    if isinstance(given, list | tuple):
        return lambda number: given[number] if number < len(given) else None
    array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    if array.ndim in {2, 3, 4} and array.dtype.kind in "uifb":
        return lambda number: _seen(array[number])
    message = (
        f"{name} is a {type(given).__name__}{f' of {array.dtype}, {array.shape}' if array.ndim else ''}. Pass a "
        f"DataFrame, a list of texts, an array of pictures or of columns, or a function: {name}=lambda i: texts[i]."
    )
    raise InvalidInput(message)


def _seen(item: Any) -> Card:
    """Columns as they are, and a picture in 256 shades."""
    if item.ndim == 1:
        return {str(column): value for column, value in enumerate(item.tolist())}
    if item.ndim == 3 and item.shape[0] in {1, 3} and item.shape[2] not in {1, 3}:
        item = item.transpose(1, 2, 0)
    if item.dtype != np.uint8:
        shades = item.astype(np.float64)
        span = float(shades.max() - shades.min()) or 1.0
        item = ((shades - shades.min()) * (255 / span)).astype(np.uint8)
    return item[..., 0] if item.ndim == 3 and item.shape[2] == 1 else item
