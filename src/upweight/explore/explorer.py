"""An opened run: what its pages ask of it, answered from the index in milliseconds."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from upweight.errors import InvalidInput
from upweight.explore import index, marks
from upweight.explore.desk import Desk
from upweight.explore.queue import Queue
from upweight.explore.tables import unpack
from upweight.explore.wanted import PAGE, Wanted
from upweight.influence.certificate import Certificate
from upweight.show.health import health
from upweight.show.parts import Parts, unpacked
from upweight.show.run import Card, Run

Side = Literal["rows", "queries"]
SLOWEST = 2.0  # seconds that a question to the index may take
FIELDS: tuple[str, ...] = (
    "id",
    "name",
    "label",
    "prediction",
    "class",
    "said",
    "wrong",
    "loss",
    "margin",
    "self_influence",
    "fold",
    "twin",
)
_STEPS = 20_000  # of SQLite's machine between two looks at the clock


@dataclass(frozen=True)
class Listing:
    """A page of items.

    Args:
        total: how many there are on all pages.
        items: those of this page, as dicts of FIELDS.
        page: its number, from 0.
        pages: how many there are.
    """

    total: int
    items: list[dict[str, Any]]
    page: int
    pages: int


class Explorer:
    """A run and its index.

    Args:
        run: a finished one.
        folder: of its index, as `index.ensure` gives it.
        other: another run of the same rows and queries, to compare with; None where there is none.

    Raises:
        InvalidInput: if the index, or a file of it, leads out of the run's folder.
    """

    def __init__(self, run: Run, folder: Path, other: Explorer | None = None) -> None:
        self.run, self.other = run, other
        self.folder = inside(run.path, folder)
        for name in (index.FACTS, index.ITEMS_FILE, index.VALUES, index.CODES, index.SUMS, index.MARKS):
            inside(run.path, folder / name)
        self.facts: Mapping[str, Any] = index.facts_in(folder)
        self.q, self.n = int(self.facts["q"]), int(self.facts["n"])
        self.work = hashlib.sha256(self.facts["made_of"].encode()).hexdigest()[:12]
        self._local = threading.local()

    @classmethod
    def open(cls, path: Path, other: Explorer | None = None, *, progress: bool | None = None) -> Explorer:
        """The explorer of a run folder, whose index is made if there is none; `comparing.together` opens two.

        Raises:
            InvalidInput: if a file of the run leads out of its folder, or as `index.ensure`.
            PathNotFound, Damaged, StorageFailed: as `Run.open` and `index.ensure`.
        """
        run = Run.open(path)
        with os.scandir(run.path) as entries:
            for link in sorted(entry.name for entry in entries if entry.is_symlink()):
                inside(run.path, run.path / link)
        return cls(run, index.ensure(run, progress=progress), other)

    def prepare(self) -> None:
        """Read what is read once, so that no page waits for it."""
        _ = self.health, self._marks
        _ = self.desk.reviews, self.desk.planned(Queue())  # with the labels of all rows

    # ---- what the run tells ------------------------------------------------------------------------------------------

    @cached_property
    def certificate(self) -> Certificate:
        """Of all queries."""
        return self.run.outline.certificate

    @cached_property
    def health(self) -> dict[str, Any]:
        """`good`, and `sentence`: what stands against the numbers, or that nothing does."""
        good, sentence = health(self.certificate, self.run.outline.query_values, self.measure)
        return {"good": good, "sentence": sentence}

    @property
    def measure(self) -> str:
        """What is measured on the queries, in words."""
        return self.run.outline.measure

    @property
    def classes(self) -> list[str] | None:
        """What classes are called, by their numbers; None where labels are no classes."""
        return self.facts["classes"]

    @cached_property
    def grouped(self) -> list[dict[str, Any]]:
        """Columns with levels, by the numbers that addresses name them by."""
        return [column for column in self.facts["columns"] if column["levels"]]

    # ---- items -------------------------------------------------------------------------------------------------------

    def items(self, wanted: Wanted) -> Listing:
        """A page of the rows or queries that are wanted."""
        condition, values = wanted.condition()
        side = wanted.side
        if wanted.everything:
            total = int(self.facts[side]["count"])
        elif wanted.by_words_alone:
            total = int(self.ask(f"select count(*) from {side}_text where {side}_text match ?", values)[0][0])
        else:
            total = int(self.ask(f"select count(*) from {side} where {condition}", values)[0][0])
        pages = max(1, -(-total // PAGE))
        page = min(wanted.page, pages - 1)
        source, values = wanted.source(total)
        ids = [number for (number,) in self.ask(f"{source} limit {PAGE} offset {page * PAGE}", values)]
        return Listing(total, self.some(side, ids), page, pages)

    def item(self, side: Side, number: int) -> dict[str, Any] | None:
        """One row or query as a dict of FIELDS; None if there is none."""
        found = self.some(side, [number])
        return found[0] if found else None

    def some(self, side: Side, numbers: list[int]) -> list[dict[str, Any]]:
        """Rows or queries by their numbers, in that order; those that do not exist are left out."""
        marks = ", ".join("?" * len(numbers))
        found = self.ask(f"select {', '.join(FIELDS)} from {side} where id in ({marks})", numbers)
        known = {line[0]: dict(zip(FIELDS, line, strict=True)) for line in found}
        return [known[number] for number in numbers if number in known]

    def cards(self, side: Side, numbers: list[int]) -> dict[int, Card]:
        """What rows or queries look like, by their numbers."""
        marks = ", ".join("?" * len(numbers))
        found = self.ask(f"select id, kind, h, w, d, card from {side}_card where id in ({marks})", numbers)
        return {number: unpack(*packed) for number, *packed in found}

    def parts(self, query: int, rows: list[int]) -> dict[int, Parts]:
        """Which parts of rows matter to a query, by row, as far as the run keeps them."""
        marks = ", ".join("?" * len(rows))
        sql = f"select row, kind, h, w, scale, content from parts where query = ? and row in ({marks})"
        found = self.ask(sql, [query, *rows])
        return {row: unpacked(kind, (h, w), scale, content) for row, kind, h, w, scale, content in found}

    def ask(self, sql: str, values: list[Any]) -> list[tuple[Any, ...]]:
        """Lines of the index; `sql` is a text of ours, and what comes from outside is among the values.

        Raises:
            TimeoutError: if it takes too long.
        """
        connection = self._connection()
        until = time.monotonic() + SLOWEST
        connection.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
        try:
            return connection.execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            if time.monotonic() > until:  # what was stopped says so in several ways
                raise TimeoutError from error
            raise

    def _connection(self) -> sqlite3.Connection:
        """Of this thread, for reading only."""
        if not hasattr(self._local, "connection"):
            address = (self.folder / index.ITEMS_FILE).absolute().as_uri()
            self._local.connection = sqlite3.connect(f"{address}?mode=ro&immutable=1", uri=True)
            self._local.connection.execute("pragma cache_size=-8000")
        return self._local.connection

    @cached_property
    def desk(self) -> Desk:
        """Where its labels are reviewed."""
        return Desk(self)

    def history(self, row: int) -> list[dict[str, Any]]:
        """What was decided about a row's label, in order."""
        return self.desk.history(row)

    # ---- values ------------------------------------------------------------------------------------------------------

    def line(self, query: int) -> NDArray[np.float64]:
        """(n,) the values of all rows for one query.

        Raises:
            Damaged: if they are not what was written.
        """
        return self._line(index.VALUES, np.dtype(np.float64), query, query)

    def column(self, row: int) -> NDArray[np.float64]:
        """(q,) the values of one row for all queries.

        Raises:
            Damaged: if those of the rows around it are not what was written.
        """
        place, file = row // marks.NUMBERS, self.folder / index.VALUES
        first = place * marks.NUMBERS
        size = 8 * min(marks.NUMBERS, self.n - first)
        places = [8 * (query * self.n + first) for query in range(self.q)]
        with file.open("rb") as content:
            if hasattr(os, "posix_fadvise"):  # the disk is asked for all of them before any is waited for
                for start in places:
                    os.posix_fadvise(content.fileno(), start, size, os.POSIX_FADV_WILLNEED)
            parts = [os.pread(content.fileno(), size, start) for start in places]
        marks.check(file, self._marks[: self.q, place], map(zlib.crc32, parts))
        return np.array([np.frombuffer(part, np.float64, 1, 8 * (row - first))[0] for part in parts])

    def codes(self, line: int) -> NDArray[np.int32]:
        """(n,) of every row: 0 its class, 1 what the model says, 2 … the levels of the columns with levels.

        Raises:
            Damaged: if they are not what was written.
        """
        return self._line(index.CODES, np.dtype(np.int32), line, self.q + line)

    def _line(self, name: str, dtype: np.dtype[Any], line: int, mark: int) -> NDArray[Any]:
        file = self.folder / name
        with file.open("rb") as content:
            found = np.fromfile(content, dtype, self.n, offset=dtype.itemsize * self.n * line)
        marks.check(file, self._marks[mark], marks.of_line(found))
        return found

    @cached_property
    def _marks(self) -> NDArray[np.uint32]:
        """(q + lines of codes, blocks) as they were when the index was made."""
        return np.fromfile(self.folder / index.MARKS, np.uint32).reshape(-1, marks.blocks(self.n))

    def sums(self) -> NDArray[np.float64]:
        """(q, Σ levels) sums of a query's values over the rows of each class, and of each level of the columns."""
        return np.fromfile(self.folder / index.SUMS, np.float64).reshape(self.q, -1)


def inside(folder: Path, path: Path) -> Path:
    """A path that lies in the folder, also where links have been followed.

    Raises:
        InvalidInput: if it does not.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        message = (
            f"{path} leads out of {folder}, to {path.resolve()}. The explorer reads the run's folder only. Delete the "
            f"link: the index, {index.FOLDER}/, is made again; any other file is to lie in the folder itself."
        )
        raise InvalidInput(message)
    return path
