"""Rows of several named parts, as language models take them: dicts of token numbers, masks and labels.

    a list of dicts · a dict of columns · a Hugging Face Dataset · any map-style Dataset of dicts · a tokenizer's output

Row i becomes the example (x, y): x a dict of tensors under the names that the model takes, y its labels. Rows of
unequal length are padded where they are stacked (`data.examples`), labels with −100, and have a mask by then. A row
into which several sequences were packed is taken apart, and its k-th sequence is named (row, k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from upweight.data.trees import take
from upweight.errors import InvalidInput, first_line

LABELS = ("labels", "label", "label_ids")
MASK, TOKENS = "attention_mask", "input_ids"
PLACES, LENGTHS = "position_ids", "seq_lengths"  # what says that a row holds several sequences
UNCOUNTED = -100  # the label that cross-entropies leave out


class Records:
    """n rows of named parts, as (x, y) examples.

    Args:
        rows: of mappings, by number.
        takes: the names that the model takes; others are left out. None keeps all that hold numbers.
        collate: of one row in a list into a batch of one, where the rows are no numbers yet.
        labelled: whether rows without labels get their tokens as labels, as language models are trained.
        shifted: whether y is what stands one place ahead of each output.
        with_labels: whether x holds the labels, too.
        pad: the token that stands behind the end of shorter rows.

    Raises:
        InvalidInput: where a row holds no numbers under a name that the model takes.
    """

    def __init__(
        self,
        rows: Any,
        *,
        takes: Sequence[str] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        labelled: bool = False,
        shifted: bool = False,
        with_labels: bool = False,
        pad: int = 0,
    ) -> None:
        self.rows = unpacked(rows)
        self.takes = None if takes is None else frozenset(takes)
        self.collate = collate
        self.labelled, self.shifted, self.with_labels, self.pad = labelled, shifted, with_labels, pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        x, y = self.parts(row)
        if y is None:
            return x
        if self.with_labels:
            x = {**x, LABELS[0]: y}
        return x, (y[1:] if self.shifted else y)

    @property
    def ids(self) -> Any:
        """The column `id` or `idx` of the rows; None if they have none."""
        columns = getattr(self.rows, "columns", {})
        return next((columns[name] for name in ("id", "idx") if name in columns), None)

    def parts(self, row: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """The inputs and the labels of a row, as it is before anything is shifted."""
        item = self.rows[row]
        if self.collate is not None:
            item = take(_plain(self.collate([item])), 0)
        target = None
        if isinstance(item, tuple | list) and len(item) == 2:
            item, target = item
        if not isinstance(item, Mapping):
            message = (
                f"Row {row} is a {type(item).__name__}, and row 0 is a mapping from names to numbers. Make every row a "
                "dict of the same names."
            )
            raise InvalidInput(message)
        found = {name: value for name, value in item.items() if value is not None and not isinstance(value, str)}
        named = [found.pop(name) for name in LABELS if name in found]
        x = {
            name: _numbers(value, name, row)
            for name, value in found.items()
            if self.takes is None or name in self.takes
        }
        if not x:
            message = (
                f"Row {row} holds {', '.join(map(str, item))}, and the model takes "
                f"{', '.join(sorted(self.takes or ()))}. Pass rows as the model takes them, such as a tokenizer's."
            )
            raise InvalidInput(message)
        if TOKENS in x and MASK not in x and (self.takes is None or MASK in self.takes):
            x[MASK] = torch.ones_like(x[TOKENS])
        if target is None and named:
            target = named[0]
        y = None if target is None else _numbers(target, LABELS[0], row)
        if y is None and self.labelled and TOKENS in x:
            y = torch.where(x[MASK] > 0, x[TOKENS], UNCOUNTED) if MASK in x else x[TOKENS].clone()
        self._refuse_empty(row, x, y)
        return x, y

    def _refuse_empty(self, row: int, x: dict[str, Tensor], y: Tensor | None) -> None:
        """Raises for a row without tokens or labels, and for labels of a language model that are not one a token."""
        if TOKENS in x and not x[TOKENS].numel():
            message = (
                f"Row {row} has no tokens: its {TOKENS} are empty, as of an empty text. Leave such rows out: "
                f"[row for row in rows if len(row['{TOKENS}'])]."
            )
            raise InvalidInput(message)
        if y is None:
            return
        if not y.numel():
            instead = "drop the column, and its tokens are its labels; or leave" if self.labelled else "leave"
            message = (
                f"Row {row} has no labels: the list is empty, as where a truncation cut them off. Give it labels, "
                f"{instead} it out: [row for row in rows if len(row['{LABELS[0]}'])]."
            )
            raise InvalidInput(message)
        tokens = x.get(TOKENS)
        if not self.labelled or tokens is None or y.is_floating_point():  # numbers are a target of one's own
            return
        if tokens.ndim == 1 and y.ndim < 2 and y.shape != tokens.shape:
            message = (
                f"Row {row} has {y.numel()} labels and {len(tokens)} tokens, and a language model is asked for one "
                f"label at every token. Pass labels of the length of {TOKENS}, with {UNCOUNTED} where none is counted."
            )
            raise InvalidInput(message)

    def counted(self, row: int) -> bool:
        """Whether a row has a label that cross-entropies count; so does any row whose labels are no whole numbers."""
        y = self.parts(row)[1]
        if y is None or y.is_floating_point():
            return True
        return bool((y[1:] if self.labelled and y.ndim else y).ne(UNCOUNTED).any())

    def stacked(self, items: list[Any]) -> Any:
        """Rows along a new first axis, padded to one length."""
        return default_collate(padded(items, self.pad))

    def read_like(self, data: Any, y: Any = None) -> Records | None:
        """Other data of named parts, read as these rows are; None for what is none."""
        data, _ = unloaded(data)
        rows = rows_of(data, y) or (Rows(data) if self.collate is not None else None)
        if rows is None:
            return None
        other = copy(self)
        other.rows = unpacked(rows)
        other.collate = None if isinstance(rows, Columns) else self.collate  # columns are collated
        return other


class Columns:
    """A dict of columns, row by row.

    Args:
        columns: of n values each, under their names.
        y: one target for each row, or None.

    Raises:
        InvalidInput: if the columns have different lengths, or there is none.
    """

    def __init__(self, columns: Mapping[str, Any], y: Any = None) -> None:
        self.columns = dict(columns) if y is None else {**columns, LABELS[0]: y}
        lengths = {name: len(column) for name, column in self.columns.items() if hasattr(column, "__len__")}
        if not lengths or len(lengths) < len(self.columns) or len(set(lengths.values())) > 1:
            told = ", ".join(
                f"{name} {lengths[name] if name in lengths else type(column).__name__}"
                for name, column in self.columns.items()
            )
            message = (
                f"The columns do not have one length: {told or 'there are none'}. Pass one value for each row in "
                "every column."
            )
            raise InvalidInput(message)
        self.length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {
            name: column.iloc[row] if hasattr(column, "iloc") else column[row] for name, column in self.columns.items()
        }


class Rows:
    """A list of dicts, or a Dataset of dicts, with the ids that its rows bring along."""

    def __init__(self, rows: Any, y: Any = None) -> None:
        self.rows, self.y = rows, y

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        item = self.rows[row]
        return item if self.y is None else (item, self.y[row])

    @property
    def columns(self) -> Mapping[str, Any]:
        """The column of ids, if there is one."""
        names = getattr(self.rows, "column_names", None)
        if isinstance(names, list):
            rows = _unformatted(self.rows)  # a format, or a transform, may leave columns out
            return {name: rows[name] for name in ("id", "idx") if name in names}
        if isinstance(self.rows, list):
            return {
                name: [row[name] for row in self.rows]
                for name in ("id", "idx")
                if all(isinstance(row, Mapping) and name in row for row in self.rows)
            }
        own = getattr(self.rows, "ids", None)
        return {} if own is None else {"id": own}


class Sequences:
    """The sequences of packed rows, in their order.

    Args:
        rows: of mappings, by number.
        bounds: the row, the number in it, the first token and the end of every sequence.
    """

    def __init__(self, rows: Any, bounds: list[tuple[int, int, int, int]]) -> None:
        self.rows, self.bounds = rows, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> Any:
        row, _, start, stop = self.bounds[number]
        item = self.rows[row]
        whole, target = item if isinstance(item, tuple | list) else (item, None)
        size = len(whole[TOKENS])

        def part(value: Any) -> Any:
            along = hasattr(value, "__len__") and not isinstance(value, str) and len(value) == size
            return value[start:stop] if along else value

        parts = {name: part(value) for name, value in whole.items()}
        if LENGTHS in parts:
            parts[LENGTHS] = [stop - start]
        return (parts, part(target)) if isinstance(item, tuple | list) else parts

    @property
    def columns(self) -> Mapping[str, Any]:
        """The column of ids: (name of the row, number in it)."""
        brought = getattr(self.rows, "columns", {})
        names = next((list(brought[name]) for name in ("id", "idx") if name in brought), range(len(self.rows)))
        return {"id": [(names[row], place) for row, place, _, _ in self.bounds]}


def unpacked(rows: Any) -> Any:
    """Rows with the sequences of packed ones apart; the same rows where none holds more than one.

    Sequences begin where `position_ids` are 0 again under the mask, or have the lengths that `seq_lengths` lists.
    """
    first = rows[0] if len(rows) else None
    first = first[0] if isinstance(first, tuple | list) and first else first
    if not isinstance(first, Mapping) or TOKENS not in first or not (LENGTHS in first or PLACES in first):
        return rows
    bounds = []
    for row in range(len(rows)):
        item = rows[row]
        whole = item[0] if isinstance(item, tuple | list) else item
        starts = _starts(whole)
        ends = [*starts[1:], len(whole[TOKENS])]
        bounds += [(row, k, start, stop) for k, (start, stop) in enumerate(zip(starts, ends, strict=True))]
    return rows if len(bounds) == len(rows) else Sequences(rows, bounds)


def _starts(row: Mapping[str, Any]) -> list[int]:
    """Where the sequences of a row begin; 0 for the first, whatever padding stands before it."""
    size = len(row[TOKENS])
    if row.get(LENGTHS) is not None:
        return [0, *np.cumsum(np.asarray(row[LENGTHS]))[:-1].tolist()]
    places = np.asarray(row.get(PLACES, range(size)))
    if places.shape != (size,):
        return [0]
    counted = np.asarray(row[MASK]) > 0 if row.get(MASK) is not None else np.ones(size, dtype=bool)
    return [0, *np.flatnonzero((places == 0) & (counted if counted.shape == (size,) else True)).tolist()[1:]]


def rows_of(data: Any, y: Any = None) -> Rows | Columns | None:
    """Data as rows of mappings, by number; None for what is none.

    Args:
        data: a list of dicts, a dict of columns, or a map-style Dataset of dicts, alone or with a target.
        y: one target for each row, or None.
    """
    if isinstance(data, Mapping):
        return Columns(data, y)
    if isinstance(data, list):
        return Rows(data, y) if data and isinstance(data[0], Mapping) else None
    array = isinstance(data, np.ndarray | Tensor | tuple | str | bytes) or scipy.sparse.issparse(data)
    if (
        array
        or hasattr(data, "to_numpy")
        or not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
        or len(data) == 0
    ):
        return None
    try:
        first = data[0]
    except Exception:  # a Dataset's own; it is met again, and told, where the rows are read
        return None
    inside = first[0] if isinstance(first, tuple | list) and len(first) == 2 else first
    if not isinstance(inside, Mapping) and hasattr(data, "with_format"):  # rows as tables, of pandas or arrow
        data = _unformatted(data)
        inside = data[0]
    return Rows(data, y) if isinstance(inside, Mapping) else None


def _unformatted(rows: Any) -> Any:
    """A Hugging Face Dataset as it is stored; the same rows where they are no such."""
    return rows.with_format(None) if hasattr(rows, "with_format") else rows


def padded(items: list[Any], pad: int = 0) -> list[Any]:
    """Rows with a mask, or with labels, at the length of the longest.

    Behind their end stand `pad` for tokens, −100 for labels and 0 for all else. What has another length than the mask
    is left as it is.
    """
    pairs: list[Any] = [item if isinstance(item, tuple | list) and len(item) == 2 else (item, None) for item in items]
    if not all(isinstance(x, Mapping) and x.keys() == pairs[0][0].keys() for x, _ in pairs):
        return items
    whole = isinstance(items[0], tuple | list)
    masked = [x.get(MASK) for x, _ in pairs]
    columns = {}
    for name in pairs[0][0]:
        column = [x[name] for x, _ in pairs]
        along = (
            name in LABELS
            or name.startswith("decoder_")
            or all(
                mask is not None and _length(part) == _length(mask) for part, mask in zip(column, masked, strict=True)
            )
        )
        value = UNCOUNTED if name in LABELS else pad if name.endswith(TOKENS) else 0
        columns[name] = _at_one_length(column, value) if along else column
    targets = [y for _, y in pairs]
    if whole and all(isinstance(y, Tensor) and not y.is_floating_point() for y in targets):
        targets = _at_one_length(targets, UNCOUNTED)
    rows = [{name: column[k] for name, column in columns.items()} for k in range(len(items))]
    return list(zip(rows, targets, strict=True)) if whole else rows


def _length(part: Any) -> int | None:
    return len(part) if isinstance(part, Tensor) and part.ndim else None


def _at_one_length(column: list[Any], value: int) -> list[Any]:
    lengths = {_length(part) for part in column}
    if len(lengths) < 2 or None in lengths:
        return column
    longest = max(int(length) for length in lengths if length is not None)
    return [
        torch.cat([part, part.new_full((longest - len(part), *part.shape[1:]), value)]) if len(part) < longest else part
        for part in column
    ]


def unloaded(data: Any) -> tuple[Any, Callable[[list[Any]], Any] | None]:
    """What a DataLoader loads, in its own order, and its collate_fn where it has one of its own; else data alone."""
    if not isinstance(data, DataLoader):
        return data, None
    own = data.collate_fn
    return data.dataset, None if own is default_collate or own is None else own


def _plain(batch: Any) -> Any:
    """A batch without the wrapping that tokenizers give it."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if hasattr(value, "__getitem__")}
    return batch


def _numbers(value: Any, name: str, row: int) -> Tensor:
    """A part of a row as a tensor of numbers."""
    try:
        return value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        message = (
            f"'{name}' of row {row} is no array of numbers ({first_line(error)}). Turn texts into numbers first: "
            "tokenizer(text, truncation=True)."
        )
        raise InvalidInput(message) from error
