"""Which columns of a table are one feature: the categories of a variable that was coded as 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from upweight.errors import InvalidInput


def one_hot_groups(X: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Columns that are the categories of one variable: neighbours of one prefix, 0 or 1, never two of them at once.

    The prefix is the name up to its last "_", as OneHotEncoder and pandas.get_dummies write it; a column that shares it
    with no neighbour stays on its own.

    Args:
        X: (n, d) inputs, dense or sparse.
        names: of the d columns.

    Raises:
        InvalidInput: if the number of names is not that of the columns.

    >>> one_hot_groups([[3, 1, 0], [4, 0, 1]], ["size", "sex_f", "sex_m"])
    {'size': [0], 'sex': [1, 2]}
    """
    table = X if scipy.sparse.issparse(X) else np.asarray(X)
    if table.ndim != 2 or table.shape[1] != len(names):
        message = f"X has shape {tuple(table.shape)} and there are {len(names)} names. Pass one name per column."
        raise InvalidInput(message)
    binary = [_binary(table[:, [j]]) for j in range(len(names))]
    found: dict[str, list[int]] = {}
    start = 0
    while start < len(names):
        prefix, end = names[start].rpartition("_")[0], start + 1
        while prefix and end < len(names) and names[end].rpartition("_")[0] == prefix:
            end += 1
        columns = list(range(start, end))
        if len(columns) > 1 and all(binary[j] for j in columns) and table[:, columns].sum(1).max() <= 1:
            found[prefix] = columns
        else:
            found.update({names[j]: [j] for j in columns})
        start = end
    return found


def _binary(column: Any) -> bool:
    values = column.data if scipy.sparse.issparse(column) else column
    return bool(np.isin(values, (0, 1)).all())


def grouped_columns(groups: Mapping[str, Sequence[Any]], names: list[str]) -> dict[str, NDArray[np.int64]]:
    """Feature → column numbers, with the columns of no group on their own.

    Raises:
        InvalidInput: if a group names a column that does not exist, or two groups one column.
    """
    numbers = {name: j for j, name in enumerate(names)}
    found: dict[str, NDArray[np.int64]] = {}
    for name, members in groups.items():
        own = [numbers.get(member, -1) if isinstance(member, str) else int(member) for member in members]
        if not own or min(own) < 0 or max(own) >= len(names):
            message = (
                f"feature_groups['{name}'] names columns that do not exist: {list(members)[:8]}; there are "
                f"{len(names)} "
                f"columns, the first {', '.join(names[:5])}. Use their names or their numbers."
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
    return found | {name: np.array([j]) for j, name in enumerate(names) if j not in set(taken.tolist())}
