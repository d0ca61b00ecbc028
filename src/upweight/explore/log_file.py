"""The file of a log of reviews: made once, checked whenever it is opened, and only read where it may not be written."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from filelock import FileLock

from upweight.errors import Damaged, StoreMismatch

FILE = "reviews.sqlite"
FORMAT = 1
_WAIT = 15.0  # seconds for another writer
_NUMBERED = "new.number > 0 and exists (select 1 from entries where number >= new.number)"  # by itself, not by SQLite
SCHEMA = (
    "CREATE TABLE log(format integer not null, work text not null)",
    "CREATE TABLE entries(number integer primary key autoincrement check (number > 0), "
    "row integer not null check (row >= 0), "
    "action text not null check (action in ('keep', 'relabel', 'drop', 'skip', 'undo')), old text, new text, "
    "who text not null, at text not null, why text not null, undoes integer references entries(number), "
    "seen integer not null, check ((action = 'undo') = (undoes is not null)))",
    "CREATE INDEX entries_of_a_row ON entries(row, number)",
    *(
        f"CREATE TRIGGER {table}_{what}_refused BEFORE {what} ON {table} BEGIN "
        "SELECT RAISE(ABORT, 'a log of reviews is added to, never changed'); END"
        for table in ("log", "entries")
        for what in ("UPDATE", "DELETE")
    ),
    f"CREATE TRIGGER entries_replace_refused BEFORE INSERT ON entries WHEN {_NUMBERED} BEGIN "
    "SELECT RAISE(ABORT, 'a log of reviews is added to, never changed'); END",
    "CREATE TRIGGER log_second_refused BEFORE INSERT ON log WHEN exists (select 1 from log) BEGIN "
    "SELECT RAISE(ABORT, 'a log of reviews is added to, never changed'); END",
)


def exists_in(folder: Path) -> bool:
    """Whether a run has a log, or something that stands in its place."""
    file = folder / FILE
    return file.is_symlink() or file.exists()


def writable(file: Path, work: str) -> sqlite3.Connection:
    """The log, to be added to; made if there is none.

    Args:
        file: of the log.
        work: the run that it is of.

    Raises:
        OSError, sqlite3.Error: as SQLite says; the folder may not be written, for example.
        Damaged, StoreMismatch: as `check`.
    """
    connection = _connection(str(file), uri=False)
    try:
        for setting in ("cell_size_check = on", "foreign_keys = on"):
            connection.execute(f"pragma {setting}")
        with FileLock(file.with_name(".lock-reviews"), timeout=_WAIT):
            if not connection.execute("select 1 from sqlite_master").fetchone():
                connection.execute("pragma journal_mode = wal")
                connection.execute("begin immediate")
                for line in SCHEMA:
                    connection.execute(line)
                connection.execute("insert into log values(?, ?)", [FORMAT, work])
                connection.execute("commit")
        connection.execute("pragma synchronous = full")
        check(connection, file, work)
    except BaseException:
        connection.close()
        raise
    return connection


def readable(file: Path, work: str) -> sqlite3.Connection:
    """The log for reading alone.

    What is not yet in the file itself stands beside it (-wal), and is read only with an index beside it (-shm). Where
    nothing stands beside it, SQLite is told that the file stays as it is; `written_at` says whether it did.

    Raises:
        OSError, sqlite3.Error: as SQLite says.
        Damaged, StoreMismatch: as `check`.
    """
    beside = file.with_name(f"{FILE}-wal")
    waiting = beside.exists() and beside.stat().st_size > 0
    connection = _connection(f"{file.absolute().as_uri()}?mode=ro{'' if waiting else '&immutable=1'}", uri=True)
    try:
        check(connection, file, work)
    except BaseException:
        connection.close()
        raise
    return connection


def _connection(address: str, *, uri: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(address, uri=uri, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    connection.execute("pragma trusted_schema = off")
    return connection


def check(connection: sqlite3.Connection, file: Path, work: str) -> None:
    """Raises unless the file is a log of this run, and whole.

    Raises:
        Damaged: if it is no log.
        StoreMismatch: if it is another run's.
    """
    found = {sql for name, sql in connection.execute("select name, sql from sqlite_master") if sql is not None}
    found -= {"CREATE TABLE sqlite_sequence(name,seq)"}
    whole = [line for (line,) in connection.execute("pragma quick_check(1)")] == ["ok"]
    if found != set(SCHEMA) or not whole:
        reason = "its pages are broken" if found == set(SCHEMA) else "it has other tables than a log of reviews"
        message = f"{file} is damaged: {reason}. Move the file away, and the reviews begin anew."
        raise Damaged(message)
    logs = connection.execute("select format, work from log").fetchall()
    if logs != [(FORMAT, work)]:
        of = f"of format {logs[0][0]}, of run {logs[0][1]}" if logs else "of no run"
        message = (
            f"{file} is a log {of}, and this is run {work}: the folder was made again, or the "
            "file was copied. Export it where it belongs, and bring it here: upweight reviews RUN --add FILE."
        )
        raise StoreMismatch(message)


def place_of(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one that has its name; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def written_at(file: Path) -> tuple[tuple[int, int] | None, ...]:
    """When a file and what stands beside it (-wal) were written last, and how long they are; None where there is none.

    What others add stands beside the file first, sometimes for long.
    """
    found = []
    for one in (file, file.with_name(f"{FILE}-wal")):
        try:
            told = one.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((told.st_mtime_ns, told.st_size))
    return tuple(found)
