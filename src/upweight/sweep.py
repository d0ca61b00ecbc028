"""The one loop over data: `fold` sums over the examples, `emit` gives one output row per example.

Rows are visited in chunks of fixed boundaries. Within a chunk, batches are as large as memory allows; a batch that
does not fit is halved without moving a chunk boundary. Sums are kept in float64 and added in chunk order, so the batch
size changes a result by rounding at most.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from upweight.errors import InvalidInput
from upweight.examples import Examples
from upweight.objective import Objective
from upweight.store import Store

CHUNK = 1024
MEMORY = 2**30


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

    Raises:
        InvalidInput: if batch_size is not a positive whole number.
    """

    objective: Objective
    examples: Examples
    batch_size: int | None = None
    progress: bool | None = None
    example_bytes: int = 8192
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if self.batch_size is not None and (int(self.batch_size) != self.batch_size or self.batch_size < 1):
            message = f"batch_size={self.batch_size}. It must be a whole number ≥ 1, or None to fit the memory."
            raise InvalidInput(message)

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def fold(
        self,
        function: Callable[[Any, Tensor], Tensor],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        label: str = "fold",
    ) -> Tensor:
        """The sum of function(batch, weights) over all batches, float64.

        Args:
            function: maps a batch and its (b,) sample weights to a tensor that is a sum over the batch.
            vectors: how many vectors the function works on at once, for the batch size.
            rows: the rows to visit; None means all.
            label: what the progress bar says.
        """
        total: Tensor | None = None
        for _, chunk in self._chunks(rows, label):
            for values in self._batches(function, chunk, vectors):
                total = values.double().cpu() if total is None else total.add_(values.cpu())
        assert total is not None  # there is at least one row
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
        outputs: NDArray[np.float64] | None = None
        for number, chunk in self._chunks(rows, label):
            if store is not None and number in store:
                values = store.read(number)
            else:
                values = np.concatenate(
                    [batch.double().cpu().numpy() for batch in self._batches(function, chunk, vectors)]
                )
                if store is not None:
                    store.write(number, values)
            if outputs is None:
                outputs = np.empty((self.n if rows is None else len(rows), *values.shape[1:]))
            outputs[number * CHUNK : number * CHUNK + len(values)] = values
        assert outputs is not None  # there is at least one row
        return outputs

    def _chunks(self, rows: NDArray[np.int64] | None, label: str) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
        n = self.n if rows is None else len(rows)
        hidden = not sys.stderr.isatty() if self.progress is None else not self.progress
        with tqdm(
            total=n, desc=label, unit="row", unit_scale=True, leave=False, disable=hidden, file=sys.stderr
        ) as bar:
            for number, start in enumerate(range(0, n, CHUNK)):
                stop = min(start + CHUNK, n)
                yield number, slice(start, stop) if rows is None else rows[start:stop]
                bar.update(stop - start)

    def _batches(
        self, function: Callable[[Any, Tensor], Tensor], chunk: slice | NDArray[np.int64], vectors: int
    ) -> Iterator[Tensor]:
        """Results for one chunk, in batches that fit; one that runs out of memory is tried again at half the size."""
        length = chunk.stop - chunk.start if isinstance(chunk, slice) else len(chunk)
        size = self.batch_size or max(1, self.memory // (self.example_bytes * (1 + vectors)))
        start = 0
        while start < length:
            stop = min(start + size, length)
            rows = slice(chunk.start + start, chunk.start + stop) if isinstance(chunk, slice) else chunk[start:stop]
            try:
                values = function(self.examples.batch(rows), torch.from_numpy(self.examples.weights[rows]))
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or stop - start == 1:
                    raise
                size = (stop - start) // 2
                continue
            yield values
            start = stop


def _out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "not enough memory" in str(error)
    )
