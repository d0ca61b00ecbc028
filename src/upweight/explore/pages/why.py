"""Why the model says what it says of a query: the training rows behind it, those that help and those that harm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.explore.cards import distance, distance_is, shown
from upweight.explore.explorer import Explorer
from upweight.explore.leading import largest, spread
from upweight.explore.page import Asked, Page, existing
from upweight.explore.parted import parted

K, MOST = 8, 100
_OTHERS = 150  # rows spread through the data that stand for all in the picture of distances


def why(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """A query, and the rows behind it."""
    number = asked.path["query"]
    query = existing(explorer, "queries", number)
    k = asked.number("k", K, least=1, most=MOST) or K
    classes = explorer.classes
    label = asked.number("label", most=len(classes) - 1) if classes else None
    card = explorer.cards("queries", [number]).get(number)
    line = explorer.line(number)
    chosen = None if label is None else np.flatnonzero(explorer.codes(0) == label)
    helpful, harmful = largest(line, k, chosen)
    looked = line if chosen is None else line[chosen]
    sides = {}
    for name, rows in (("helpful", helpful), ("harmful", harmful)):
        found = shown(explorer, "rows", explorer.some("rows", rows.tolist()), card)
        parts = taken_apart(explorer, number, rows.tolist())
        sides[name] = [{**row, "value": float(line[row["id"]]), "parts": parts.get(row["id"])} for row in found]
    return {
        "query": shown(explorer, "queries", [query], whole=True)[0],
        "previous": number - 1 if number > 0 else None,
        "next": number + 1 if number + 1 < explorer.q else None,
        "asked": {"label": label, "k": k if k != K else None},
        "k": k,
        "more": min(MOST, 3 * k) if k < MOST and max(len(helpful), len(harmful)) == k else None,
        "measure": explorer.measure,
        "determined": not bool(np.isnan(line).all()),
        **sides,
        "parts": next((row["parts"]["kind"] for rows in sides.values() for row in rows if row["parts"]), None),
        "total": float(looked.sum()),
        "rows": len(looked),
        "histogram": spread(looked),
        "classes": classes,
        "by_class": by_class(explorer, number),
        "distances": distances(explorer, card, line, np.concatenate([helpful, harmful])),
        "distance": distance_is(card),
    }


def taken_apart(explorer: Explorer, query: int, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Which parts of the rows matter, where the run keeps them."""
    if not explorer.facts["taken_apart"]:
        return {}
    found = explorer.parts(query, rows)
    cards = explorer.cards("rows", list(found))
    return {row: parted(one, cards.get(row), f"/queries/{query}/rows/{row}/parts.png") for row, one in found.items()}


def by_class(explorer: Explorer, query: int) -> list[dict[str, Any]]:
    """What all rows of each class do together, to first order; the strongest first."""
    names = explorer.classes or []
    sums = explorer.sums()[query][: len(names)].tolist()
    found = [{"class": place, "name": names[place], "value": value} for place, value in enumerate(sums)]
    return sorted(found, key=lambda one: -abs(one["value"]))[:20]


def distances(
    explorer: Explorer, card: Any, line: NDArray[np.float64], leading: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Value against distance: the rows that lead, and some that are spread through the data."""
    if card is None:
        return []
    rows = np.unique(np.concatenate([leading, np.linspace(0, explorer.n - 1, min(explorer.n, _OTHERS)).astype(int)]))
    spreads = {column["name"]: column["spread"] for column in explorer.facts["columns"]}
    found = []
    for row, other in explorer.cards("rows", rows.tolist()).items():
        apart, value = distance(card, other, spreads), float(line[row])
        if apart is not None:
            kind = "helps" if value > 0 else "harms"
            found.append({"row": row, "x": apart, "y": value, "kind": kind, "title": f"row {row}"})
    return found


PAGE = Page("why", "/queries/{query:int}", why)
