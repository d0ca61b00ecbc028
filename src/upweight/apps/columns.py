"""Which columns of a table are one feature: the categories of a variable that was coded as 0 and 1."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from upweight.errors import InvalidInput


def one_hot_groups(X: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Columns that are the categories of one variable: neighbours of one prefix, 0 or 1, never two of them at once.

    The prefix is the name up to its last "_", as OneHotEncoder and pandas.get_dummies write it; a column that shares it
    with no neighbour stays on its own. Every column is in exactly one feature. A group has its prefix for a name; where
    a column or an earlier group has that name already, "prefix_*", then "prefix_*2" and so on. Columns of equal names
    are told apart by their number: "a", "a (column 2)".

    Args:
        X: (n, d) inputs, dense or sparse.
        names: of the d columns.

    Raises:
        InvalidInput: if the number of names is not that of the columns.

    >>> one_hot_groups([[3, 1, 0], [4, 0, 1]], ["size", "sex_f", "sex_m"])
    {'size': [0], 'sex': [1, 2]}
    >>> one_hot_groups([[3, 1, 0], [4, 0, 1]], ["age", "age_young", "age_old"])
    {'age': [0], 'age_*': [1, 2]}
    """
    table = X if scipy.sparse.issparse(X) else np.asarray(X)
    if table.ndim != 2 or table.shape[1] != len(names):
        message = f"X has shape {tuple(table.shape)} and there are {len(names)} names. Pass one name per column."
        raise InvalidInput(message)
    if scipy.sparse.issparse(table):
        table = scipy.sparse.csc_matrix(table, copy=True)  # columns are cut out of it
        table.sum_duplicates()
        table.eliminate_zeros()
    found: dict[str, list[int]] = {}
    single, start = unique(names), 0
    taken = set(single)
    while start < len(names):
        prefix, end = names[start].rpartition("_")[0], start + 1
        while prefix and end < len(names) and names[end].rpartition("_")[0] == prefix:
            end += 1
        if end - start > 1 and _exclusive(table[:, start:end]):
            name = next(name for name in _group_names(prefix) if name not in taken)
            taken.add(name)
            found[name] = list(range(start, end))
        else:
            found.update({single[j]: [j] for j in range(start, end)})
        start = end
    return found


def unique(names: Sequence[str]) -> list[str]:
    """The same names, with the column's number behind those that came before."""
    known: set[str] = set(names)
    seen: set[str] = set()
    out = []
    for j, name in enumerate(names):
        other = name
        while other in seen or (other != name and other in known):
            other = f"{other} (column {j})"
        seen.add(other)
        out.append(other)
    return out


def _group_names(prefix: str) -> Iterator[str]:
    """What a group of this prefix may be called, in the order of preference."""
    yield prefix
    yield f"{prefix}_*"
    yield from (f"{prefix}_*{number}" for number in itertools.count(2))


def _exclusive(columns: Any) -> bool:
    """Whether there are zeros and ones alone, and at most a single one in every row."""
    if scipy.sparse.issparse(columns):
        return bool((columns.data == 1).all()) and len(np.unique(columns.indices)) == columns.nnz
    return bool(((columns == 0) | (columns == 1)).all()) and bool(columns.sum(1).max() <= 1)


def grouped_columns(groups: Mapping[str, Sequence[Any]], names: list[str]) -> dict[str, NDArray[np.int64]]:
    """Feature → column numbers, with the columns of no group on their own.

    Raises:
        InvalidInput: if a group names a column that does not exist or is not the only one of its name, if two groups
            hold one column, or if two features would have one name.
    """
    numbers, counts = {name: j for j, name in enumerate(names)}, Counter(names)
    found: dict[str, NDArray[np.int64]] = {}
    for name, members in groups.items():
        _check_names(str(name), members, counts, found)
        own = [numbers.get(member, -1) if isinstance(member, str) else int(member) for member in members]
        if not own or min(own) < 0 or max(own) >= len(names):
            message = (
                f"feature_groups['{name}'] names columns that do not exist: {list(members)[:8]}; there are "
                f"{len(names)} columns, the first {', '.join(names[:5])}. Use their names or their numbers."
            )
            raise InvalidInput(message)
        found[str(name)] = np.array(own, dtype=np.int64)
    taken = np.concatenate([*found.values(), np.zeros(0, dtype=np.int64)])
    if len(np.unique(taken)) < len(taken):
        twice = names[int(np.argmax(np.bincount(taken)))]
        message = (
            f"feature_groups holds column '{twice}' twice. A column belongs to one feature; leave one of them out."
        )
        raise InvalidInput(message)
    held, single = set(taken.tolist()), unique(names)
    alone = {single[j]: np.array([j]) for j in range(len(names)) if j not in held}
    both = sorted(set(found) & set(alone))
    if both:
        message = (
            f"'{both[0]}' is also the name of column {int(alone[both[0]][0])}, which is not in "
            f"feature_groups['{both[0]}']. Give the group another name, or put the column into it."
        )
        raise InvalidInput(message)
    return found | alone


def _check_names(name: str, members: Sequence[Any], counts: Counter[str], found: Mapping[str, Any]) -> None:
    """Raises where a name means two things.

    Raises:
        InvalidInput: if there is such a group already, or a column is named that is not the only one of its name.
    """
    if name in found:
        message = f"In feature_groups two groups are called '{name}'. Give every group a name of its own."
        raise InvalidInput(message)
    several = [member for member in members if isinstance(member, str) and counts[member] > 1]
    if several:
        message = (
            f"feature_groups['{name}'] names '{several[0]}', and '{several[0]}' is the name of "
            f"{counts[several[0]]} columns. Use the column's number."
        )
        raise InvalidInput(message)
