"""How tables and JSON of the apps tell which row is meant: by its number, and by its name where it has one."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def names_in_json(ids: NDArray[Any] | None, rows: NDArray[Any]) -> dict[str, list[Any]]:
    """A column `ids` for these rows, no column where they have no names; what is no number or text becomes its text."""
    if ids is None:
        return {}
    chosen = ids[rows].astype(str) if ids.dtype.kind in "Mm" else ids[rows]
    return {"ids": [name if isinstance(name, str | int | float) else str(name) for name in chosen.tolist()]}


def name_in_text(ids: NDArray[Any] | None, row: int) -> str:
    """The name of a row at the end of a line of a table, one line of text; empty where rows have no names."""
    if ids is None:
        return ""
    text = " ".join(str(ids[row]).split())
    return f"  {text if len(text) <= 32 else f'{text[:31]}…'}"
