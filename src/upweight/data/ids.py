"""The names of rows: what a DataFrame's index, a Dataset's column `id`, or `ids=` calls them.

A name is a label beside the row's number, never instead of it: row i is still asked for as i. Names that were only
found count where they name every row once, and an index 0 … n−1 says no more than the numbers; `ids=` is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data.stored import Stored
from upweight.errors import InvalidInput

_ID_COLUMNS = ("id", "idx")  # of a Hugging Face dataset


@dataclass(frozen=True, eq=False)
class Ids:
    """One name for each row.

    Args:
        values: (n,) names: text, numbers, dates, tuples, or whatever else is hashable; no two are equal.
        name: what they are called, such as the name of a DataFrame's index; None if they are not called anything.
    """

    values: NDArray[Any]
    name: Any = None

    def take(self, rows: NDArray[np.int64] | Sequence[int]) -> Ids:
        """The names of these rows."""
        return Ids(self.values[np.asarray(rows, dtype=np.int64)], self.name)


def names_of(X: Any, y: Any, ids: Any, n: int) -> Ids | None:
    """The names of n rows: `ids`, or else what X or y brings along; None if neither names every row once.

    Raises:
        InvalidInput: if ids are no n different names, or X and y name the same rows in another order.
    """
    brought = [_brought(part) for part in (X, y)]
    _refuse_another_order(*brought)
    if ids is not None:
        return named(ids, n)
    first, second = (_usable(part, n) for part in brought)
    return first if first is not None else second


def named(ids: Any, n: int) -> Ids:
    """`ids` as the names of n rows.

    Args:
        ids: a list, array, Series or Index of names.
        n: the number of rows.

    Raises:
        InvalidInput: if they are not n different hashable names.
    """
    if isinstance(ids, str | bytes | Set | Mapping) or not isinstance(ids, Iterable):
        message = (
            f"ids is a {type(ids).__name__}, which is no list of names. Pass one name for each of the {n} rows, in the "
            "order of X, such as ids=frame['id']."
        )
        raise InvalidInput(message)
    values = _values(ids)
    if values.shape != (n,):
        shape = f"{len(values)} names" if values.ndim == 1 else f"shape {values.shape}"
        message = f"ids has {shape}, and there are {n} rows. Pass one name for each row, in the order of X."
        raise InvalidInput(message)
    problem = _problem(values)
    if problem:
        message = f"ids {problem}. Every row needs a name of its own: pass another column, or ids=None for none."
        raise InvalidInput(message)
    return Ids(values, _name(ids))


def of_keys(groups: Any) -> Ids | None:
    """The names of groups: the keys of a dict; None for a list of groups."""
    return Ids(_values(list(groups)), "group") if isinstance(groups, Mapping) else None


def same_names(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    """Whether these are the same names, or both are none."""
    return a is b or (a is not None and b is not None and a.tolist() == b.tolist())


def packed(values: NDArray[Any]) -> dict[str, Any]:
    """Names ready for JSON; what is no text, number, date or tuple of these becomes its text."""
    if values.dtype.kind in "Mm":
        return {"dtype": values.dtype.str, "values": values.astype(np.int64).tolist()}
    plain = values.astype(str) if values.dtype.kind == "S" else values
    return {
        "dtype": "object" if plain.dtype == object else plain.dtype.str,
        "values": [as_json(v) for v in plain.tolist()],
    }


def unpacked(told: dict[str, Any]) -> NDArray[Any]:
    """Names that were `packed`."""
    if told["dtype"] == "object":
        return _objects([as_told(value) for value in told["values"]])
    kind = np.dtype(told["dtype"])
    return np.array(told["values"], dtype=np.int64 if kind.kind in "Mm" else kind).astype(kind)


def as_told(value: Any) -> Any:
    """A name as JSON gives it back: a list was a tuple."""
    return tuple(as_told(part) for part in value) if isinstance(value, list) else value


def as_json(value: Any) -> Any:
    """A name as JSON holds it: a tuple as a list, anything unknown as its text."""
    if isinstance(value, tuple):
        return [as_json(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def in_json(values: NDArray[Any]) -> list[Any]:
    """Names as a list for people who read JSON: dates as text."""
    return [as_json(name) for name in (values.astype(str) if values.dtype.kind in "MmS" else values).tolist()]


def text_of(name: Any) -> str:
    """A name in a line of a table: one line of at most 32 characters."""
    text = " ".join(str(name).split())
    return text if len(text) <= 32 else f"{text[:31]}…"


def _brought(part: Any) -> Any:
    """The index of a DataFrame or Series, the ids of a Dataset; None for what has none."""
    if isinstance(part, Stored):
        return part.ids
    index = getattr(part, "index", None)
    if hasattr(index, "to_numpy"):
        return index
    if hasattr(part, "to_numpy") or hasattr(part, "__array__"):
        return None
    columns = getattr(part, "column_names", None)
    column = next((name for name in _ID_COLUMNS if isinstance(columns, list) and name in columns), None)
    own = getattr(part, "ids", None) if column is None else part[column]
    return own if isinstance(own, Iterable) and not isinstance(own, str | bytes) else None


def _usable(brought: Any, n: int) -> Ids | None:
    """What was brought along, if it names n rows once each, by more than their numbers."""
    if brought is None:
        return None
    values = _values(brought)
    if values.shape != (n,) or (values.dtype.kind in "iu" and np.array_equal(values, np.arange(n))):
        return None
    return None if _problem(values) else Ids(values, _name(brought))


def _refuse_another_order(first: Any, second: Any) -> None:
    """Refuse two lists of the same names in different orders; also of names that repeat, and of 0 … n−1."""
    if first is None or second is None:
        return
    one, other = _values(first), _values(second)
    if one.shape != other.shape or one.ndim != 1 or np.array_equal(one, other):
        return
    a, b = one.tolist(), other.tolist()
    try:
        counts = Counter(a)
        if counts != Counter(b):
            return
    except TypeError:  # not hashable: no names
        return
    differ = [row for row, (name, another) in enumerate(zip(a, b, strict=True)) if name != another]
    if not differ:
        return
    advice = "Pass y.loc[X.index], and refit if fit() was given the same"
    if len(counts) < len(a):
        name, times = counts.most_common(1)[0]
        advice = (
            f"{times} rows are called {name!r}, so names cannot bring y into order: shuffle both as one frame, X = "
            "frame[columns] and y = frame[target], and fit again"
        )
    row = differ[0]
    message = (
        f"X and y name the same {len(a)} rows in another order: row {row} is {a[row]!r} in X and {b[row]!r} in y "
        f"({len(differ)} rows differ). Rows are paired by position, so rows have the targets of others, usually "
        "because one of the two was sorted, shuffled or given a new index alone. "
        f"{advice}; or, if the positions are right, pass y.to_numpy()."
    )
    raise InvalidInput(message)


def _values(ids: Any) -> NDArray[Any]:
    """Names as an array; whatever is no array of numbers, dates or text stays as the objects it is."""
    if hasattr(ids, "to_numpy") or hasattr(ids, "__array__"):
        array = ids.to_numpy() if hasattr(ids, "to_numpy") else np.asarray(ids)
        return array if array.dtype != object or array.ndim != 1 else _objects(array.tolist())
    listed = [_plain(value) for value in ids]
    if listed and all(type(value) is int for value in listed):
        return np.array(listed)
    return _objects(listed)


def _objects(listed: list[Any]) -> NDArray[Any]:
    return np.fromiter((_plain(value) for value in listed), dtype=object, count=len(listed))  # tuples stay whole


def _plain(value: Any) -> Any:
    """A name without NumPy's or torch's wrapping; a date is left as it is."""
    if isinstance(value, tuple):
        return tuple(_plain(part) for part in value)
    single = hasattr(value, "item") and not isinstance(value, np.datetime64 | np.timedelta64)
    return value.item() if single and getattr(value, "ndim", 1) == 0 else value


def _name(ids: Any) -> Any:
    """What an Index or a Series is called; the names of its levels for an index of several."""
    names = getattr(ids, "names", None)
    if names is not None and len(names) > 1:
        return tuple(names) if any(name is not None for name in names) else None
    return getattr(ids, "name", None)


def _problem(values: NDArray[Any]) -> str:
    """Why these are no names, in words; empty if they are."""
    listed = values.tolist()
    some = values if values.dtype.kind in "OfMm" else ()
    missing = next((row for row, value in enumerate(some) if _is_missing(value)), None)
    if missing is not None:
        return f"has no name for row {missing} ({listed[missing]!r})"
    try:
        counts = Counter(listed)
    except TypeError:
        return f"holds a {type(listed[0]).__name__}, which is not hashable"
    if len(counts) == len(listed):
        return ""
    twice, times = counts.most_common(1)[0]
    rows = [row for row, value in enumerate(listed) if value == twice]
    return f"gives {times} rows the name {twice!r}, rows {rows[0]} and {rows[1]} among them"


def _is_missing(value: Any) -> bool:
    """None, NaN, NaT or pandas' NA: what is not equal to itself."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):
        return True
