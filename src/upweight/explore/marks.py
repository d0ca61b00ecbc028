"""Marks of an index's files, so that a flipped bit is an error and never a number: crc32 of blocks of their numbers.

    marks.u32   of every line of the values, then of every line of the codes, one for each 8,192 numbers

They tell what a disk did, not what a person did: whoever can write the folder can write the marks.
"""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import Damaged

NUMBERS = 8_192  # in a block
_BYTES = 2**22  # of a file that are read at once


def blocks(n: int) -> int:
    """How many blocks a line of n numbers has."""
    return -(-n // NUMBERS)


def of_line(line: NDArray[Any]) -> NDArray[np.uint32]:
    """The marks of a line of numbers."""
    parts = (line[start : start + NUMBERS].tobytes() for start in range(0, len(line), NUMBERS))
    return np.array([zlib.crc32(part) for part in parts], dtype=np.uint32)


def of_lines(file: Path, dtype: Any, lines: int, n: int) -> NDArray[np.uint32]:
    """(lines, blocks) the marks of a file of lines of n numbers."""
    found = [of_line(np.fromfile(file, dtype, n, offset=np.dtype(dtype).itemsize * n * line)) for line in range(lines)]
    return np.array(found, dtype=np.uint32).reshape(lines, blocks(n))


def of_file(file: Path) -> int:
    """The crc32 of a whole file."""
    found = 0
    with file.open("rb") as content:
        while part := content.read(_BYTES):
            found = zlib.crc32(part, found)
    return found


def check(file: Path, wanted: Iterable[int], found: Iterable[int]) -> None:
    """Raises where marks differ.

    Raises:
        Damaged: then.
    """
    if list(wanted) != list(found):
        message = (
            f"{file} is not what was written: some of its bits are others. It is derived from the run: delete "
            f"{file.parent}, and `upweight explore {shlex.quote(str(file.parent.parent))}` makes it again."
        )
        raise Damaged(message)
