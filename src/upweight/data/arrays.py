"""What a user passes as an array: read as numbers, refused by name when it holds none; nothing is copied as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from upweight.data.stored import Stored
from upweight.errors import InvalidInput, RowOutOfRange

_CHECK_ROWS = 65_536
_WIDE = 4  # bytes of a float in which a sum of finite numbers rarely overflows


def with_lines(array: Any, rows: NDArray[np.int64], new: Any, name: str) -> Any:
    """A copy of the array with other lines; the array itself when its own lines are given. One in a file stays there.

    Raises:
        InvalidInput: if the lines have another shape.
    """
    if new is None or array is None:
        return array
    if isinstance(new, Stored):
        new = np.asarray(new)
    if tuple(new.shape[1:]) != tuple(array.shape[1:]):
        message = f"{name} has lines of shape {tuple(new.shape[1:])}, and those of the training rows have "
        raise InvalidInput(message + f"{tuple(array.shape[1:])}. Pass new examples of the same form.")
    if isinstance(array, Stored):
        dense = new.toarray() if scipy.sparse.issparse(new) else new
        return array.with_lines(rows, dense.detach().cpu().numpy() if isinstance(dense, Tensor) else dense)
    if scipy.sparse.issparse(array) or scipy.sparse.issparse(new):
        order = np.arange(array.shape[0])
        order[rows] = array.shape[0] + np.arange(len(rows))
        return scipy.sparse.vstack([scipy.sparse.csr_matrix(array), scipy.sparse.csr_matrix(new)]).tocsr()[order]
    if isinstance(array, Tensor) or isinstance(new, Tensor):
        old, lines = as_tensor(array), as_tensor(new)
        out = old.to(torch.promote_types(old.dtype, lines.dtype), copy=True)
        out[torch.from_numpy(rows)] = lines.to(out)
        return out
    out = array.astype(np.result_type(array, new), copy=True)
    out[rows] = new
    return out


def as_array(values: Any, name: str) -> Any:
    """An indexable NumPy array, tensor, CSR matrix or `Stored` array of numbers; data are not copied.

    Raises:
        InvalidInput: if the values are not numbers, or form no array.
    """
    if scipy.sparse.issparse(values):
        return scipy.sparse.csr_matrix(values)
    if isinstance(values, Stored):
        _refuse_kind(values.dtype, name)
        return values
    _refuse_containers(values, name)
    if isinstance(values, Tensor):
        _refuse_tensor(values, name)
        return values.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
        except (ValueError, TypeError, Warning) as error:
            message = (
                f"{name} is a {type(values).__name__} that does not form an array ({error}). Pass an array with one "
                "row per example."
            )
            raise InvalidInput(message) from error
    if array.ndim == 0:
        message = (
            f"{name} is a single {type(values).__name__}, not a set of rows. Pass an array with one row per example."
        )
        raise InvalidInput(message)
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (ValueError, TypeError) as error:
            message = (
                f"{name} holds values that are not numbers ({error}). Encode them as numbers first: labels as 0 … K−1, "
                "inputs for example with a scikit-learn Pipeline."
            )
            raise InvalidInput(message) from error
    _refuse_kind(array.dtype, name)
    return array


def _refuse_kind(dtype: np.dtype[Any], name: str) -> None:
    if dtype.kind == "c":
        message = (
            f"{name} has dtype {dtype}, and an example is made of real numbers. Pass the real and the imaginary "
            "parts as columns: np.hstack([X.real, X.imag])."
        )
        raise InvalidInput(message)
    if dtype.kind not in "biuf":
        message = (
            f"{name} has dtype {dtype}, which is not a number. Encode it first: labels as 0 … K−1, categories "
            "as one-hot columns, times as numbers of days."
        )
        raise InvalidInput(message)


def _refuse_containers(values: Any, name: str) -> None:
    if isinstance(values, DataLoader):
        message = (
            f"{name} is a DataLoader, which batches and may shuffle, so its rows have no numbers of their own. Pass "
            "what it loads: loader.dataset."
        )
        raise InvalidInput(message)
    if isinstance(values, IterableDataset):
        message = (
            f"{name} is an IterableDataset ({type(values).__name__}), which can only be read from its start, and "
            "influence asks for row i again. Pass a map-style Dataset, with __getitem__ and __len__; or read it once: "
            "X, y = map(torch.stack, zip(*dataset))."
        )
        raise InvalidInput(message)
    if isinstance(values, Mapping):
        message = (
            f"{name} is a {type(values).__name__}, not an array. For inputs of several parts pass a map-style Dataset "
            "whose items are (x, y) with x a dict or a tuple."
        )
        raise InvalidInput(message)
    if isinstance(values, str | bytes):
        message = (
            f"{name} is a {type(values).__name__}, not an array. Pass the array itself; if this names a file, what it "
            "holds, such as np.load(path)."
        )
        raise InvalidInput(message)
    if np.ma.is_masked(values):
        message = f"{name} is a masked array with masked entries, which are no data. Impute or drop those rows first."
        raise InvalidInput(message)


def _refuse_tensor(values: Tensor, name: str) -> None:
    if values.ndim == 0 or values.layout != torch.strided or values.is_complex():
        kind = "a single number" if values.ndim == 0 else f"{values.layout} of {values.dtype}"
        message = f"{name} is a tensor that is {kind}. Pass a dense real tensor, or a SciPy sparse matrix, of n rows."
        raise InvalidInput(message)


def as_tensor(values: Any) -> Any:
    """A tensor that shares the memory where torch can; a sparse matrix stays as it is."""
    if isinstance(values, Tensor) or scipy.sparse.issparse(values):
        return values
    array = np.asarray(values)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def of_tensor(tensor: Tensor) -> NDArray[Any]:
    """A tensor's numbers as an array; bfloat16, which NumPy has not, as float32."""
    known = tensor.detach().cpu()
    return (known.float() if known.dtype == torch.bfloat16 else known).numpy()


def refuse_sparse_targets(y: Any) -> None:
    """Raises InvalidInput when targets are a sparse matrix.

    Raises:
        InvalidInput: if they are.
    """
    if scipy.sparse.issparse(y):
        message = (
            f"y is a sparse matrix of shape {y.shape}, and targets are dense. Pass y.toarray(), and "
            "y.toarray().ravel() where a row has one target."
        )
        raise InvalidInput(message)


def check_finite(array: Any, name: str) -> None:
    """Raises InvalidInput when `array` holds a NaN or an infinity, and says where.

    Raises:
        InvalidInput: if a value is not finite.
    """
    if array is None or (isinstance(array, Stored) and array.finite):
        return
    values: Any = array.data if scipy.sparse.issparse(array) else array  # type: ignore[union-attr]
    step = array.block_rows if isinstance(array, Stored) else _CHECK_ROWS
    for start in range(0, len(values), step):
        block = values[start : start + step]
        if _sums_to_a_number(block):
            continue
        if isinstance(block, Tensor):
            bad = (~torch.isfinite(block)).cpu().numpy() if block.is_floating_point() else np.zeros(1, bool)
        else:
            bad = ~np.isfinite(block) if block.dtype.kind == "f" else np.zeros(1, bool)
        if bad.any():
            row = start + int(np.argwhere(bad)[0][0])
            where = f"{row} of the stored entries" if scipy.sparse.issparse(array) else f"{row}"
            message = (
                f"{name} holds {int(bad.sum())} NaN or infinite values, the first in row {where}. One such value "
                "makes every score NaN. "
                "Impute or drop those rows before fitting and explaining."
            )
            raise InvalidInput(message)
    if isinstance(array, Stored):
        array.finite = True


def _sums_to_a_number(block: Any) -> bool:
    """Whether a block of floats has a finite sum, hence no NaN and no infinity in it; False proves nothing."""
    if isinstance(block, Tensor):
        return block.is_floating_point() and block.dtype.itemsize >= _WIDE and bool(torch.isfinite(block.sum()))
    dtype = np.dtype(block.dtype)
    plain = dtype in (np.float32, np.float64) and dtype.isnative and block.flags.writeable
    if not plain or any(stride < 0 for stride in block.strides):
        return False
    return bool(torch.isfinite(torch.from_numpy(block).sum()))  # by all threads


def checked_weights(sample_weight: Any, n: int) -> NDArray[np.float64]:
    """(n,) finite, non-negative float64 weights, not all zero; one 1 in n places where none are given.

    Raises:
        InvalidInput: if they are anything else.
    """
    if sample_weight is None:
        return np.broadcast_to(1.0, (n,))
    weights = np.array(as_array(sample_weight, "sample_weight"), dtype=np.float64)
    check_finite(weights, "sample_weight")
    if weights.shape != (n,):
        message = f"sample_weight has shape {weights.shape}, and there are {n} rows. Pass one weight per training row."
        raise InvalidInput(message)
    if weights.min() < 0 or weights.sum() == 0:
        message = (
            f"sample_weight reaches from {weights.min():g} to {weights.max():g}. Weights must be ≥ 0 and not all "
            "zero, as in fit()."
        )
        raise InvalidInput(message)
    return weights


def checked_rows(rows: Any, n: int) -> NDArray[np.int64]:
    """`rows` as an array of row numbers in 0 … n−1.

    Raises:
        RowOutOfRange: if a row is not in 0 … n−1.
        InvalidInput: if rows are not whole numbers, or there are none.
    """
    if rows is None:
        return np.arange(n)
    try:
        listed = list(rows) if isinstance(rows, Iterable) and not hasattr(rows, "__array__") else rows
        array = np.atleast_1d(np.asarray(listed))
    except ValueError as error:
        message = f"rows has lines of different lengths ({error}). Pass a flat list of whole row numbers."
        raise InvalidInput(message) from error
    if array.dtype == bool and array.shape == (n,):
        array = np.flatnonzero(array)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        message = (
            f"rows has shape {array.shape} and dtype {array.dtype}. Pass a non-empty list of whole row numbers (or "
            f"a mask of {n} booleans)."
        )
        raise InvalidInput(message)
    array = array.astype(np.int64)
    outside = array[(array < 0) | (array >= n)]
    if outside.size:
        message = (
            f"Row {outside[0]} does not exist: there are {n} rows, numbered 0 to {n - 1}. Pass such numbers; "
            "negative ones do not count from the end."
        )
        raise RowOutOfRange(message)
    return array
