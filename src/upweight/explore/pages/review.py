"""The review: suspicious rows one after the other, with blind random ones among them, and what is known by now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.exceptions import HTTPException

from upweight.errors import Damaged, InvalidInput, Outdated, StorageFailed, StoreMismatch, UpweightError
from upweight.explore.cards import shown
from upweight.explore.desk import Desk, told
from upweight.explore.entries import ACTIONS, RELABEL, UNDO, Entry, Verdict
from upweight.explore.explorer import Explorer
from upweight.explore.labels import OUT_OF_FOLD, THE_MODEL
from upweight.explore.page import Action, Asked, Page
from upweight.explore.queue import BUDGET, CONTROLS, MOST, ORDERS, Planned, Queue
from upweight.explore.reviews import LONGEST_WHY

AHEAD = 24  # rows that a page holds, so that the next one is there when a key is pressed
BUTTONS = 12  # classes that get a button each
RECENT = 8
_LINES = 500  # of the log at once


def review(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """The next rows of a queue, and how far it is."""
    with said():
        desk = explorer.desk
        queue = queue_of(asked, desk)
        entries = desk.reviews.entries()  # first: what comes in between has a verdict, too
        plan, verdicts = desk.planned(queue), desk.reviews.verdicts()
        places = _places(plan, verdicts, asked)
        reached = places[0] if places else len(plan.rows)
        return {
            "queue": _told(queue),
            "orders": [name for name in ORDERS if name in desk.labels.scores or name == ORDERS[-1]],
            "classes": _classes(desk),
            "buttons": len(desk.labels.classes) <= BUTTONS,
            "items": _items(explorer, desk, plan, verdicts, places),
            "place": reached,
            "places": len(plan.rows),
            "previous": reached - 1 if reached > 0 else None,
            "next": reached + 1 if reached + 1 < len(plan.rows) else None,
            "progress": desk.progress(queue).to_dict(),
            "last": entries[-1].number if entries else 0,
            "recent": _recent(desk, plan, verdicts, entries),
            "folder": str(explorer.run.path),
            "source": THE_MODEL if desk.labels.held_out is None else OUT_OF_FOLD,
        }


def log(explorer: Explorer, asked: Asked) -> dict[str, Any]:
    """Entries of the log, the newest last, and how far a queue is: what other windows have done since `after`."""
    with said():
        desk = explorer.desk
        queue, after = queue_of(asked, desk), asked.number("after", 0) or 0
        known = desk.reviews.entries()
        verdicts, entries = desk.reviews.verdicts(), [one for one in known if one.number > after]
        return {
            "after": after,
            "total": len(known),
            "entries": [told(one) for one in entries[-_LINES:]],
            "verdicts": [_verdict(verdicts[row]) for row in sorted({one.row for one in entries[-_LINES:]})],
            "progress": desk.progress(queue).to_dict(),
        }


def decide(explorer: Explorer, asked: Asked, sent: dict[str, Any]) -> dict[str, Any]:
    """One entry of the log: row, action, class (a number, with relabel), seen, why; answered when it is on the disk."""
    row, seen = _number(sent, "row", explorer.n - 1), _number(sent, "seen")
    action, why = sent.get("action"), sent.get("why", "")
    if action not in ACTIONS or not isinstance(why, str) or len(why) > LONGEST_WHY:
        raise HTTPException(
            400, f"action is one of {', '.join(ACTIONS)}, and why a text of {LONGEST_WHY:,} characters."
        )
    with said():
        desk = explorer.desk
        new = None
        if action == RELABEL:
            new = desk.labels.classes[_number(sent, "class", len(desk.labels.classes) - 1)]
        entry = desk.reviews.decide(row, action, new=new, who=desk.who, why=why, seen=seen)
        queue = queue_of(asked, desk)
        plan, verdict = desk.planned(queue), desk.reviews.verdict(row)
        return {
            "entry": told(entry),
            "verdict": _verdict(verdict),
            "kind": kind_of(plan, row) if verdict.action else None,
            "progress": desk.progress(queue).to_dict(),
        }


# ---- parts -----------------------------------------------------------------------------------------------------------


def queue_of(asked: Asked, desk: Desk) -> Queue:
    """The queue that an address asks for."""
    orders = [name for name in ORDERS if name in desk.labels.scores or name == ORDERS[-1]]
    percent = asked.number("controls", round(100 * CONTROLS), most=90)
    budget, seed = asked.number("budget", BUDGET, least=1, most=MOST), asked.number("seed", 0)
    return Queue(asked.choice("by", orders), budget or BUDGET, (percent or 0) / 100, seed or 0)


def kind_of(plan: Planned, row: int) -> dict[str, Any]:
    """What a row of the queue is, which is told after it is decided: a random control, and its rank in the order."""
    found = (plan.order == row).nonzero()[0]
    return {"control": bool((plan.draws == row).any()), "rank": int(found[0]) + 1 if len(found) else None}


@contextmanager
def said() -> Iterator[None]:
    """Errors of ours as answers, with their own words.

    Raises:
        HTTPException: 409 where somebody else was faster, 503 where the log cannot be used, else 400.
    """
    try:
        yield
    except Outdated as error:
        raise HTTPException(409, str(error)) from error
    except (Damaged, StorageFailed, StoreMismatch) as error:
        raise HTTPException(503, str(error)) from error
    except InvalidInput as error:
        raise HTTPException(400, str(error)) from error
    except UpweightError as error:
        raise HTTPException(404, str(error)) from error


def _told(queue: Queue) -> dict[str, Any]:
    return {"by": queue.by, "budget": queue.budget, "controls": round(100 * queue.controls), "seed": queue.seed}


def _places(plan: Planned, verdicts: Mapping[int, Verdict], asked: Asked) -> list[int]:
    """The places that a page holds: those from `at` on, or else the next ones that nobody has looked at."""
    at = asked.number("at", most=len(plan.rows) - 1)
    if at is not None:
        return list(range(at, min(at + AHEAD, len(plan.rows))))
    rows = plan.rows.tolist()
    left = (place for place, row in enumerate(rows) if row not in verdicts or verdicts[row].action is None)
    return [place for place, _ in zip(left, range(AHEAD), strict=False)]


def _items(
    explorer: Explorer, desk: Desk, plan: Planned, verdicts: Mapping[int, Verdict], places: list[int]
) -> list[dict[str, Any]]:
    """Rows as they are judged: without the numbers that would tell a control from a suspicious one."""
    rows = [int(plan.rows[place]) for place in places]
    cards = shown(explorer, "rows", explorer.some("rows", rows), whole=True)
    labels, found = desk.labels, []
    for place, row, item in zip(places, rows, cards, strict=True):
        verdict = verdicts.get(row, Verdict(row, None, labels.given(row), None, 0))
        suggested, source = labels.suggested(row)
        found.append(
            {
                "id": row,
                "name": item["name"],
                "place": place,
                "address": item["address"],
                "card": item["card"],
                "label": labels.given(row),
                "label_class": int(labels.codes[row]),
                "says": labels.predicted(row),
                "suggestion": suggested,
                "source": source,
                "suggested": None if suggested is None else labels.classes.index(suggested),
                "verdict": _verdict(verdict),
                "kind": kind_of(plan, row) if verdict.action else None,
            }
        )
    return found


def _classes(desk: Desk) -> list[dict[str, Any]]:
    """Classes by their numbers, with the key that chooses each."""
    names = [str(name) for name in desk.labels.classes]
    digits = all(len(name) == 1 and name in "0123456789" for name in names)
    keys = names if digits else [*"1234567890"[: len(names)], *[""] * (len(names) - 10)]
    pairs = zip(desk.labels.classes, keys, strict=True)
    return [{"class": place, "name": name, "key": key} for place, (name, key) in enumerate(pairs)]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    entry = verdict.entry
    return {
        "row": verdict.row,
        "action": verdict.action,
        "label": verdict.label,
        "seen": verdict.seen,
        "entry": None if entry is None else told(entry),
    }


def _recent(
    desk: Desk, plan: Planned, verdicts: Mapping[int, Verdict], entries: Sequence[Entry]
) -> list[dict[str, Any]]:
    """The last entries, the newest first, and what their rows turned out to be."""
    return [
        {
            **told(entry),
            "given": desk.labels.given(entry.row),
            "seen_last": verdicts[entry.row].seen,
            "undoable": entry.action != UNDO and verdicts[entry.row].entry == entry,
            "kind": kind_of(plan, entry.row) if verdicts[entry.row].action else None,
        }
        for entry in entries[-RECENT:][::-1]
    ]


def _number(sent: Mapping[str, Any], name: str, most: int = 2**53) -> int:
    value = sent.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise HTTPException(400, f"{name} is a whole number from 0 to {most}.")
    return value


PAGE = Page("review", "/review", review, "Review")
LOG = Page("review_log", "/review/log", log)
DECIDE = Action("/review/decide", decide)
