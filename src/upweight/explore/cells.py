"""Texts in the cells of a CSV file that a spreadsheet will not take for formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def harmless(cell: Any) -> Any:
    """A cell as it is, but for a text that a spreadsheet would run: it gets an apostrophe in front.

    A text that begins with an apostrophe before such a sign gets one more, so that `bare` gives every text back.

    >>> harmless("=1+1"), harmless(-3), harmless("'=x"), harmless("'tis")
    ("'=1+1", -3, "''=x", "'tis")
    """
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip("'").startswith(_STARTS) else cell


def bare(text: str) -> str:
    """The text that `harmless` was given.

    >>> bare(harmless("=1+1")), bare(harmless("'=x")), bare(harmless("'tis"))
    ('=1+1', "'=x", "'tis")
    """
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(_STARTS) else text


def written(columns: Mapping[str, Sequence[Any]]) -> tuple[str, int]:
    """Columns as CSV, and how many cells got an apostrophe; a cell that is None is empty."""
    stream, guarded = io.StringIO(), 0
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow([harmless(name) for name in columns])
    for line in zip(*columns.values(), strict=True):
        cells = [harmless(cell) for cell in line]
        guarded += sum(new is not old for new, old in zip(cells, line, strict=True))
        writer.writerow(["" if cell is None else cell for cell in cells])
    return stream.getvalue(), guarded


def read(text: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns of a CSV text, and its records by the number of their first line, as they were before
    `harmless`.

    Raises:
        ValueError: if a line has another number of cells than the first, with its number; two columns have one name;
            or it is no CSV.
    """
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if first.count(";") > first.count(",") else ",")
    names = [bare(name).strip() for name in next(reader, [])]
    if len(set(names)) < len(names):
        reason = f"two columns are called {next(name for name in names if names.count(name) > 1)!r}"
        raise ValueError(reason)
    lines: list[tuple[int, dict[str, str]]] = []
    for number, cells in _numbered(reader):
        if len(cells) != len(names):
            reason = f"line {number} has {len(cells)} cells and the first {len(names)}"
            raise ValueError(reason)
        lines.append((number, dict(zip(names, map(bare, cells), strict=True))))
    return names, lines


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, by the line that each begins in: a cell may hold several lines.

    Raises:
        ValueError: if it is no CSV.
    """
    try:
        while True:
            number = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield number, cells
    except csv.Error as error:  # such as a cell of more than 131,072 characters
        raise ValueError(str(error)) from error
