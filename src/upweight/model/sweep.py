"""The one loop over data: `fold` sums over the examples, `emit` gives one output row per example.

Rows are visited in chunks of fixed boundaries. Within a chunk, batches are as large as memory allows; a batch that
does not fit is halved without moving a chunk boundary. Sums are kept in float64 and added in chunk order, so the batch
size changes a result by rounding at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, UpweightError, checked_count, first_line
from upweight.model.objective import Objective
from upweight.model.transforms import refuse_inference_mode, undisturbed
from upweight.runs.progress import bar
from upweight.runs.stopping import asked, stop_here
from upweight.runs.store import Store

CHUNK = 1024
MEMORY = 2**30
KEPT_EVERY = 30.0  # seconds between two states of a sum


@dataclass(frozen=True)
class Sweep:
    """An objective, its examples, and how to walk over them.

    Args:
        objective: what is evaluated at every example.
        examples: the data.
        batch_size: examples per batch; None fits a batch and its vectors into `memory`.
        progress: True and False force the progress bar on and off; None shows it on a terminal only.
        example_bytes: memory that one example needs, per vector and once more; see `defaults.example_bytes`.
        memory: bytes that one batch may take.
        store: where sums that have a name are kept as far as they have come, and taken up again; None keeps nothing.
        budget: bytes that everything beside data and model may take: a batch a quarter of it, what is kept half. None
            leaves each part its own limit.

    Raises:
        InvalidInput: if batch_size is not a positive whole number.
    """

    objective: Objective
    examples: Examples
    batch_size: int | None = None
    progress: bool | None = None
    example_bytes: int = 8192
    memory: int = MEMORY
    store: Store | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            checked_count(self.batch_size, "batch_size", hint="None fits the memory")

    def over(self, objective: Objective, examples: Examples) -> Sweep:
        """The same way of walking, over other examples."""
        return replace(self, objective=objective, examples=examples, store=None)

    def at_most(self, size: int, share: int = 2) -> int:
        """So many bytes, or one part in `share` of the budget if that is less."""
        return size if self.budget is None else min(size, self.budget // share)

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def fold(
        self,
        function: Callable[..., Tensor],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        label: str = "fold",
        chunk: int = CHUNK,
        numbered: bool = False,
        kept: str | None = None,
    ) -> Tensor:
        """The sum of function(batch, weights) over all batches, float64.

        Args:
            function: maps a batch and its (b,) sample weights to a tensor that is a sum over the batch.
            vectors: how many vectors the function works on at once, for the batch size.
            rows: the rows to visit; None means all.
            label: what the progress bar says.
            chunk: rows summed before the sum is added to the total; narrow rows can do with longer chunks.
            numbered: whether the function is given the numbers of the batch's rows too.
            kept: the sum's name in the store, if there is one: for sums that depend on nothing but the work itself.
        """
        keeping = None if self.store is None or kept is None else _Keeping(self.store, kept)
        total, begun = (None, 0) if keeping is None else keeping.before()
        each = function if numbered else lambda batch, weights, _: function(batch, weights)
        last = -(-(self.n if rows is None else len(rows)) // chunk) - 1
        for number, place in self._chunks(rows, label, chunk):
            if number < begun:
                continue
            inside: Tensor | None = None
            for _, values in self._batches(each, place, vectors, label):
                inside = values.double().cpu() if inside is None else inside.add_(values.cpu())
            assert inside is not None  # a chunk has at least one row
            total = inside if total is None else total.add_(inside)
            if keeping is not None:
                keeping.after(total, number + 1, last + 1)
        assert total is not None  # there is at least one row
        if not torch.isfinite(total).all():
            raise _not_finite(label, "a sum over the rows is")
        return total

    def emit(
        self,
        function: Callable[[Any, Tensor], Tensor],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        store: Store | None = None,
        label: str = "emit",
    ) -> NDArray[np.float64]:
        """function(batch, weights), one output row per example, joined: (n, …) float64.

        Args:
            function: maps a batch and its (b,) sample weights to a tensor whose first axis is the batch.
            vectors: how many vectors the function works on at once, for the batch size.
            rows: the rows to visit; None means all.
            store: finished chunks are kept there and not computed again.
            label: what the progress bar says.
        """
        found = self.chunks(function, vectors=vectors, rows=rows, store=store, label=label)
        return joined(found, self.n if rows is None else len(rows))

    def chunks(
        self,
        function: Callable[[Any, Tensor], Tensor],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        store: Store | None = None,
        label: str = "emit",
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The same, a chunk of rows at a time, in order: its number, and its (c, …) output rows; none are kept.

        Rows of chunk k start at k · CHUNK; arguments are those of `emit`.
        """
        for number, chunk in self._chunks(rows, label):
            if store is not None and number in store:
                yield number, store.read(number)
                continue
            parts = []
            for numbers, batch in self._batches(lambda b, w, _: function(b, w), chunk, vectors, label):
                parts.append(batch.double().cpu().numpy())
                bad = np.flatnonzero(~np.isfinite(parts[-1]).reshape(len(batch), -1).all(1))
                if bad.size:
                    raise _not_finite(label, f"row {numbers[int(bad[0])]} gives")
            values = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if store is not None:
                store.write(number, values)
                stop_here(f"chunk {number + 1} of {-(-(self.n if rows is None else len(rows)) // CHUNK)}")
            yield number, values

    def _chunks(
        self, rows: NDArray[np.int64] | None, label: str, size: int = CHUNK
    ) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
        n = self.n if rows is None else len(rows)
        with bar(n, label, self.progress, unit="row") as done:
            for number, start in enumerate(range(0, n, size)):
                stop = min(start + size, n)
                yield number, slice(start, stop) if rows is None else rows[start:stop]
                done(stop - start)

    def _batches(
        self, function: Callable[..., Tensor], chunk: slice | NDArray[np.int64], vectors: int, label: str
    ) -> Iterator[tuple[range | NDArray[np.int64], Tensor]]:
        """Row numbers and results, in batches that fit; one that does not is tried again at half the size."""
        numbers = range(chunk.start, chunk.stop) if isinstance(chunk, slice) else chunk
        size = self.batch_size or max(1, self.at_most(self.memory, 4) // (self.example_bytes * (1 + vectors)))
        start = 0
        while start < len(numbers):
            inside = numbers[start : start + size]
            rows = slice(inside.start, inside.stop) if isinstance(inside, range) else inside
            try:
                with undisturbed():
                    weights = torch.from_numpy(self.examples.weights[rows])
                    values = function(self.examples.batch(rows), weights, inside)
            except UpweightError:
                raise
            except (MemoryError, RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
                if _out_of_memory(error) and len(inside) > 1:
                    size = len(inside) // 2
                    continue
                if _out_of_memory(error):
                    raise
                refuse_inference_mode(f"{label}: the loss")
                message = (
                    f"{label}: the loss failed on rows {inside[0]} to {inside[-1]} "
                    f"({type(error).__name__}: {first_line(error)}). Usual reasons: a label that the model has no "
                    "output for, or inputs of another shape or kind than in training. Correct these rows, or leave "
                    "them out."
                )
                raise InvalidInput(message) from error
            yield inside, values
            start += len(inside)


class _Keeping:
    """A sum in a store: every half a minute as far as it has come, and when it is whole."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._since = time.monotonic()

    def before(self) -> tuple[Tensor | None, int]:
        """What was kept, and how many chunks are in it."""
        kept, chunks = self._store.sum(self._name)
        return None if kept is None else torch.from_numpy(kept), chunks

    def after(self, total: Tensor, chunks: int, of: int) -> None:
        """Keep the sum of the first chunks, if it is time or all are in; and stop if that was asked for."""
        if chunks == of or asked() or time.monotonic() - self._since >= KEPT_EVERY:
            self._store.keep_sum(self._name, total.numpy(), chunks)
            self._since = time.monotonic()
            stop_here(f"chunk {chunks} of {of} of {self._name}")


def joined(chunks: Iterator[tuple[int, NDArray[np.float64]]], n: int) -> NDArray[np.float64]:
    """The output rows of all chunks in one array, (n, …)."""
    outputs: NDArray[np.float64] | None = None
    for number, values in chunks:
        if outputs is None:
            outputs = np.empty((n, *values.shape[1:]))
        outputs[number * CHUNK : number * CHUNK + len(values)] = values
    assert outputs is not None  # there is at least one row
    return outputs


def _not_finite(label: str, what: str) -> InvalidInput:
    message = (
        f"{label}: {what} NaN or infinite. Usual reasons: a label that the loss ignores (ignore_index), log(0) or an "
        "overflow inside the loss. Leave such rows out, or clamp inside the loss."
    )
    return InvalidInput(message)


def _out_of_memory(error: Exception) -> bool:
    told = ("can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)
