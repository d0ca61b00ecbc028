"""The proof: what a training on the corrected labels did to the queries."""

from __future__ import annotations

from typing import Any

from upweight.explore import proof as proofs
from upweight.explore.cards import shown
from upweight.explore.explorer import Explorer
from upweight.explore.page import Asked, Page
from upweight.explore.pages.review import said
from upweight.runs.store import work_of

FLIPS = 60  # on a page


def proof(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """The newest proof, or another one by its number."""
    with said():
        found, refused = proofs.read(explorer.run.path, work_of(explorer.run.manifest))
        desk = explorer.desk
        verdicts = desk.reviews.verdicts()
        wrong = sum(one.wrong for one in verdicts.values())
        last = len(desk.reviews.entries())
    number = asked.number("proof", max(0, len(found) - 1), most=max(0, len(found) - 1)) or 0
    told: dict[str, Any] = {
        "folder": str(explorer.run.path),
        "wrong": wrong,
        "entries": last,
        "proof": None,
        "number": number,
        "all": [{"number": place, "at": one.at, "says": one.says()} for place, one in enumerate(found)],
        "refused": refused,
        "flips": {},
    }
    if not found:
        return told
    one = found[number]
    kinds: dict[str, list[proofs.Flip]] = {"gained": [], "lost": [], "other": []}
    for flip in one.flips:
        kinds[flip.kind].append(flip)
    told["proof"] = {name: value for name, value in one.to_dict().items() if name != "flips"}
    told["newer"] = last - one.entry
    told["flips"] = {kind: _flips(explorer, flips) for kind, flips in kinds.items()}
    return told


def _flips(explorer: Explorer, flips: list[proofs.Flip]) -> dict[str, Any]:
    """Queries that flipped, with what they look like; the first of many."""
    few = [flip for flip in flips if flip.query < explorer.q][:FLIPS]
    cards = shown(explorer, "queries", explorer.some("queries", [flip.query for flip in few]))
    listed = [
        {"id": item["id"], "name": item["name"], "address": item["address"], "card": item["card"], **vars(flip)}
        for item, flip in zip(cards, few, strict=True)
    ]
    return {"count": len(flips), "items": listed}


PAGE = Page("proof", "/proof", proof, "Proof")
