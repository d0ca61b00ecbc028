"""Rows of numbers that stay in their file: read in blocks when they are asked for, the next block in the meantime.

    np.memmap · zarr.Array · columns of a table (`data/tables.py`)

A block is a few megabytes of whole rows, in memory of its own, in C order and native byte order; two are kept, and
where rows are read one after the other a thread reads the next. Pages of a mapped file are handed back once they were
copied, so that the memory of the process does not grow with the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput, UpweightError, first_line

_BLOCK_BYTES = 2**22
_APART = 64  # rows here and there that are copied before their pages are handed back
_WHOLE_CHUNKS = 16  # blocks that a chunk of a file may be as large as, so as to be unpacked once a pass


class Source(Protocol):
    """Where rows are read from; `read` gives memory of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, …)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """In native byte order."""
        ...

    @property
    def files(self) -> Files:
        """What must not change in the meantime."""
        ...

    @property
    def chunk(self) -> int:
        """Rows that are unpacked together; 1 where any rows can be read alone."""
        ...

    @property
    def waits(self) -> bool:
        """Whether reading waits for a file, so that it pays to read ahead."""
        ...

    def read(self, start: int, stop: int) -> Any:
        """Rows start … stop − 1."""
        ...

    def take(self, rows: NDArray[np.int64]) -> Any:
        """These rows, which are sorted and differ; None where they are better read in blocks."""
        ...


@dataclass(frozen=True)
class Files:
    """Files with their sizes and times when they were first seen.

    Args:
        seen: the path, the size in bytes and the time of the last change in nanoseconds of each.
    """

    seen: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Any]) -> Files:
        """These files as they are now; what is no file of this machine is left out."""
        return cls(tuple((path, *_stamp(path)) for path in map(os.fspath, paths) if os.path.isfile(path)))

    def check(self) -> None:
        """Raises when one of them is another than it was.

        Raises:
            InvalidInput: if its size or its time of change differs.
        """
        for path, size, changed in self.seen:
            now = _stamp(path) if os.path.isfile(path) else (0, 0)
            if now != (size, changed):
                how = f"has {now[0]} bytes, and had {size}" if now[0] != size else "was written to"
                message = (
                    f"{path} {how} since X was opened, so that rows read now are not those that were read before. Wait "
                    "until it is complete (of a memmap that you wrote to yourself: X.flush()), open it again and call "
                    "explain again."
                )
                raise InvalidInput(message)


class Stored:
    """An array of n rows that is read in blocks; slices, lists of rows and lists of columns of it work as an array's.

    Memory: three blocks of about 4 MB, or of a chunk of the file where that is at most 64 MB.

    Args:
        source: where the rows are read from.
        ids: the names that the file has for its rows; None if it has none.
    """

    def __init__(self, source: Source, ids: Any = None) -> None:
        self.source = source
        self.shape, self.dtype, self.ndim = source.shape, source.dtype, len(source.shape)
        self.ids = ids
        self.finite = False  # whether every number was looked at and is one
        self.block_rows = _rows_of_a_block(source)
        self._kept: dict[int, Any] = {}
        self._ahead: _Ahead | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Stored({self.shape}, {self.dtype})"

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, tuple):
            rows, columns = rows
            chosen = self.mapped(lambda block: block[:, columns])
            return chosen if isinstance(rows, slice) and rows == slice(None) else chosen[rows]
        if not isinstance(rows, slice):
            listed = np.asarray(rows)
            if listed.ndim != 1 or listed.dtype.kind not in "iu" or not len(listed) or (np.diff(listed) != 1).any():
                return self._taken(listed)
            rows = slice(int(listed[0]), int(listed[-1]) + 1)
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self._taken(np.arange(start, stop, step))
        return self._between(start, stop)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows in memory."""
        if copy is False:
            message = "rows that lie in a file cannot be had without a copy"
            raise ValueError(message)
        whole = self._between(0, len(self))
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def mapped(self, function: Callable[[Any], Any]) -> Stored:
        """The same rows through a function of a block of them, applied whenever they are read."""
        return Stored(_Mapped(self.source, function), self.ids)

    def with_lines(self, rows: NDArray[np.int64], new: NDArray[Any]) -> Stored:
        """The same with other lines in the places of these rows; nothing else is copied."""
        return Stored(_Edited(self.source, rows, new), self.ids)

    def _taken(self, rows: NDArray[Any]) -> Any:
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        chosen, places = np.unique(rows, return_inverse=True)
        found = self._checked(self.source.take, chosen) if len(chosen) else self._between(0, 0)
        if found is None:
            found = np.empty((len(chosen), *self.shape[1:]), self.dtype)
            numbers = chosen // self.block_rows
            for number in np.unique(numbers):
                found[numbers == number] = self._block(number)[chosen[numbers == number] - number * self.block_rows]
        return found[places.reshape(rows.shape)]

    def _between(self, start: int, stop: int) -> Any:
        if start >= stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        size = self.block_rows
        if stop - start > 3 * size:  # into one array, with no second copy
            whole = np.empty((stop - start, *self.shape[1:]), self.dtype)
            for at in range(start, stop, size):
                whole[at - start : at - start + size] = self._between(at, min(at + size, stop))
            return whole
        pieces = [
            self._block(number, ahead=True)[max(0, start - number * size) : stop - number * size]
            for number in range(start // size, (stop - 1) // size + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _block(self, number: int, *, ahead: bool = False) -> Any:
        """A block, which is kept with the one before it; in a row of them the next is read meanwhile."""
        if number in self._kept:
            return self._kept[number]
        found = None
        if self._ahead is not None:
            found = self._ahead.result() if self._ahead.number == number else self._ahead.dropped()
            self._ahead = None
        if found is None:
            found = self._read(number)
        follows = number == 0 or number - 1 in self._kept
        self._kept = {at: block for at, block in self._kept.items() if at == number - 1} | {number: found}
        if ahead and follows and self.source.waits and (number + 1) * self.block_rows < len(self):
            self._ahead = _Ahead(self._read, number + 1)
        return found

    def _read(self, number: int) -> Any:
        start = number * self.block_rows
        return self._checked(self.source.read, start, min(start + self.block_rows, len(self)))

    def _checked(self, read: Callable[..., Any], *rows: Any) -> Any:
        """What was read, from files that were the same before and are afterwards."""
        self.source.files.check()
        try:
            found = read(*rows)
        except UpweightError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            message = (
                f"Rows of X could not be read: {type(error).__name__}: {first_line(error)}. Usually their file is "
                "damaged, was moved, or was written over. Make it again, open it and call explain again."
            )
            raise InvalidInput(message) from error
        self.source.files.check()
        return found


class _Ahead:
    """A block that a thread reads; what goes wrong there goes wrong again where the block is needed."""

    def __init__(self, read: Callable[[int], Any], number: int) -> None:
        self.number = number
        self._found: list[Any] = []
        self._thread = Thread(target=self._run, args=(read,), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        """The block, or None."""
        self._thread.join()
        return self._found[0] if self._found else None

    def dropped(self) -> None:
        """None, once nobody reads any more."""
        self._thread.join()

    def _run(self, read: Callable[[int], Any]) -> None:
        with suppress(Exception):
            self._found.append(read(self.number))


def stored(values: Any) -> Any:
    """A mapped file or a zarr array as `Stored`; anything else as it is."""
    if isinstance(values, np.ndarray) and values.ndim and _mapped_file(values) is not None:
        return Stored(MappedFile(values))
    is_zarr = type(values).__module__.partition(".")[0] == "zarr" and hasattr(values, "oindex")
    return Stored(Chunked(values)) if is_zarr and values.ndim else values


class MappedFile:
    """The rows of an array that lies in a mapped file."""

    chunk, waits = 1, True

    def __init__(self, array: NDArray[Any]) -> None:
        memmap = _mapped_file(array)
        self.array = np.asarray(array)
        self.shape, self.dtype = array.shape, array.dtype.newbyteorder("=")
        name = getattr(memmap, "filename", None)
        self.files = Files.of([] if name is None else [name])
        private = getattr(memmap, "mode", "c") == "c"  # changes in memory, which the file does not have
        self._pages = None if private else getattr(memmap, "_mmap", None)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """A copy."""
        return self._copied(slice(start, stop))

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy; a few rows at a time, for the system may map megabytes around each that lies far from the others."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for start in range(0, len(rows), _APART):
            found[start : start + _APART] = self._copied(rows[start : start + _APART])
        return found

    def _copied(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """A copy of these rows, whose pages are handed back: they stay in the cache of the system, not in ours."""
        copied = np.array(self.array[rows], dtype=self.dtype, order="C")
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
        return copied


class Chunked:
    """The rows of a zarr array, whose chunks are unpacked as a whole."""

    waits = True
    files = Files()  # a folder of chunks, or no file at all

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype).newbyteorder("=")
        self.chunk = int((getattr(array, "shards", None) or array.chunks)[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start … stop − 1."""
        return np.asarray(self.array[start:stop], dtype=self.dtype)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """These rows."""
        return np.asarray(self.array.oindex[rows], dtype=self.dtype)


class _Mapped:
    """A source through a function of its blocks."""

    def __init__(self, source: Source, function: Callable[[Any], Any]) -> None:
        self.source, self.function = source, function
        one = function(source.read(0, 1))
        self.shape, self.dtype = (source.shape[0], *one.shape[1:]), np.dtype(one.dtype)
        self.files, self.chunk, self.waits = source.files, source.chunk, source.waits

    def read(self, start: int, stop: int) -> Any:
        """The function of these rows."""
        return self.function(self.source.read(start, stop))

    def take(self, rows: NDArray[np.int64]) -> Any:
        """The function of these rows."""
        found = self.source.take(rows)
        return None if found is None else self.function(found)


class _Edited:
    """A source with other lines in the places of some rows."""

    def __init__(self, source: Source, rows: NDArray[np.int64], new: NDArray[Any]) -> None:
        order = np.argsort(rows)
        self.source, self.rows, self.new = source, rows[order], new[order]
        self.shape, self.dtype = source.shape, np.result_type(source.dtype, new.dtype)
        self.files, self.chunk, self.waits = source.files, source.chunk, source.waits

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """These rows, with the new lines among them."""
        block = self.source.read(start, stop).astype(self.dtype, copy=False)
        first, last = np.searchsorted(self.rows, [start, stop])
        block[self.rows[first:last] - start] = self.new[first:last]
        return block

    def take(self, rows: NDArray[np.int64]) -> Any:
        """These rows, with the new lines among them."""
        found = self.source.take(rows)
        if found is None:
            return None
        found = found.astype(self.dtype, copy=False)
        _, among, new = np.intersect1d(rows, self.rows, return_indices=True)
        found[among] = self.new[new]
        return found


def _rows_of_a_block(source: Source) -> int:
    """A power of two, or whole chunks of the file where these are not much larger."""
    row_bytes = max(1, source.dtype.itemsize * int(np.prod(source.shape[1:])))
    rows = 2 ** int(np.log2(max(1, _BLOCK_BYTES // row_bytes)))
    if source.chunk <= rows:
        return rows // source.chunk * source.chunk
    return source.chunk if source.chunk <= _WHOLE_CHUNKS * rows else rows


def _mapped_file(array: Any) -> Any:
    """The np.memmap that an array is, or looks into; None for memory of its own."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and getattr(array, "_mmap", None) is not None:
            return array
        array = array.base
    return None


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
