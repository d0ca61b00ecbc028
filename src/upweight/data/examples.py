"""Indexed data: row i of the training set, or of the queries, is asked for as i; it may have a name beside its number.

An example is `(x, y)`, or just `x` when there is no target, or whatever item a map-style Dataset returns. A batch is
the same nesting with a leading axis. Arrays are never copied as a whole; a batch is a view where the memory allows, and
rows that lie in a file stay there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from upweight.data.arrays import (
    as_array,
    as_tensor,
    check_finite,
    checked_rows,
    checked_weights,
    of_tensor,
    refuse_sparse_targets,
    with_lines,
)
from upweight.data.ids import named, names_of
from upweight.data.records import Records, padded
from upweight.data.stored import stored
from upweight.data.tables import columns_of
from upweight.data.trees import batch_length, leaves, take, tree_map
from upweight.errors import InvalidInput, NotDeterministic

PROBE_ROWS = 32
_SUMMED_ROWS = 1024
_HASHED_ROWS = 2**16


class Examples:
    """n examples with row numbers 0 … n−1, one weight each, and names where they have some.

    Args:
        X: array, tensor, SciPy sparse matrix or DataFrame with n rows; or a map-style Dataset (`__len__` and
            `__getitem__`) of examples, for which `y` is omitted; or a memmap, a zarr array, or a table of pyarrow or
            Hugging Face whose other columns are features, which are read when rows are asked for.
        y: array, tensor or Series with n rows, or the name of a table's column; omitted when an example has no target.
        sample_weight: (n,) non-negative weights wᵢ of R(θ) = (1/n) Σ wᵢ L(zᵢ, θ) + r(θ); None means all ones.
        ids: n different names, one for each row; None takes the index of a DataFrame or Series, or a Dataset's column
            `id` or `idx` or its attribute `ids`, where that names every row once. Names stand beside values in every
            table and file; rows are asked for by number.

    Raises:
        InvalidInput: if there are no rows, lengths differ, a value is NaN, infinite or not a number, two rows have one
            name, or the indexes of X and y hold the same names in another order.
        NotDeterministic: if the dataset gives different items for the same index.

    >>> examples = Examples(np.eye(3), np.array([0, 1, 1]))
    >>> len(examples), [tuple(leaf.shape) for leaf in examples.batch([2, 0])]
    (3, [(2, 3), (2,)])
    """

    def __init__(self, X: Any, y: Any = None, *, sample_weight: Any = None, ids: Any = None) -> None:
        if y is not None or not _is_dataset(X):
            X, y, ids = columns_of(stored(X), y, ids)
        self.dataset = X if _is_dataset(X) else None
        self._stack: Callable[[list[Any]], Any] = X.stacked if isinstance(X, Records) else stacked
        if self.dataset is not None and y is not None:
            message = (
                "X is a Dataset that already yields whole examples, and y was given too. Omit y, or pass two arrays."
            )
            raise InvalidInput(message)
        self.x = None if self.dataset is not None else as_array(X, "X")
        self.y = None if y is None else as_array(y, "y")
        self.length = len(self.dataset) if self.x is None else int(self.x.shape[0])  # type: ignore[arg-type]
        if self.length == 0:
            message = (
                "There are no examples: X has 0 rows. An influence is a sum over at least one row; check the "
                "filter that made X."
            )
            raise InvalidInput(message)
        refuse_sparse_targets(self.y)
        if self.y is not None and len(self.y) != self.length:
            message = (
                f"X has {self.length} rows and y has {len(self.y)}. They must describe the same examples in the "
                "same order: pass one label per row of X."
            )
            raise InvalidInput(message)
        for array, name in ((self.x, "X"), (self.y, "y")):
            check_finite(array, name)
        if self.dataset is not None:
            self._check_dataset()
        self.names = names_of(X, y, ids, self.length)
        self.sample_weight = checked_weights(sample_weight, self.length)
        self.weights = self.sample_weight  # an adapter multiplies the weight of each row's class in
        self._targets: Tensor | None = None  # of a Dataset, once they were read
        self.changed = False  # whether rows are others than those that the model was trained on
        self.encoded_by: object = None  # the encoder that made these from a user's X and y; it leaves them as they are

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        shapes = self.dataset.__class__.__name__ if self.x is None else f"X {tuple(self.x.shape)}"
        return f"Examples(n={self.length}, {shapes})"

    @property
    def ids(self) -> NDArray[Any] | None:
        """(n,) the names of the rows; None if they have none."""
        return None if self.names is None else self.names.values

    def named(self, ids: Any) -> Examples:
        """The same rows by these names; nothing is copied.

        Raises:
            InvalidInput: if they are not n different names.
        """
        other = copy(self)
        other.names = named(ids, self.length)
        return other

    def batch(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> Any:
        """The examples of these rows, stacked along a new first axis."""
        if self.dataset is not None:
            numbers = range(*rows.indices(self.length)) if isinstance(rows, slice) else rows
            return _collate([self.dataset[int(row)] for row in numbers], numbers, self._stack)
        x = as_tensor(self.x[rows])  # type: ignore[index]
        return x if self.y is None else (x, as_tensor(self.y[rows]))

    def rows(self, rows: Any) -> NDArray[np.int64]:
        """`rows` as checked row numbers; None means all of them.

        Raises:
            RowOutOfRange: if a row is not in 0 … n−1 (negative numbers do not count from the end).
            InvalidInput: if rows are not whole numbers, or there are none.
        """
        return checked_rows(rows, self.length)

    def groups(self, groups: Any) -> list[NDArray[np.int64]]:
        """Checked row numbers of each group; `groups` is a list of rows, of lists of rows, or a dict of them.

        Raises:
            InvalidInput: if there are no groups, or a group names a row twice.
        """
        values = groups.values() if isinstance(groups, Mapping) else groups
        listed = list(values) if isinstance(values, Iterable) else [values]
        if not listed or any(group is None for group in listed):
            message = f"groups is {'empty' if not listed else 'None'}. Pass a list of rows, or a list of lists of rows."
            raise InvalidInput(message)
        members = [self.rows(group) for group in listed]
        for number, group in enumerate(members):
            if len(np.unique(group)) < len(group):
                message = (
                    f"Group {number} names a row twice; a row can be removed only once. Use np.unique on the group."
                )
                raise InvalidInput(message)
        return members

    def carrying(self, x: Any, y: Any) -> Examples:
        """The same rows and weights with other, already checked inputs and targets; nothing is copied."""
        other = copy(self)
        other.x, other.y = x, y
        return other

    def subset(self, rows: NDArray[np.int64]) -> Examples:
        """These rows, with their weights, as Examples of their own; arrays are copied."""
        other = copy(self)
        other.length = len(rows)
        other.names = None if self.names is None else self.names.take(rows)
        other.sample_weight, other.weights = self.sample_weight[rows], self.weights[rows]
        if self.dataset is not None:
            other.dataset = _Rows(self.dataset, rows)
        else:
            other.x = self.x[rows]  # type: ignore[index]
            other.y = None if self.y is None else self.y[rows]
        return other

    def blocks(self, size: int) -> Iterator[Examples]:
        """The rows in order, `size` at a time, as Examples of their own."""
        return (self.subset(np.arange(start, min(start + size, self.length))) for start in range(0, self.length, size))

    def only(self, row: int) -> Examples:
        """One example as Examples of their own; its row number becomes 0."""
        whole = self.dataset is not None
        y = None if self.y is None else self.y[[row]]
        one = Examples(_Rows(self.dataset, [row])) if whole else Examples(self.x[[row]], y)  # type: ignore[index]
        one.encoded_by, one._stack = self.encoded_by, self._stack
        one.names = None if self.names is None else self.names.take([row])
        return one

    def targets(self) -> Tensor | None:
        """y of every row as a tensor, None where examples are no (x, y) pairs.  Cost: a Dataset is read once."""
        if self.dataset is None:
            return None if self.y is None else as_tensor(self.y)
        if self._targets is None:
            first = self.batch([0])
            if not isinstance(first, tuple | list) or len(first) != 2 or not isinstance(first[1], Tensor):
                return None
            self._targets = _of_all([self.batch([row])[1][0] for row in range(self.length)])
        return self._targets

    def edited(self, rows: NDArray[np.int64], x: Any, y: Any, weights: NDArray[np.float64]) -> Examples:
        """The same rows with other lines in the places of some, and their new weights; rows are named once each.

        Cost: a copy of the inputs, unless x is None.

        Args:
            rows: where.
            x: new inputs; None keeps them. For a Dataset whole new Examples.
            y: new targets; None keeps them.
            weights: (r,) of these rows.

        Raises:
            InvalidInput: if the new lines do not have the form of the old ones.
        """
        other = copy(self)
        other.changed, other._targets = True, None
        if self._targets is not None and isinstance(x, Examples):
            other._targets = with_lines(self._targets, rows, x.targets(), "y_new")
        other.weights = self.weights.copy()
        other.weights[rows] = weights
        if self.dataset is not None:
            other.dataset = _Edited(self, rows, x)
        else:
            other.x = with_lines(self.x, rows, x, "X_new")
            other.y = with_lines(self.y, rows, y, "y_new")
        return other

    def relabelled(self, rows: NDArray[np.int64], targets: Tensor) -> Examples:
        """The examples of these rows with other targets.

        Raises:
            InvalidInput: if the examples have no target, or the new ones have another shape.
        """
        batch = self.batch(rows)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            message = (
                "These examples are not (x, y) pairs, so there is no label to change. Use of_replacing with whole new "
                "examples."
            )
            raise InvalidInput(message)
        if batch[1].shape == (len(targets), 1) and targets.ndim == 1:
            targets = targets[:, None]
        if targets.shape != batch[1].shape:
            message = (
                f"y_new has shape {tuple(targets.shape)}, and the labels of {len(rows)} rows have "
                f"{tuple(batch[1].shape)}. Pass one new label per row."
            )
            raise InvalidInput(message)
        as_before = targets.to(batch[1].dtype)
        new = as_before if bool((as_before == targets).all()) else targets
        other = Examples(batch[0], new) if self.dataset is None else Examples(_Stacked((batch[0], new)))
        other.encoded_by = self.encoded_by  # the inputs are as they were, and the targets are encoded
        other.names = None if self.names is None else self.names.take(rows)
        return other

    def fingerprint(self) -> str:
        """A short hash of n, the weights, the targets, a weighted sum over all inputs, and a few of their rows."""
        digest = hashlib.sha256(f"{self.length}".encode())
        if self.y is not None:
            digest.update(np.ascontiguousarray(np.asarray(self.y)).reshape(-1).view(np.uint8).data)
        if self.x is not None:
            digest.update(f"{self._weighted_sum():.8g}".encode())
        for leaf in leaves(self.batch(self.spread(PROBE_ROWS))):
            array = leaf.toarray() if scipy.sparse.issparse(leaf) else of_tensor(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        for start in range(0, self.length, _HASHED_ROWS):
            digest.update(self.weights[start : start + _HASHED_ROWS].tobytes())
        return digest.hexdigest()[:16]

    def spread(self, count: int) -> NDArray[np.int64]:
        """At most `count` different rows, spread evenly from the first to the last."""
        return np.unique(np.linspace(0, self.length - 1, count).astype(np.int64))

    def _weighted_sum(self) -> float:
        """Σ cos(i) Σ cos(j) xᵢⱼ, which a changed entry or two exchanged rows change.  Cost: one pass over the data."""
        total, within = 0.0, np.arange(_SUMMED_ROWS)
        cosines, sines = np.cos(within), np.sin(within)
        for start in range(0, self.length, _SUMMED_ROWS):
            block = self.x[start : start + _SUMMED_ROWS]  # type: ignore[index]
            if isinstance(block, Tensor):
                block = of_tensor(block)
            if not scipy.sparse.issparse(block):
                block = block.reshape(len(block), -1).astype(np.float64)
            across = block @ np.cos(np.arange(block.shape[1]))
            of_rows = np.cos(start) * cosines - np.sin(start) * sines  # cos(start + i), without so many cosines
            total += float(of_rows[: block.shape[0]] @ across)
        return total

    def _check_dataset(self) -> None:
        for row in self.spread(3).tolist():
            first, second = (list(leaves(self.batch([row]))) for _ in range(2))
            same = len(first) == len(second) and all(
                a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
            )
            if not same:
                message = (
                    f"The dataset gave two different items for row {row}. Influence needs the example the model was "
                    "trained on, so a "
                    "random augmentation has to be switched off: pass a Dataset without random transforms."
                )
                raise NotDeterministic(message)


class _Stacked:
    """A batch as a map-style Dataset."""

    def __init__(self, batch: Any) -> None:
        self.stacked = batch

    def __len__(self) -> int:
        return batch_length(self.stacked)

    def __getitem__(self, row: int) -> Any:
        return take(self.stacked, row)


class _Edited:
    """Examples with others in the place of some rows, as a map-style Dataset."""

    def __init__(self, examples: Examples, rows: NDArray[np.int64], new: Examples) -> None:
        self.examples = examples
        self.new = new
        self.places = {int(row): place for place, row in enumerate(rows)}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Any:
        place = self.places.get(row)
        return take(self.examples.batch([row]), 0) if place is None else take(self.new.batch([place]), 0)


class _Rows:
    """Some items of a map-style Dataset."""

    def __init__(self, dataset: Any, rows: Sequence[int] | NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.numbers = rows

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[int(self.numbers[row])]


def stacked(items: list[Any]) -> Any:
    """Items along a new first axis; token numbers and labels of unequal length are padded."""
    return default_collate(padded(items))


def _of_all(targets: list[Tensor]) -> Tensor:
    """Targets of every row; labels of unequal length are padded as in a batch."""
    return stacked([({}, y) for y in targets])[1]


def _is_dataset(X: Any) -> bool:
    arraylike = (
        isinstance(X, np.ndarray | Tensor | list | tuple | Mapping | str | bytes)
        or scipy.sparse.issparse(X)
        or hasattr(X, "to_numpy")
        or hasattr(X, "__array__")
    )
    return not arraylike and hasattr(X, "__getitem__") and hasattr(X, "__len__")


def _collate(
    items: list[Any], numbers: Sequence[int] | NDArray[np.int64] | range, stack: Callable[[list[Any]], Any]
) -> Any:
    try:
        batch = tree_map(lambda leaf: leaf, stack(items))
    except (TypeError, RuntimeError, KeyError, ValueError) as error:
        message = (
            f"The dataset's items cannot be stacked into a batch ({error}). Items need to be numbers, arrays or "
            "tensors of the same shapes: convert, pad or crop them in the Dataset."
        )
        raise InvalidInput(message) from error
    for leaf in leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            message = (
                f"The dataset's items hold {kind}. An example is made of real numbers: return tensors, arrays or "
                "numbers from its __getitem__."
            )
            raise InvalidInput(message)
        bad = torch.nonzero(~torch.isfinite(leaf).flatten(1).all(1) if leaf.ndim > 1 else ~torch.isfinite(leaf))
        if len(bad):
            message = (
                f"Item {int(numbers[int(bad[0])])} of the dataset holds a NaN or infinite value, which makes every "
                "score NaN. Impute it, or leave the item out of training and explaining."
            )
            raise InvalidInput(message)
    return batch
