"""What slices of the rows do to slices of the queries: class by class, or by the levels of a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked, Page

_MOST = 20  # lines and columns of the matrix


def slices(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """A matrix: for the queries of a slice, the mean of what all rows of a slice do to them together."""
    ways = [{"by": 0, "name": "label"}] if explorer.classes else []
    ways += [{"by": 1 + place, "name": column["name"]} for place, column in enumerate(explorer.grouped)]
    known = [way["by"] for way in ways]
    rows_by, queries_by = (asked.number(name, known[0] if known else 0, most=99) or 0 for name in ("rows", "queries"))
    if not known or rows_by not in known or queries_by not in known:
        return {"ways": ways, "asked": {}, "matrix": None, "measure": explorer.measure}
    lines, columns = _levels(explorer, queries_by), _levels(explorer, rows_by)
    start = _start(explorer, rows_by)
    sums = explorer.sums()[:, start : start + len(columns)]
    counts = explorer.facts["counts"][start : start + len(columns)]
    field = "class" if queries_by == 0 else f"c{queries_by - 1}"
    found = explorer.ask(f"select {field}, wrong, loss from queries order by id", [])
    place = np.array([-1 if code is None else code for code, _, _ in found])
    shown = _largest(counts)
    matrix = []
    for code in _largest(np.bincount(place[place >= 0], minlength=len(lines)).tolist()):
        mine = np.flatnonzero(place == code)
        wrong = [found[query][1] for query in mine if found[query][1] is not None]
        matrix.append(
            {
                "level": code,
                "name": lines[code],
                "address": _address("queries", queries_by, code),
                "count": len(mine),
                "wrong": float(np.mean(wrong)) if wrong else None,
                "loss": float(np.mean([found[query][2] for query in mine])),
                "values": [float(value) for value in np.nanmean(sums[mine][:, shown], 0)],
            }
        )
    largest = max((abs(value) for line in matrix for value in line["values"] if np.isfinite(value)), default=0.0)
    return {
        "ways": ways,
        "asked": {"rows": rows_by, "queries": queries_by},
        "columns": [
            {"level": code, "name": columns[code], "count": counts[code], "address": _address("rows", rows_by, code)}
            for code in shown
        ],
        "matrix": matrix,
        "largest": largest,
        "left_out": [len(lines) - len(matrix), len(columns) - len(shown)],
        "measure": explorer.measure,
    }


def _largest(counts: Sequence[int]) -> list[int]:
    """The levels that most items have, as many as are shown, in their order; none that no item has."""
    order = np.argsort([-count for count in counts], kind="stable")[:_MOST].tolist()
    return sorted(code for code in order if counts[code])


def _levels(explorer: Explorer, by: int) -> list[str]:
    return list(explorer.classes or []) if not by else explorer.grouped[by - 1]["levels"]


def _start(explorer: Explorer, by: int) -> int:
    """Where the sums over these levels begin."""
    before = [explorer.classes or [], *(column["levels"] for column in explorer.grouped)]
    return sum(len(levels) for levels in before[:by])


def _address(side: str, by: int, level: int) -> str:
    """The items of a slice."""
    return f"/{side}?label={level}" if not by else f"/{side}?group={(by - 1) * 1000 + level}"


PAGE = Page("slices", "/slices", slices, "Slices")
