"""The queries, and the training rows: filtered, sorted, searched, a page at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

from upweight.explore.cards import shown
from upweight.explore.explorer import Explorer, Side
from upweight.explore.page import Asked, Page
from upweight.explore.wanted import SORTS, Wanted

TRUTH = ("any", "wrong", "right")


def items(side: Side, explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """A page of items, and what they can be filtered by."""
    wanted, told = choice(side, explorer, asked)
    found = explorer.items(wanted)
    facts = explorer.facts[side]
    return {
        "side": side,
        "asked": told,
        "total": found.total,
        "all": facts["count"],
        "page": found.page,
        "pages": found.pages,
        "items": shown(explorer, side, found.items),
        "classes": explorer.classes,
        "columns": [{"name": column["name"], "levels": column["levels"]} for column in explorer.grouped],
        "sorts": sorts(explorer, side),
        "judged": facts["labelled"] > 0,
        "uncertain": facts["uncertain"],
        "measure": explorer.measure,
    }


def sorts(explorer: Explorer, side: Side) -> list[str]:
    """What the items of a side can be sorted by."""
    known = explorer.facts[side]["means"]
    return [name for name, column in SORTS.items() if column == "id" or column in known]


def choice(side: Side, explorer: Explorer, asked: Asked) -> tuple[Wanted, dict[str, Any]]:
    """What an address wants, and the same as it stands in addresses."""
    classes = len(explorer.classes or ())
    label, said = (asked.number(name, most=classes - 1) if classes else None for name in ("label", "said"))
    truth, search = asked.choice("truth", TRUTH), asked.text("search")
    level = None
    group = asked.number("group", most=len(explorer.grouped) * 1000)  # column · 1000 + level, one field of a form
    if group is not None and group // 1000 < len(explorer.grouped):
        level = (group // 1000, group % 1000)
    unsure = asked.flag("uncertain")
    sort, descending = asked.choice("sort", sorts(explorer, side)), asked.flag("down")
    wanted = Wanted(
        side,
        label,
        said,
        {"wrong": True, "right": False}.get(truth),
        level,
        explorer.facts[side]["uncertain"] if unsure else None,
        search,
        sort,
        descending,
        asked.page(),
    )
    told = {
        "search": search,
        "truth": truth if truth != "any" else "",
        "label": label,
        "said": said,
        "group": group if level else None,
        "uncertain": unsure,
        "sort": sort if sort != "id" else "",
        "down": descending,
    }
    return wanted, told


QUERIES = Page("queries", "/queries", partial(items, "queries"), "Queries")
ROWS = Page("rows", "/rows", partial(items, "rows"), "Rows")
