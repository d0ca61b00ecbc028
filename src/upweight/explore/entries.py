"""What is said about training rows, entry by entry, and what stands of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from upweight.explore.labels import Label

KEEP, RELABEL, DROP, SKIP, UNDO = "keep", "relabel", "drop", "skip", "undo"
ACTIONS = (KEEP, RELABEL, DROP, SKIP, UNDO)


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    Args:
        number: of the entry, in the order in which they were made.
        row: the training row.
        action: keep, relabel, drop, skip (it cannot be told), or undo.
        old: the label before, None where the row had been dropped.
        new: the label after, None where the row is dropped.
        who: said it.
        at: when, in UTC.
        why: a remark.
        undoes: the entry that an undo takes back.
        seen: the last entry about the row at the time, 0 for none.
    """

    number: int
    row: int
    action: str
    old: Label | None
    new: Label | None
    who: str
    at: str
    why: str
    undoes: int | None
    seen: int


@dataclass(frozen=True)
class Verdict:
    """What stands about a row.

    Args:
        row: the training row.
        action: keep, relabel, drop or skip; None where everything was taken back.
        label: what its label is to be, None for a row to be dropped.
        entry: that says so, None where everything was taken back.
        seen: the last entry about the row.
    """

    row: int
    action: str | None
    label: Label | None
    entry: Entry | None
    seen: int

    @property
    def wrong(self) -> bool:
        """Whether the given label was found to be wrong."""
        return self.action in {RELABEL, DROP}

    @property
    def decided(self) -> bool:
        """Whether it was found to be right or wrong."""
        return self.action in {KEEP, RELABEL, DROP}


def in_words(entry: Entry) -> str:
    """What somebody said meanwhile."""
    to = f" to {entry.new!r}" if entry.action == RELABEL else ""
    return f"meanwhile {entry.who or 'somebody'} said {entry.action}{to} at {entry.at} (entry {entry.number})"


def left_of(entries: Iterable[Entry]) -> list[Entry]:
    """The entries about one row that were not taken back."""
    left: list[Entry] = []
    for entry in entries:
        if entry.action == UNDO:
            left.pop()
        else:
            left.append(entry)
    return left


def standing(entries: Iterable[Entry]) -> Entry | None:
    """The one about a row that says what stands."""
    return next(reversed(left_of(entries)), None)


def as_text(label: Label | None) -> str | None:
    """A label as JSON, None for none."""
    return None if label is None else json.dumps(label)


def as_label(text: Any) -> Label | None:
    """A label from its JSON text.

    Raises:
        ValueError: if it is none.
    """
    if text is None:
        return None
    found = json.loads(text)
    if isinstance(found, str | int | float) and not isinstance(found, bool):
        return found
    reason = "a label is a text or a number"
    raise ValueError(reason)
