"""The one loop over data: `fold` sums over the examples, `emit` gives one output row per example.

Rows are visited in chunks of fixed boundaries. Within a chunk, batches are as large as memory allows; a batch that
does not fit is halved without moving a chunk boundary. Sums are kept in float64, and those of chunks are added by a
tree over their numbers: the batch size changes a result by rounding at most, and the number of processes that share
the chunks (`runs.ranks`) not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, UpweightError, checked_count, first_line
from upweight.model.chunks import (
    CHUNK,
    Keeping,
    OutputRows,
    Place,
    added,
    chunks_of,
    count,
    ends_of,
    files_of,
    finished,
    in_a_row,
    joined,
    length,
    rows_of,
    split,
    told,
)
from upweight.model.objective import Objective
from upweight.model.transforms import refuse_inference_mode, undisturbed
from upweight.runs import ranks, threads
from upweight.runs.progress import bar
from upweight.runs.stopping import stop_here
from upweight.runs.store import Store
from upweight.runs.sums import Sums

MEMORY = 2**30
_WINDOW = (4, 64)  # chunks that each of several ranks visits, the first time and at most, before all rows are exchanged
_WINDOW_BYTES = 2**27  # of the rows of such a window, which every rank has
_NARROW_BYTES = 2**26  # of a chunk of a linear predictor: threads that share smaller ones wait more than they work

T = TypeVar("T")
Numbers = range | NDArray[np.int64]


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
        store: where sums that have a name are kept as far as they have come, and taken up again, while the folder is
            this process's; None keeps nothing.
            Several ranks keep none.
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

    @threads.shared()
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

        Memory: log₂ of the number of chunks, plus 2, such sums. Of several ranks each visits its own chunks, and every
        one gets the sum.

        Args:
            function: maps a batch and its (b,) sample weights to a tensor that is a sum over the batch.
            vectors: how many vectors the function works on at once, for the batch size.
            rows: the rows to visit; None means all.
            label: what the progress bar says.
            chunk: rows summed before the sum is added to the total; narrow rows can do with longer chunks.
            numbered: whether the function is given the numbers of the batch's rows too.
            kept: the sum's name in the store, if there is one: for sums that depend on nothing but the work itself.
        """
        store = self.store if self.store is not None and self.store.held and not ranks.several() else None
        keeping = None if store is None or kept is None else Keeping(store, kept)
        sums, begun = (Sums(), 0) if keeping is None else keeping.before()
        each = function if numbered else _unnumbered(function)
        chunks = chunks_of(self.n, rows, chunk)
        with ranks.work(f"{label} of {count(chunks):,} rows", len(chunks)) as work:
            mine = work.shares(range(len(chunks)))[work.rank]
            for number in self._visited(mine[begun:], chunks, work, label):
                batches = self._batches(each, chunks[number], vectors, label)
                sums.add(number, added(map(itemgetter(1), batches)).cpu())
                if keeping is not None:
                    keeping.after(sums, number + 1, len(chunks))
            total = work.total(sums, len(chunks))
        return finite(total, label)

    @threads.shared()
    def fold_parts(
        self,
        function: Callable[[Any, Tensor, Numbers], Sequence[Sequence[Tensor]]],
        owners: Sequence[int],
        *,
        vectors: int = 1,
        label: str = "fold",
        kept: str | None = None,
    ) -> list[list[Tensor] | None]:
        """The sums of several things over all rows, float64, each on the rank that owns it; None in place of others'.

        Memory: of several ranks each holds one chunk's sums of all, and log₂ of the chunks, plus 2, of its own. What is
        returned may be written over.

        Args:
            function: maps a batch, its (b,) sample weights and its rows' numbers to sums over the batch, as many
                tensors as it takes for every thing.
            owners: the rank of every thing; these do not decrease.
            vectors: how many vectors the function works on at once, for the batch size.
            label: what the progress bar says.
            kept: the sum's name in the store, as for `fold`.
        """
        shapes: list[list[list[int]]] = []

        def flat(batch: Any, weights: Tensor, numbers: Numbers) -> Tensor:
            parts, shapes[:] = told(function(batch, weights, numbers))
            return in_a_row(parts)

        among, rank = ranks.sharing(), ranks.own_rank()
        if among == 1 or self.n <= CHUNK:
            total = self.fold(flat, vectors=vectors, label=label, numbered=True, kept=kept)
            if not shapes:  # the whole sum was kept
                flat(self.examples.batch([0]), torch.ones(1), range(1))
            start, stop = (0, len(total)) if among == 1 else ends_of(shapes, owners, among)[rank : rank + 2]
            own = total if among == 1 else total[start:stop].clone()
        else:
            own = self._dealt(flat, shapes, owners, vectors, label)
        mine = [among == 1 or owner == rank for owner in owners]
        return split(own, shapes, mine)

    def _dealt(
        self,
        flat: Callable[[Any, Tensor, Numbers], Tensor],
        shapes: list[list[list[int]]],
        owners: Sequence[int],
        vectors: int,
        label: str,
    ) -> Tensor:
        """This rank's part of a sum, of which all visit the chunks in turn; whoever has no chunk gets the shapes."""
        sums, chunks, ends, among = Sums(), chunks_of(self.n, None, CHUNK), [0], ranks.sharing()
        with ranks.work(f"{label} of {self.n:,} rows", len(chunks)) as work:
            visited = self._visited(range(work.rank, len(chunks), among), chunks, work, label)
            for first in range(0, len(chunks), among):
                number, value = next(visited, None), None
                if number is not None:
                    value = added(map(itemgetter(1), self._batches(flat, chunks[number], vectors, label))).cpu()
                if not first:
                    shapes[:] = work.agreed(shapes or None)
                    ends = ends_of(shapes, owners, among)
                there = min(among, len(chunks) - first)
                work.dealt(value, ends, there, lambda rank, part, first=first: sums.add(first + rank, part))
        return finite(sums.total(), label)

    def emit(
        self,
        function: Callable[[Any, Tensor], Tensor],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        store: Store | None = None,
        label: str = "emit",
    ) -> NDArray[np.float64]:
        """function(batch, weights), one output row per example, joined: (n, …) float64, on every rank.

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
        function: Callable[[Any, Tensor], Any],
        *,
        vectors: int = 1,
        rows: NDArray[np.int64] | None = None,
        store: Store | None = None,
        sums: Sums | None = None,
        begun: int = 0,
        label: str = "emit",
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The same, a chunk of rows at a time, in order: its number, and its (c, …) output rows; none are kept.

        Rows of chunk k start at k · CHUNK. Several ranks visit some chunks each, and give all of them, then the next.

        Args:
            function: as for `emit`.
            vectors: how many vectors the function works on at once, for the batch size.
            rows: the rows to visit; None means all.
            store: finished chunks are kept there, `store.span` of them in a file, and not computed again.
            sums: gets the sums of the chunks where the function gives, beside its rows, a sum over the batch.
            begun: chunks that are left out, the first ones.
            label: what the progress bar says.
        """
        chunks = chunks_of(self.n, rows, CHUNK)
        found = self._together if ranks.several() else self._alone
        with bar(count(chunks[begun:]), label, self.progress, unit="row") as done:
            for number, values in found(function, chunks, vectors, store, sums, begun, label):
                yield number, values
                done(len(values))

    def fill(
        self,
        function: Callable[[Any, Tensor], Tensor],
        store: Store,
        numbers: Sequence[int],
        *,
        vectors: int = 1,
        label: str = "emit",
    ) -> None:
        """Computes those of some chunks of `emit` that the store lacks; of several ranks each computes its share.

        Args:
            function: as for `emit`.
            store: where chunks are kept.
            numbers: of the store's chunks, which may each be several of a sweep.
            vectors: how many vectors the function works on at once, for the batch size.
            label: what the progress bar says.
        """
        chunks = chunks_of(self.n, None, CHUNK)
        files = files_of(len(chunks), store.span)
        kept = finished(store, len(files))
        missing = [files[number] for number in numbers if number not in kept]
        with ranks.work(f"{label}, {len(missing)} chunks of {self.n:,} rows", len(missing)) as work:
            mine = work.shares(missing)[work.rank]
            kept_by = store if len(missing) > 1 or ranks.first() else None
            rows = sum(length(chunks[number]) for file in mine for number in file)
            with bar(rows, label, self.progress, unit="row") as done:
                for file in mine:
                    for _, values in self._of_file(function, chunks, file, vectors, kept_by, None, label, work):
                        done(len(values))
            work.told(None)  # nobody goes on before all are there

    def emit_with_sum(
        self, function: Callable[[Any, Tensor], tuple[Tensor, Tensor]], *, vectors: int = 1, label: str = "emit"
    ) -> tuple[NDArray[np.float64], Tensor]:
        """An output row per example, and a sum over all rows, from one visit.

        Args:
            function: as for `emit` and for `fold`, both at once.
            vectors: how many vectors the function works on at once, for the batch size.
            label: what the progress bar says.
        """
        sums = Sums()
        values = joined(self.chunks(function, vectors=vectors, sums=sums, label=label), self.n)
        return values, finite(sums.total(), label)

    @threads.shared()
    def keep(
        self, function: Callable[[Any, Tensor], T], *, vectors: int = 1, label: str = "keep"
    ) -> dict[int, list[T]]:
        """function(batch, weights) of every batch, by the number of its chunk, for `fold_kept`.

        Of several ranks each keeps what its own chunks give, a part of the memory.
        """
        chunks = chunks_of(self.n, None, CHUNK)
        with ranks.work(f"{label} of {self.n:,} rows", len(chunks)) as work:
            visited = self._visited(work.shares(range(len(chunks)))[work.rank], chunks, work, label)
            each = _unnumbered(function)
            return {n: [kept for _, kept in self._batches(each, chunks[n], vectors, label)] for n in visited}

    @threads.shared()
    def fold_kept(self, kept: Mapping[int, Sequence[T]], function: Callable[[T], Tensor], *, label: str) -> Tensor:
        """The sum of a function of what was kept of all batches, float64."""
        chunks = len(chunks_of(self.n, None, CHUNK))
        with ranks.work(f"{label} of {self.n:,} rows", chunks) as work:
            sums = Sums()
            for number in work.shares(range(chunks))[work.rank]:
                work.at(number)
                sums.add(number, added(map(function, kept[number])).cpu())
            return work.total(sums, chunks)

    def whole(self, mine: Tensor, chunk: int) -> Tensor:
        """All rows of something of which every rank has those that it visits in a fold with such chunks."""
        if len(mine) == self.n:
            return mine
        chunks = chunks_of(self.n, None, chunk)
        with ranks.work(f"the rows of a sweep over {self.n:,}", len(chunks)) as work:
            places = [rows_of(share, chunks) for share in work.shares(range(len(chunks)))]
            values = np.full((self.n, *work.shape(mine.shape[1:] if len(mine) else None)), np.nan)
            values[places[work.rank]] = mine.numpy()
            work.rows(values, places)
        return torch.from_numpy(values)

    def _visited(
        self, mine: Sequence[int], chunks: list[Place], work: ranks.Alone | ranks.Shared, label: str
    ) -> Iterator[int]:
        """The numbers of this process's chunks, one after the other, with a bar over their rows."""
        with bar(sum(length(chunks[number]) for number in mine), label, self.progress, unit="row") as done:
            for number in mine:
                work.at(number)
                yield number
                done(length(chunks[number]))

    def _alone(
        self,
        function: Callable[[Any, Tensor], Any],
        chunks: list[Place],
        vectors: int,
        store: Store | None,
        sums: Sums | None,
        begun: int,
        label: str,
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The output rows of chunks, one after the other."""
        files = [range(begun, len(chunks))] if store is None else files_of(len(chunks), store.span, begun)
        for file in files:
            yield from self._of_file(function, chunks, file, vectors, store, sums, label, ranks.Alone())

    def _together(
        self,
        function: Callable[[Any, Tensor], Any],
        chunks: list[Place],
        vectors: int,
        store: Store | None,
        sums: Sums | None,
        begun: int,
        label: str,
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The same on every rank: each visits its share of a window of chunks, and gets the others' rows of it."""
        span = 1 if store is None else store.span
        files = files_of(len(chunks), span, begun)
        kept = set(finished(store, len(files_of(len(chunks), span))))
        width, at = _WINDOW[0] * ranks.size(), 0
        while at < len(files):
            window = files[at : at + width]
            places = chunks[window[0].start : window[-1].stop]
            missing = [file for file in window if file.start // span not in kept]
            there = [file for file in window if file.start // span in kept]
            with ranks.work(f"{label} of {count(chunks):,} rows", len(places)) as work:
                shares = [[*new, *old] for new, old in zip(work.shares(missing), work.shares(there), strict=True)]
                rows_out, own = OutputRows(window[0].start, places), None if sums is None else Sums()
                writes = len(places) > 1 or ranks.first()
                for file in shares[work.rank]:
                    where = store if writes or file in there else None
                    for number, values in self._of_file(function, chunks, file, vectors, where, own, label, work):
                        rows_out.put(number, values)
                numbers = [[number for file in share for number in file] for share in shares]
                if sums is not None and own is not None:
                    work.collect(sums, own, numbers)
                values = rows_out.of_all(work, numbers)
            for number in range(window[0].start, window[-1].stop):
                start = (number - window[0].start) * CHUNK
                yield number, values[start : start + length(chunks[number])]
            at += len(window)
            most = _WINDOW_BYTES // (values.itemsize * values[:1].size * CHUNK * span)
            width = ranks.size() * min(_WINDOW[1], max(1, most // ranks.size()))

    def _of_file(
        self,
        function: Callable[[Any, Tensor], Any],
        chunks: list[Place],
        file: range,
        vectors: int,
        store: Store | None,
        sums: Sums | None,
        label: str,
        work: ranks.Alone | ranks.Shared,
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """The output rows of chunks that lie in one file of the store, if there is one."""
        computed = self._of_chunks(function, chunks, file, vectors, sums, label, work)
        which, skipped = (0, 0) if store is None else divmod(file.start, store.span)
        if store is None or (skipped and which not in store):
            yield from zip(file, computed, strict=True)
            return
        if which in store:
            values = store.read(which)
            stop_here(f"chunk {which} of {-(-len(chunks) // store.span)}")
            for number in file:
                start = (number - file.start + skipped) * CHUNK
                yield number, values[start : start + length(chunks[number])]
            return
        rows = sum(length(chunks[number]) for number in file)
        yield from zip(file, store.passing(which, rows, computed), strict=True)
        stop_here(f"chunk {which + 1} of {-(-len(chunks) // store.span)}")

    def _of_chunks(
        self,
        function: Callable[[Any, Tensor], Any],
        chunks: list[Place],
        numbers: range,
        vectors: int,
        sums: Sums | None,
        label: str,
        work: ranks.Alone | ranks.Shared,
    ) -> Iterator[NDArray[np.float64]]:
        """The output rows of these chunks, in order; of a linear predictor several narrow ones at once."""

        def of(number: int) -> NDArray[np.float64]:
            work.at(number)
            return self._of_chunk(function, chunks[number], number, vectors, label, sums)

        each = CHUNK * self.example_bytes * (1 + vectors)
        if sums is not None or self.objective.linear is None or each > _NARROW_BYTES:
            return map(of, numbers)
        return threads.in_turn(of, numbers, self.at_most(self.memory, 4) // each)

    @threads.shared()
    def _of_chunk(
        self,
        function: Callable[[Any, Tensor], Any],
        place: Place,
        number: int,
        vectors: int,
        label: str,
        sums: Sums | None,
    ) -> NDArray[np.float64]:
        """The output rows of a chunk; its sum, where the function gives both, goes to `sums`."""
        batches = self._batches(_unnumbered(function), place, vectors, label)
        if sums is None:
            return self._rows(batches, label)
        inside: list[Tensor] = []

        def own_rows() -> Iterator[tuple[Numbers, Tensor]]:
            for numbers, (own, total) in batches:
                inside[:] = [added([*inside, total])]
                yield numbers, own

        values = self._rows(own_rows(), label)
        sums.add(number, inside[0].cpu())
        return values

    def _rows(self, batches: Iterator[tuple[Numbers, Tensor]], label: str) -> NDArray[np.float64]:
        """The output rows of a chunk, all of them finite; a device is waited for once."""
        visited, parts = zip(*((numbers, values.double()) for numbers, values in batches), strict=True)
        rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
        if bad.size:
            raise _not_finite(label, f"row {np.concatenate(visited)[int(bad[0])]} gives")
        return rows

    def _batches(
        self, function: Callable[..., T], chunk: Place, vectors: int, label: str
    ) -> Iterator[tuple[Numbers, T]]:
        """Row numbers and results, in batches that fit; one that does not is tried again at half the size."""
        numbers = range(chunk.start, chunk.stop) if isinstance(chunk, slice) else chunk
        size = self.batch_size or max(1, self.at_most(self.memory, 4) // (self.example_bytes * (1 + vectors)))
        start = 0
        while start < len(numbers):
            inside = numbers[start : start + size]
            rows = slice(inside.start, inside.stop) if isinstance(inside, range) else inside
            try:
                with undisturbed():
                    weights = torch.from_numpy(np.array(self.examples.weights[rows]))
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
            start += len(inside)
            found = [(inside, values)]
            del values  # what is yielded belongs to who asked for it, who may drop it before the next batch
            yield found.pop()


def _unnumbered(function: Callable[[Any, Tensor], T]) -> Callable[[Any, Tensor, Numbers], T]:
    """A function of a batch and its weights, as one that is given the numbers of its rows too."""
    return lambda batch, weights, _: function(batch, weights)


def finite(total: Tensor, label: str) -> Tensor:
    """A sum over rows, if it is one.

    Raises:
        InvalidInput: if it is NaN or infinite.
    """
    if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
        raise _not_finite(label, "a sum over the rows is")
    return total


def _not_finite(label: str, what: str) -> InvalidInput:
    message = (
        f"{label}: {what} NaN or infinite. Usual reasons: a label that the loss ignores (ignore_index), log(0) or an "
        "overflow inside the loss. Leave such rows out, or clamp inside the loss."
    )
    return InvalidInput(message)


def _out_of_memory(error: Exception) -> bool:
    told = ("can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)
