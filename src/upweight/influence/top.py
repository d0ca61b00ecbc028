"""The rows that lead: how they are found among values, and how they are shown as text, HTML and a DataFrame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from upweight.data import markup
from upweight.data.ids import names_of, text_of
from upweight.errors import InvalidInput, require

if TYPE_CHECKING:
    import pandas as pd

_QUERIES, _ROWS = 5, 3  # that a printed table shows
SHOWN = 6  # enough of both for such a table, one more to say that there are others
HELPFUL, HARMFUL = "most helpful (value)", "most harmful (value)"
_OWN = ("query", "row", "value")  # columns of a table of rows


@dataclass(frozen=True)
class TopK:
    """The k rows that help or harm most, strongest first; it unpacks as `rows, values = top`.

    Args:
        rows: (q, k) row numbers; (k,) of self-scores.
        values: their values.
        ids: their names, in the same shape; None if rows have none.
        query_ids: (q,) the names of the queries; None if they have none.
    """

    rows: Int[NDArray[np.int64], "q k"]
    values: Float[NDArray[np.float64], "q k"]
    ids: Shaped[NDArray[Any], "q k"] | None = None
    query_ids: Shaped[NDArray[Any], " q"] | None = None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter((self.rows, self.values))

    def __repr__(self) -> str:
        queries = f"{self._queries} queries × " if self.rows.ndim == 2 else ""
        return f"TopK({queries}{self.rows.shape[-1]} rows)"

    def __str__(self) -> str:
        return f"{self!r}\n{text_table({'row (value)': self}, self._queries)}"

    def _repr_html_(self) -> str:
        return html_table(repr(self), {"row (value)": self}, self._queries)

    @property
    def _queries(self) -> int:
        return len(self.rows) if self.rows.ndim == 2 else 0

    @staticmethod
    def joined(tops: Sequence[TopK]) -> TopK:
        """The rows of several blocks of queries, one below the other."""

        def stacked(name: str) -> Any:
            parts = [getattr(top, name) for top in tops]
            return None if parts[0] is None else np.concatenate(parts)

        return TopK(stacked("rows"), stacked("values"), stacked("ids"), stacked("query_ids"))


def top_columns(keys: Float[NDArray[np.float64], "q r"], k: int) -> Int[NDArray[np.int64], "q k"]:
    """The columns of the k smallest keys of every line, smallest first, NaN last; ties go to the lower column.

    Raises:
        InvalidInput: if k is not between 1 and the number of columns.
    """
    checked_k(k, keys.shape[1])
    return np.stack([_smallest(line, k) for line in keys])


def checked_k(k: int, columns: int) -> None:
    """Refuse to choose more columns than there are.

    Raises:
        InvalidInput: if k is not between 1 and the number of columns.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= columns:
        message = f"k={k}, and there are {columns} columns to choose from. Ask for 1 to {columns}."
        raise InvalidInput(message)


def _smallest(line: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    if np.isnan(line).any():
        return np.argsort(line, kind="stable")[:k]  # which puts NaN last
    threshold = np.partition(line, k - 1)[k - 1]
    candidates: NDArray[Any] = np.flatnonzero(line <= threshold)
    return candidates[np.argsort(line[candidates], kind="stable")][:k]


# ---- text and HTML -----------------------------------------------------------------------------------------------


def text_table(sides: Mapping[str, TopK], queries: int) -> str:
    """The first rows of the first of so many queries, a line for each kind of rows; no queries for self-scores."""
    width = max(map(len, sides))
    lines = [
        f"{f'{query:<12} ' if queries else ''}{kind:<{width}}  {', '.join(_cells(top, place))}".strip()
        for place, query in _queries(sides)
        for kind, top in sides.items()
    ]
    return "\n".join([*lines, *_more(queries)])


def html_table(caption: str, sides: Mapping[str, TopK], queries: int, note: str = "") -> str:
    """The same as a table for notebooks; everything that users name is escaped."""

    def unbroken(cells: list[str]) -> str:
        return ", ".join(markup.text(cell).replace(" ", "&nbsp;") for cell in cells)

    lines = [
        [markup.text(query), *(unbroken(_cells(top, place)) for top in sides.values())]
        for place, query in _queries(sides)
    ]
    shown = markup.table(caption, ["", *sides], lines)
    return markup.frame(shown, *map(markup.remark, [*_more(queries), note]))


def _queries(sides: Mapping[str, TopK]) -> list[tuple[int, str]]:
    """The queries that are shown: place and name; one without a name for self-scores."""
    top = next(iter(sides.values()))
    if top.rows.ndim == 1:
        return [(0, "")]
    names = top.query_ids
    return [(q, f"query {q if names is None else text_of(names[q])}") for q in range(min(_QUERIES, len(top.rows)))]


def _more(queries: int) -> list[str]:
    return [f"… and {queries - _QUERIES} more queries"] if queries > _QUERIES else []


def _cells(top: TopK, place: int) -> list[str]:
    """The first rows of a query, by their names where they have some, with their values."""
    rows, values = np.atleast_2d(top.rows)[place], np.atleast_2d(top.values)[place]
    names = rows if top.ids is None else np.atleast_2d(top.ids)[place]
    cells = [f"{text_of(name)} ({value:+.3g})" for name, value in zip(names[:_ROWS], values[:_ROWS], strict=True)]
    return [*cells, "…"] if len(rows) > _ROWS else cells


# ---- DataFrames --------------------------------------------------------------------------------------------------


def index_of(ids: NDArray[Any] | None, numbers: Any, name: Any) -> pd.Index:
    """The pandas index of names, or of numbers where there are none; tuples become the levels that they were."""
    pandas = require("pandas", "pandas")
    if ids is None:
        return pandas.Index(numbers, name=name)
    if ids.dtype == object and all(isinstance(value, tuple) and len(value) == len(ids[0]) for value in ids):
        return pandas.MultiIndex.from_tuples(ids.tolist(), names=name if isinstance(name, tuple) else None)
    return pandas.Index(ids, name=name, tupleize_cols=False)


def frame_of(top: TopK, axis: Any, data: Any, n: int) -> pd.DataFrame:
    """One line per row that leads: its query, number and value, and what `data` holds of it; the index are its names.

    Args:
        top: the rows.
        axis: what the names of rows, or their numbers, are called.
        data: what is known of n rows: a DataFrame, Series, array or list; None for nothing.
        n: how many lines data must have.

    Raises:
        InvalidInput: if data do not have n lines, or lack a row, or a column has the name of one of the table's own.
    """
    pandas = require("pandas", "pandas")
    rows, ids = top.rows.ravel(), None if top.ids is None else top.ids.ravel()
    columns: dict[str, Any] = {}
    if top.rows.ndim == 2:
        queries = np.arange(len(top.rows)) if top.query_ids is None else top.query_ids
        columns["query"] = [query for query in queries.tolist() for _ in range(top.rows.shape[1])]
    if ids is not None:
        columns["row"] = rows
    index = index_of(ids, rows, axis)
    table = pandas.DataFrame(columns | {"value": top.values.ravel()}, index=index)
    if data is None:
        return table
    lines = _lines(data, _places(data, rows, ids, n))
    taken = [name for name in _OWN if name in lines.columns]
    if taken:
        message = (
            f"data has a column {', '.join(map(repr, taken))}, which is what a column of the table is called. Rename "
            "it: data=frame.add_prefix('data_')."
        )
        raise InvalidInput(message)
    return pandas.concat([table, lines.set_axis(index)], axis=1)


def _places(data: Any, rows: NDArray[np.int64], ids: NDArray[Any] | None, n: int) -> list[int]:
    """Where in data the rows are: by name where both have names, by number otherwise.

    Raises:
        InvalidInput: if data do not have n lines, or lack a row.
    """
    size = data.shape[0] if hasattr(data, "shape") else len(data) if hasattr(data, "__len__") else None
    if size != n or isinstance(data, str | bytes | Mapping):
        other = size is None or isinstance(data, str | bytes | Mapping)
        what = f"is a {type(data).__name__}" if other else f"has {size} lines"
        message = f"data {what}, and there are {n} rows. Pass what the rows were made from, one line for each row."
        raise InvalidInput(message)
    names = None if ids is None else names_of(data, None, None, n)
    if ids is None or names is None:
        return rows.tolist()
    places = {name: place for place, name in enumerate(names.values.tolist())}
    lacking = [name for name in ids.tolist() if name not in places]
    if lacking:
        lacked = (
            f"data has no row named {lacking[0]!r}: its index starts with {names.values.tolist()[0]!r}. Pass the frame "
            "that was explained; or, if its lines are in the same order, data=frame.reset_index(drop=True)."
        )
        raise InvalidInput(lacked)
    return [places[name] for name in ids.tolist()]


def _lines(data: Any, places: list[int]) -> pd.DataFrame:
    """These lines of data, of whatever kind they are, as a DataFrame."""
    pandas = require("pandas", "pandas")
    if isinstance(data, pandas.Series | pandas.DataFrame):
        return pandas.DataFrame(data.iloc[places]).rename(
            columns={0: "data"} if getattr(data, "name", 0) is None else {}
        )
    if hasattr(data, "to_list") and hasattr(data, "to_frame"):  # a Series of polars
        return pandas.DataFrame({data.name or "data": data[places].to_list()})
    if hasattr(data, "to_dict"):  # a DataFrame of polars
        return pandas.DataFrame(data[places].to_dict(as_series=False))
    if hasattr(data, "toarray"):
        return pandas.DataFrame(data[places].toarray())
    if hasattr(data, "__array__") and np.ndim(data) == 2:
        return pandas.DataFrame(np.asarray(data)[places])
    return pandas.DataFrame({"data": [data[place] for place in places]})
