"""Chunks of rows, of fixed boundaries: where they lie, their output rows side by side, and their sums in a store."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.runs import ranks
from upweight.runs.stopping import asked, stop_here
from upweight.runs.store import Store
from upweight.runs.sums import Sums, subtrees

_AT_ONCE = 2**20  # numbers that are added
CHUNK = 1024
KEPT_EVERY = 30.0  # seconds between two states of a sum

Place = slice | NDArray[np.int64]  # the rows of a chunk


def chunks_of(n: int, rows: NDArray[np.int64] | None, size: int) -> list[Place]:
    """Chunks of so many of n rows, or of some of them, in order."""
    n = n if rows is None else len(rows)
    ends = [(start, min(start + size, n)) for start in range(0, n, size)]
    return [slice(start, stop) if rows is None else rows[start:stop] for start, stop in ends]


def length(place: Place) -> int:
    """The rows of a chunk."""
    return place.stop - place.start if isinstance(place, slice) else len(place)


def count(chunks: Sequence[Place]) -> int:
    """The rows of all chunks."""
    return sum(map(length, chunks))


def rows_of(numbers: Sequence[int], chunks: Sequence[Place]) -> NDArray[np.int64]:
    """The places of the rows of some chunks among those of all."""
    ends = np.cumsum([0, *map(length, chunks)])
    return np.concatenate([np.arange(0), *(np.arange(ends[number], ends[number + 1]) for number in numbers)])


def files_of(chunks: int, span: int, begun: int = 0) -> list[range]:
    """The chunks from number `begun` on, `span` of them together as they lie in the files of a store."""
    return [range(max(first, begun), min(first + span, chunks)) for first in range(begun // span * span, chunks, span)]


class OutputRows:
    """The output rows of those of some consecutive chunks that this process has visited, at their places.

    Args:
        first: the number of the first of the chunks.
        chunks: where they lie.
    """

    def __init__(self, first: int, chunks: Sequence[Place]) -> None:
        self.first, self.chunks = first, chunks
        self.values: NDArray[np.float64] | None = None

    def put(self, number: int, values: NDArray[np.float64]) -> None:
        """The rows of a chunk."""
        if self.values is None:
            self.values = np.empty((count(self.chunks), *values.shape[1:]))
        start = (number - self.first) * CHUNK
        self.values[start : start + len(values)] = values

    def of_all(self, work: ranks.Alone | ranks.Shared, shares: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """All rows, on every rank, each of which has visited its share of the numbers."""
        shape = work.shape(None if self.values is None else self.values.shape[1:])
        values = np.empty((count(self.chunks), *shape)) if self.values is None else self.values
        places = [rows_of([number - self.first for number in share], self.chunks) for share in shares]
        work.rows(values, places)
        return values


def joined(chunks: Iterator[tuple[int, NDArray[np.float64]]], n: int) -> NDArray[np.float64]:
    """The output rows of all chunks in one array, (n, …)."""
    outputs: NDArray[np.float64] | None = None
    for number, values in chunks:
        if outputs is None:
            outputs = np.empty((n, *values.shape[1:]))
        outputs[number * CHUNK : number * CHUNK + len(values)] = values
    assert outputs is not None  # there is at least one row
    return outputs


def told(things: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[list[list[int]]]]:
    """The tensors of all things, one after the other, and the shapes of every thing's."""
    return [part for parts in things for part in parts], [[list(part.shape) for part in parts] for parts in things]


def in_a_row(parts: list[Tensor]) -> Tensor:
    """All numbers of some tensors, which leave the list one by one, so that memory holds them once."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    out, start = parts[0].new_empty(sum(part.numel() for part in parts), dtype=dtype), 0
    while parts:
        part = parts.pop(0)
        out[start : start + part.numel()] = part.flatten()
        start += part.numel()
        del part
    return out


def added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of a chunk, from those of its batches, where they are: the host waits for no device here."""
    inside: Tensor | None = None
    for values in parts:
        inside = values.double().contiguous() if inside is None else _grown(inside, values)
        del values  # before the next batch is computed
    assert inside is not None  # a chunk has at least one row
    return inside


def _grown(total: Tensor, values: Tensor) -> Tensor:
    """The total with values added in place, a part at a time, for numbers of another precision are copied first."""
    for inside, more in zip(total.view(-1).split(_AT_ONCE), values.reshape(-1).split(_AT_ONCE), strict=True):
        inside.add_(more)
    return total


def ends_of(shapes: Sequence[Sequence[Sequence[int]]], owners: Sequence[int], among: int) -> list[int]:
    """Where the numbers of every rank's things begin and end among those of all, which lie in the order of owners."""
    sizes = [0] * among
    for parts, owner in zip(shapes, owners, strict=True):
        sizes[owner] += sum(map(math.prod, parts))
    return [sum(sizes[:rank]) for rank in range(among + 1)]


def finished(store: Store | None, chunks: int) -> list[int]:
    """The chunks that are finished, as rank 0 finds them."""
    if store is None:
        return []
    if chunks == 1:
        return [0] if 0 in store else []
    found = ranks.by_first("looking for finished chunks", lambda: {"": np.array([n in store for n in range(chunks)])})
    assert found is not None  # the function gave it
    return np.flatnonzero(found[""]).tolist()


def split(flat: Tensor, shapes: Sequence[Sequence[Sequence[int]]], mine: Sequence[bool]) -> list[list[Tensor] | None]:
    """The tensors of those things of which `flat` holds the numbers; None in place of the others.

    Each has memory of its own, which begins where BLAS likes it: products with a part of something larger would round
    by where that part begins, and so by how many processes share the things.
    """
    own = [shape for parts, here in zip(shapes, mine, strict=True) if here for shape in parts]
    tensors = iter(flat.split([math.prod(shape) for shape in own]))
    return [
        [next(tensors).reshape(tuple(shape)).clone() for shape in parts] if here else None
        for parts, here in zip(shapes, mine, strict=True)
    ]


class Keeping:
    """A sum in a store: every half a minute as far as it has come, and when it is whole."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._since = time.monotonic()

    def before(self) -> tuple[Sums, int]:
        """What was kept, and how many chunks are in it."""
        kept, chunks = self._store.sum(self._name)
        sums = Sums()
        if kept is not None:
            values = torch.from_numpy(kept.copy())
            sums.nodes = [(*place, value) for place, value in zip(subtrees(range(chunks)), values, strict=True)]
        return sums, chunks

    def after(self, sums: Sums, chunks: int, of: int) -> None:
        """Keep the sum of the first chunks, if it is time or all are in; and stop if that was asked for."""
        if chunks == of or asked() or time.monotonic() - self._since >= KEPT_EVERY:
            self._store.keep_sum(self._name, torch.stack([value for *_, value in sums.nodes]).numpy(), chunks)
            self._since = time.monotonic()
            stop_here(f"chunk {chunks} of {of} of {self._name}")
