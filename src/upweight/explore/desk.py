"""Where reviewing happens: the labels of an opened run, from its index, and the log that people write."""

from __future__ import annotations

import getpass
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.explore import log_file
from upweight.explore.entries import Entry
from upweight.explore.labels import Labels, labels_of
from upweight.explore.queue import Planned, Progress, Queue, planned, progress
from upweight.explore.reviews import Reviews
from upweight.runs.store import work_of
from upweight.show.run import Run

_BLOCK = 50_000  # rows that are read of the index at once
_PLANS = 16  # that are kept


class Indexed(Protocol):
    """What a desk needs of an opened run."""

    run: Run
    n: int
    facts: Mapping[str, Any]

    @property
    def classes(self) -> list[str] | None:
        """Names of classes."""
        ...

    def codes(self, line: int) -> NDArray[np.int32]:
        """(n,) numbers of classes."""
        ...

    def ask(self, sql: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """Lines of the index."""
        ...


class Desk:
    """The reviews of an opened run.

    Args:
        opened: it.
        who: makes the entries.
    """

    def __init__(self, opened: Indexed, who: str | None = None) -> None:
        self.opened = opened
        self.who = _user() if who is None else who
        self._plans: dict[Queue, Planned] = {}
        self._lock = threading.RLock()

    @cached_property
    def labels(self) -> Labels:
        """The labels of the run's rows.

        Raises:
            InvalidInput: if it has no labels of classes.
        """
        with self._lock:
            return labels_of(self.opened.run) if self.opened.classes is None else _indexed(self.opened)

    @cached_property
    def reviews(self) -> Reviews:
        """The log.

        Raises:
            InvalidInput, StoreMismatch, Damaged, StorageFailed: as `Reviews`.
        """
        return Reviews(self.opened.run.path, self.labels)

    def planned(self, queue: Queue) -> Planned:
        """The places of a queue.

        Raises:
            InvalidInput: as `planned`.
        """
        with self._lock:
            if queue not in self._plans:
                if len(self._plans) >= _PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[queue] = planned(queue, self.labels)
            return self._plans[queue]

    def progress(self, queue: Queue) -> Progress:
        """What the reviews say about a queue by now."""
        return progress(self.planned(queue), self.reviews.verdicts(), self.labels)

    def history(self, row: int) -> list[dict[str, Any]]:
        """What was said about a row, oldest first; nothing where labels are no classes, or nobody said anything."""
        if not log_file.exists_in(self.opened.run.path):
            return []  # so that a row can be looked at before the labels of all have been read
        try:
            entries = self.reviews.of_row(row)
        except InvalidInput:
            return []
        return [told(entry) for entry in entries]


def told(entry: Entry) -> dict[str, Any]:
    """An entry as pages and twins tell it."""
    return {**vars(entry), "when": entry.at.replace("T", " ").removesuffix("Z")[:19]}


def _indexed(opened: Indexed) -> Labels:
    """The labels of a run as its index has them, without reading its files again."""
    codes, said = opened.codes(0), opened.codes(1)
    if (codes < 0).any():
        return labels_of(opened.run)  # which says what is missing
    asked = [code for (code,) in opened.ask("select distinct class from queries where class is not null", [])]
    held_out = _held_out(opened)
    used = np.unique(np.concatenate([codes, said[said >= 0], held_out[held_out >= 0], np.array(asked, dtype=np.int32)]))
    classes = tuple(_class(opened, code) for code in used.tolist())
    columns = ("self_influence", "loss", "margin")
    numbers = np.full((3, opened.n), np.nan)
    for start in range(0, opened.n, _BLOCK):
        sql = f"select {', '.join(columns)} from rows where id >= ? and id < ? order by id"
        lines = opened.ask(sql, [start, start + _BLOCK])
        numbers[:, start : start + len(lines)] = np.array(lines, dtype=np.float64).T
    numbers[2] *= -1
    scores: Mapping[str, NDArray[np.float64]] = dict(zip(("self-influence", "loss", "margin"), numbers, strict=True))
    known = {name: values for name, values in scores.items() if not np.isnan(values).all()}
    placed, outside = (np.where(one < 0, -1, np.searchsorted(used, one)).astype(np.int32) for one in (said, held_out))
    work, ids = work_of(opened.run.manifest), opened.run.outline.ids
    own = np.searchsorted(used, codes).astype(np.int32)
    return Labels(work, classes, own, placed, known, ids, outside if (outside >= 0).any() else None)


def _held_out(opened: Indexed) -> NDArray[np.int32]:
    """(n,) what was said of every row out of fold; −1 where nothing was."""
    found = np.full(opened.n, -1, dtype=np.int32)
    if opened.facts["out_of_fold"]:
        for start in range(0, opened.n, _BLOCK):
            sql = "select ifnull(fold, -1) from rows where id >= ? and id < ? order by id"
            lines = opened.ask(sql, [start, start + _BLOCK])
            found[start : start + len(lines)] = [code for (code,) in lines]
    return found


def _class(opened: Indexed, code: int) -> Any:
    """The label that a number of a class stands for, of its own type."""
    for side, column, by in (("rows", "label", "class"), ("rows", "prediction", "said"), ("queries", "label", "class")):
        if found := opened.ask(f"select {column} from {side} where {by} = ? limit 1", [code]):
            return found[0][0]
    raise LookupError(code)  # the code was read from one of these


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        return "somebody"
