"""A safetensors file of one array whose rows come part after part: a thread hashes and writes them meanwhile.

It has the bytes that `files.write_tensors` would give it. It grows under a temporary name; what has come is on its way
to the disk at once, so that little is left to be flushed when the last rows are there. Then it gets its name.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.runs.files import CARD, DIGEST, flush_folder, said, summary, temporary_name


class Growing:
    """One array, of which `add` gives the next rows, until `finish` or `drop`.

    Memory: rows that the disk has not taken yet.

    Args:
        path: of the file; its folder exists.
        name: of the array.
        shape: of all of it.
        card: what is told of it, as for `files.write_tensors`.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], card: Mapping[str, Any]) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._name, self._shape, self._card = name, shape, json.loads(json.dumps(dict(card)))
        self._size = 8 * int(np.prod(shape))
        self._parts: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._wanted = True
        self._there = threading.Event()  # under its name, or failed
        self._thread = threading.Thread(target=self._run, name="upweight-growing", daemon=True)
        self._thread.start()

    def add(self, rows: NDArray[np.float64]) -> None:
        """The next rows, which nobody may change any more.

        Raises:
            StorageFailed, InvalidInput: as for `files.write_file`.
        """
        self._refuse_failed()
        self._parts.put(np.ascontiguousarray(rows, "=f8").reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """All rows have come: the file gets its name; that name may come to the disk while others go on.

        Raises:
            StorageFailed, InvalidInput: as for `files.write_file`.
        """
        self._parts.put(None)
        self._there.wait()
        self._refuse_failed()

    def settle(self) -> None:
        """Wait until the name is on the disk, too."""
        self._thread.join()

    def drop(self) -> None:
        """No more rows will come, and nothing is kept."""
        self._wanted = False
        self._parts.put(None)
        self._thread.join()

    def _refuse_failed(self) -> None:
        if isinstance(self._error, OSError):
            raise said(self._path, self._error, self._size) from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # raised where the rows come from
            self._error = error
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
        finally:
            self._there.set()

    def _write(self) -> None:
        found = summary({self._name: ("<f8", self._shape)}, self._card)
        with self._temporary.open("wb", buffering=0) as file:
            at = _written(file, self._head("0" * 64))
            while self._wanted and (part := self._parts.get()) is not None:
                found.update(part)
                size = _written(file, part)
                _send(file.fileno(), at, size)
                at += size
            if self._wanted:
                file.seek(0)
                _written(file, self._head(found.hexdigest()))
                os.fsync(file.fileno())
        if not self._wanted:
            self._temporary.unlink()
            return
        self._temporary.replace(self._path)
        self._there.set()
        flush_folder(self._path.parent)

    def _head(self, digest: str) -> bytes:
        """What stands before the numbers in a safetensors file, as its own library writes it."""
        text = json.dumps({**self._card, DIGEST: digest}, sort_keys=True)
        array = {"dtype": "F64", "shape": list(self._shape), "data_offsets": [0, self._size]}
        head = json.dumps({"__metadata__": {CARD: text}, self._name: array}, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head


def _written(file: Any, content: bytes | memoryview) -> int:
    """The bytes of this, after all of them are written: a disk that fills up takes a part."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    return len(content)


def _send(handle: int, at: int, size: int) -> None:
    """Have the system begin to write so many bytes of a file, without waiting; where it does not, fsync does it all."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(handle, at, size, os.POSIX_FADV_DONTNEED)
