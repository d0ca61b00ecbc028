"""A training row: whom it helps and harms, how it stands to the model, its near duplicates, and what was edited."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from upweight.explore.cards import shown
from upweight.explore.explorer import FIELDS, Explorer
from upweight.explore.leading import largest, spread
from upweight.explore.page import Asked, Page, existing

K = 8
_TWINS = 24


def row(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """A row, and its effects."""
    number = asked.path["row"]
    found = existing(explorer, "rows", number)
    card = explorer.cards("rows", [number]).get(number)
    values = explorer.column(number)
    sides = {}
    for name, queries in zip(("helps", "harms"), largest(values, K), strict=True):
        told = shown(explorer, "queries", explorer.some("queries", queries.tolist()), card, beside_is="row")
        sides[name] = [{**query, "value": float(values[query["id"]])} for query in told]
    known = values[np.isfinite(values)]
    return {
        "row": shown(explorer, "rows", [found], whole=True)[0],
        "previous": number - 1 if number > 0 else None,
        "next": number + 1 if number + 1 < explorer.n else None,
        "measure": explorer.measure,
        "rank": rank(explorer, found),
        "n": explorer.n,
        **sides,
        "helped": int((known > 0).sum()),
        "harmed": int((known < 0).sum()),
        "mean": float(known.mean()) if known.size else None,
        "histogram": spread(values),
        "twins": twins(explorer, found, card),
        "history": explorer.history(number),
    }


def rank(explorer: Explorer, found: dict[str, Any]) -> int | None:
    """The row's place by self-influence, from 1; None where it was not asked for."""
    value = found["self_influence"]
    if value is None:
        return None
    known = explorer.facts["rows"]["ranks"]  # from the largest on
    place = bisect_right(known, -value, key=lambda one: -one[0])  # as many of these are at least as large
    if not place:
        return 1 + int(explorer.ask("select count(*) from rows where self_influence > ?", [value])[0][0])
    edge, larger = known[place - 1]
    between = "select count(*) from rows where self_influence > ? and self_influence <= ?"
    return 1 + larger + int(explorer.ask(between, [value, edge])[0][0])


def twins(explorer: Explorer, found: dict[str, Any], card: Any) -> list[dict[str, Any]]:
    """Rows that look the same but for what hardly counts, and whether their label is another."""
    if found["twin"] is None:
        return []
    sql = f"select {', '.join(FIELDS)} from rows where twin = ? and id <> ? order by id limit {_TWINS}"
    lines = explorer.ask(sql, [found["twin"], found["id"]])
    others = shown(explorer, "rows", [dict(zip(FIELDS, line, strict=True)) for line in lines], card, beside_is="row")
    return [{**other, "same_label": other["label"] == found["label"]} for other in others]


PAGE = Page("row", "/rows/{row:int}", row)
