"""What people said about labels: a log in the run folder to which entries are added, and nothing else ever happens.

    run/reviews.sqlite    log(format, work): what it is a log of      entries: row, action, old, new, who, at, why, …

The data set is never edited. An entry that takes another back is an entry too, and triggers refuse every update and
deletion. Each entry is on the disk before it is acknowledged (write-ahead log, full synchronisation), so a process that
is killed loses nothing that it was told of. Entries are numbered in the order in which they were made, by however many
windows and processes; whoever decides on a row says which entry of that row he had seen, and is refused if there is
another by now. What stands is a fold of the log.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from upweight.errors import Damaged, InvalidInput, Outdated, StorageFailed, first_line
from upweight.explore import log_file
from upweight.explore.entries import (
    ACTIONS,
    DROP,
    KEEP,
    RELABEL,
    SKIP,
    UNDO,
    Entry,
    Verdict,
    as_label,
    as_text,
    in_words,
    left_of,
    standing,
)
from upweight.explore.labels import Label, Labels

LONGEST_WHO, LONGEST_WHY = 200, 2_000  # characters
_COLUMNS = "number, row, action, old, new, who, at, why, undoes, seen"


class Reviews:
    """The log of a run's reviews.

    Args:
        folder: of the run.
        labels: of its rows.

    Raises:
        StoreMismatch: if the log is another run's.
        Damaged: if it is no log, or not one that this version wrote.
        StorageFailed: if it cannot be opened or written.
    """

    def __init__(self, folder: Path, labels: Labels) -> None:
        self.file, self.labels = Path(folder) / log_file.FILE, labels
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._place: tuple[int, int] | None = None
        self._frozen: tuple[Any, ...] | None = None  # when it was written and how long it is, where it is only read
        self._known: list[Entry] = []
        self._folded: dict[int, list[Entry]] = {}
        if log_file.exists_in(Path(folder)):
            with self._lock:
                self._open()
                self.entries()

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    # ---- reading -----------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All of them, in order, those of other windows too.

        Raises:
            Damaged: if one is not what can have been written.
        """
        with self._lock:
            if self._connection is None and not self.file.exists():
                return []
            self._thaw()
            last = self._known[-1].number if self._known else 0
            with self._said():
                connection = self._open()
                lines = connection.execute(f"select {_COLUMNS} from entries where number > ? order by number", [last])
                for line in lines.fetchall():
                    self._take(line)
            return list(self._known)

    def verdicts(self) -> dict[int, Verdict]:
        """What stands, by row, for every row that something was ever said of."""
        with self._lock:
            self.entries()
            return {row: self._verdict(row) for row in self._folded}

    def verdict(self, row: int) -> Verdict:
        """What stands about a row.

        Raises:
            RowOutOfRange: if there is no such row.
        """
        self.labels.given(row)
        with self._lock:
            self.entries()
            return self._verdict(row)

    def of_row(self, row: int) -> list[Entry]:
        """What was said about a row, oldest first."""
        with self._lock:
            self.entries()
            return list(self._folded.get(row, []))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def decide(
        self, row: int, action: str, *, new: Label | None = None, who: str = "", why: str = "", seen: int = 0
    ) -> Entry:
        """One more entry, on the disk when it is returned.

        Args:
            row: the training row.
            action: keep, relabel, drop, skip, or undo, which takes back what stands.
            new: the right label, with relabel only.
            who: says so.
            why: a remark.
            seen: the last entry about the row that was known to whoever decides; `Verdict.seen`.

        Raises:
            InvalidInput: if there is no such action, or no such class, or nothing to take back.
            RowOutOfRange: if there is no such row.
            Outdated: if something else was said about the row meanwhile; nothing is written.
            StorageFailed: if it cannot be written.
        """
        given = self.labels.given(row)
        new = self._checked(row, action, new, who, why)
        with self._lock, self._said():
            self._thaw(always=True)
            connection = self._open()
            connection.execute("begin immediate")
            try:
                self.entries()
                before = self._verdict(row)
                if before.seen != seen:
                    self._refuse(row, before)
                undoes, after = None, {RELABEL: new, DROP: None}.get(action, given)
                if action == UNDO:
                    undoes, after = self._undone(row, before)
                told = (
                    row, action, as_text(before.label), as_text(after), who, _now(), why, undoes, seen
                )  # fmt: skip
                names = _COLUMNS.removeprefix("number, ")
                cursor = connection.execute(f"insert into entries({names}) values(?, ?, ?, ?, ?, ?, ?, ?, ?)", told)
                connection.execute("commit")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("rollback")
                raise
            self._take((cursor.lastrowid, *told))
            return self._known[-1]

    # ---- folding -----------------------------------------------------------------------------------------------------

    def _verdict(self, row: int) -> Verdict:
        entries = self._folded.get(row, [])
        last = standing(entries)
        seen = entries[-1].number if entries else 0
        if last is None:
            return Verdict(row, None, self.labels.given(row), None, seen)
        return Verdict(row, last.action, last.new, last, seen)

    def _undone(self, row: int, before: Verdict) -> tuple[int, Label | None]:
        """The entry that stands, and the label of the row without it.

        Raises:
            InvalidInput: if nothing stands.
        """
        if before.entry is None:
            message = f"Nothing stands about row {row}, so there is nothing to undo. Decide first: keep, relabel, drop "
            raise InvalidInput(message + "or skip.")
        left = [one for one in left_of(self._folded[row]) if one.number != before.entry.number]
        return before.entry.number, left[-1].new if left else self.labels.given(row)

    def _take(self, line: tuple[Any, ...]) -> None:
        """An entry that was read or written into memory, if it follows from those before.

        Raises:
            Damaged: if it does not.
        """
        try:
            number, row, action, old, new, who, at, why, undoes, seen = line
            entry = Entry(number, row, action, as_label(old), as_label(new), who, at, why, undoes, seen)
            before, given = self._verdict(row), self.labels.given(row)
            texts = isinstance(who, str) and isinstance(at, str) and isinstance(why, str)
            after = {KEEP: given, SKIP: given, DROP: None, RELABEL: entry.new}.get(action, given)
            if action == UNDO:
                after = self._undone(row, before)[1]
                texts = texts and before.entry is not None and undoes == before.entry.number
            known = entry.new is None or self.labels.meant(entry.new) == entry.new
            follows = texts and action in ACTIONS and (seen, entry.old, entry.new) == (before.seen, before.label, after)
            if not (follows and known and (action != RELABEL or entry.new is not None)):
                _say(f"{action} of row {row} does not follow from what stood")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            message = (
                f"{self.file} is damaged: entry {line[0]} cannot have been written ({first_line(error)}). Move the "
                "file away, and the reviews begin anew; its entries can be read with the program sqlite3."
            )
            raise Damaged(message) from error
        self._known.append(entry)
        self._folded.setdefault(row, []).append(entry)

    # ---- the file ----------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            self._refuse_elsewhere()
            return self._connection
        if self.file.is_symlink() or (self.file.exists() and not self.file.is_file()):
            message = f"{self.file} is a link or a folder, and reviews stay inside the run. Move it away."
            raise InvalidInput(message)
        with self._said():
            self._connection = self._connected()
            self._place = log_file.place_of(self.file)
        return self._connection

    def _connected(self) -> sqlite3.Connection:
        """The log, to be added to; only to be read where its folder may not be written."""
        self._frozen = None
        try:
            return log_file.writable(self.file, self.labels.work)
        except (sqlite3.OperationalError, OSError):
            if not self.file.exists():
                raise
            self._frozen = log_file.written_at(self.file)
            return log_file.readable(self.file, self.labels.work)

    def _refuse_elsewhere(self) -> None:
        """Raises where the log that is open no longer lies in the run: what went there would be lost.

        Raises:
            StorageFailed: then; the next call opens what lies there.
        """
        if log_file.place_of(self.file) == self._place:
            return
        self.close()
        self._known, self._folded = [], {}
        message = (
            f"{self.file} was moved, deleted or replaced while it was open, so nothing was kept of this decision. Put "
            "it back, or decide again: that begins a new log, or goes on in the one that lies there now."
        )
        raise StorageFailed(message)

    def _thaw(self, *, always: bool = False) -> None:
        """Give back a file that is only read and has changed since, or that somebody now wants to write."""
        if self._connection is None or not self._frozen or log_file.place_of(self.file) != self._place:
            return  # a log that lies elsewhere is refused when it is asked for
        if always or log_file.written_at(self.file) != self._frozen:
            self.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What SQLite says, in our words.

        Raises:
            Damaged: if the file is no database.
            StorageFailed: if it cannot be read or written.
        """
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            if isinstance(error, StorageFailed):
                raise
            message = (
                f"{self.file} cannot be read or written ({first_line(error)}). Nothing was kept of this decision. Make "
                "room, or make the folder writable, and decide again."
            )
            raise StorageFailed(message) from error
        except sqlite3.DatabaseError as error:
            message = (
                f"{self.file} is damaged ({first_line(error)}). Move the file away, and the reviews begin anew; the "
                "program sqlite3 may rescue its entries with .recover."
            )
            raise Damaged(message) from error

    def _checked(self, row: int, action: str, new: Any, who: str, why: str) -> Label | None:
        """The class that is meant.

        Raises:
            InvalidInput: if an entry like that makes no sense.
        """
        if action not in ACTIONS:
            message = f"action={action!r} is none of {', '.join(ACTIONS)}. Name one of them."
            raise InvalidInput(message)
        if len(who) > LONGEST_WHO or len(why) > LONGEST_WHY:
            message = (
                f"who has {len(who):,} characters and why {len(why):,}; there is room for {LONGEST_WHO} and "
                f"{LONGEST_WHY:,}. Write less."
            )
            raise InvalidInput(message)
        if (action == RELABEL) != (new is not None):
            message = (
                f"Row {row}: action {action!r} with new={new!r}. A new label belongs to relabel, and only there. Pass "
            )
            raise InvalidInput(message + f"action='relabel', new={self.labels.classes[0]!r}, for example.")
        if new is None:
            return None
        meant = self.labels.meant(new)
        if meant == self.labels.given(row):
            message = f"Row {row} has the label {meant!r} in the data already. To say that it is right, keep it: keep."
            raise InvalidInput(message)
        return meant

    def _refuse(self, row: int, now: Verdict) -> NoReturn:
        """Raises what happened to a row meanwhile.

        Raises:
            Outdated: always.
        """
        last = self._folded[row][-1] if row in self._folded else None
        what = "there is no entry about it" if last is None else in_words(last)
        message = f"Row {row} was not written: {what}. Look at the row again, and decide with seen={now.seen}."
        raise Outdated(message, last)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _say(reason: str) -> NoReturn:
    """Raises with a reason.

    Raises:
        ValueError: always.
    """
    raise ValueError(reason)
