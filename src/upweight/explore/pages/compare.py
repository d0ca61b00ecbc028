"""Two runs beside each other: the queries on which they differ most, and the rows that moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from upweight.explore.cards import shown
from upweight.explore.comparing import compared, movers
from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked, Page, existing
from upweight.explore.wanted import PAGE as LONG

_ORDERS = ("pearson", "helpful", "harmful", "query")
_MOVERS = 20


def compare(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """The queries, those first on which the runs agree least."""
    other = explorer.other
    if other is None:
        return {"other": None, "folder": str(explorer.run.path)}
    found, order = compared(explorer, other), asked.choice("sort", _ORDERS)
    found = sorted(found, key=lambda one: (one[order] is None, one[order]))
    pages = max(1, -(-len(found) // LONG))
    page = min(asked.page(), pages - 1)
    some = found[page * LONG : (page + 1) * LONG]
    items = shown(explorer, "queries", explorer.some("queries", [one["query"] for one in some]))
    return {
        "other": _told(other),
        "this": _told(explorer),
        "asked": {"sort": order if order != _ORDERS[0] else ""},
        "page": page,
        "pages": pages,
        "pearson": _mean(found, "pearson"),
        "overlap": _mean(found, "helpful", "harmful"),
        "items": [{**item, **one} for item, one in zip(items, some, strict=True)],
    }


def compare_query(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """A query's rows whose values differ most between the two runs."""
    query = existing(explorer, "queries", asked.path["query"])
    other = explorer.other
    if other is None:
        return {"other": None, "folder": str(explorer.run.path), "query": query}
    here, there = explorer.line(query["id"]), other.line(query["id"])
    rows = movers(here, there, _MOVERS)
    few = rows.tolist()
    items = shown(
        explorer, "rows", explorer.some("rows", few), explorer.cards("queries", [query["id"]]).get(query["id"])
    )
    return {
        "other": _told(other),
        "this": _told(explorer),
        "query": shown(explorer, "queries", [query], whole=True)[0],
        "previous": query["id"] - 1 if query["id"] else None,
        "next": query["id"] + 1 if query["id"] + 1 < explorer.q else None,
        "items": [{**item, "here": float(here[item["id"]]), "there": float(there[item["id"]])} for item in items],
    }


def _mean(found: Iterable[dict[str, Any]], *names: str) -> float | None:
    """Of what is known."""
    known = [one[name] for one in found for name in names if one[name] is not None]
    return sum(known) / len(known) if known else None


def _told(explorer: Explorer) -> dict[str, Any]:
    return {"folder": str(explorer.run.path), "certificate": str(explorer.certificate)}


PAGE = Page("compare", "/compare", compare, "Compare")
QUERY = Page("compare_query", "/compare/{query:int}", compare_query)
