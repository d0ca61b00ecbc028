"""How tables and JSON of the apps tell which row is meant: by its number, and by its name where it has one."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def names_in_json(ids: NDArray[Any] | None, rows: NDArray[Any], column: str = "ids") -> dict[str, list[Any]]:
    """A column of the names of these rows, no column where they have none; what is no number or text is its text."""
    if ids is None:
        return {}
    chosen = ids[rows].astype(str) if ids.dtype.kind in "Mm" else ids[rows]
    return {column: [plain(name) for name in chosen.tolist()]}


def plain(name: Any) -> str | int | float:
    """A name as JSON holds it."""
    return name if isinstance(name, str | int | float) else str(name)


def name_in_text(ids: NDArray[Any] | None, row: int) -> str:
    """The name of a row at the end of a line of a table, one line of text; empty where rows have no names."""
    return "" if ids is None else f"  {called(ids, row)}"


def called(ids: NDArray[Any] | None, row: int) -> str:
    """What a row is called in a sentence: its name, or its number where it has none."""
    return str(row) if ids is None else short(ids[row])


def short(name: Any) -> str:
    """A name in one line of text, of at most 32 characters."""
    text = " ".join(str(name).split())
    return text if len(text) <= 32 else f"{text[:31]}…"


def listed(ids: NDArray[Any] | None, rows: NDArray[Any], most: int) -> str:
    """The first of some rows as a sentence lists them, and how many more there are."""
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return ", ".join([called(ids, int(row)) for row in rows[:most]] + more)
