"""Exports: reviews as files for other programs, and how they come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upweight.errors import MissingExtra
from upweight.explore import exports
from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked, Download, Page, not_found
from upweight.explore.pages.review import queue_of, said
from upweight.show.run import Card

_BLOCK = 500  # rows whose cards are read at once
ABOUT = {
    exports.CSV: ("CSV", "What stands about every reviewed row, for a spreadsheet."),
    exports.JSONL: ("JSON lines", "The same, a JSON object in every line."),
    exports.PARQUET: ("Parquet", "The same, with types."),
    exports.CLEANLAB: (
        "cleanlab",
        "All rows, for CleanLearning.fit(label_issues=…): is_label_issue and its neighbours.",
    ),
    exports.LABEL_STUDIO: ("Label Studio tasks", "Rows of the queue that are not decided, with suggestions."),
    exports.LABEL_STUDIO_SETUP: ("Label Studio interface", "What the project of these tasks is set up with."),
    exports.PATCH: ("Patch", "What changes: row, old label, new label."),
}


def export(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """What can be taken along."""
    with said():
        desk = explorer.desk
        verdicts, queue = desk.reviews.verdicts(), queue_of(asked, desk)
        counts = {
            kind: sum(one.action == kind for one in verdicts.values()) for kind in ("keep", "relabel", "drop", "skip")
        }
        rows = desk.planned(queue).rows.tolist()
    files = [
        {"number": number, "kind": kind, "name": ABOUT[kind][0], "what": ABOUT[kind][1], "address": f"/export/{number}"}
        for number, kind in enumerate(exports.KINDS)
    ]
    left = sum(row not in verdicts or not verdicts[row].decided for row in rows)
    return {
        "folder": str(explorer.run.path),
        "counts": counts,
        "entries": len(desk.reviews.entries()),
        "left": left,
        "places": len(rows),
        "files": files,
        "asked": {"by": queue.by, "budget": queue.budget, "controls": round(100 * queue.controls), "seed": queue.seed},
    }


def download(explorer: Explorer, asked: Asked) -> tuple[str, str, bytes]:
    """A file by its number."""
    number = asked.path["number"]
    if number >= len(exports.KINDS):
        missing = f"There is no export {number}; there are 0 to {len(exports.KINDS) - 1}."
        raise not_found(missing)
    kind = exports.KINDS[number]

    def cards(rows: Sequence[int]) -> dict[int, Card]:
        parts = (explorer.cards("rows", list(rows[start : start + _BLOCK])) for start in range(0, len(rows), _BLOCK))
        return {row: card for part in parts for row, card in part.items()}

    with said():
        desk = explorer.desk
        rows = desk.planned(queue_of(asked, desk)).rows.tolist()
        try:
            made = exports.exported(kind, desk.labels, desk.reviews.verdicts(), queue=rows, cards=cards)
        except MissingExtra as error:
            raise not_found(str(error)) from error
    return made.name, made.media, made.content


PAGE = Page("export", "/export", export, "Export")
DOWNLOAD = Download("/export/{number:int}", download)
