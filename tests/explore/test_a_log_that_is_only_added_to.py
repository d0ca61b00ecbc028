"""Reviews are a log: nothing is changed, nothing acknowledged is lost, and two who write at once agree."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from made import labels, log

from upweight.errors import Damaged, InvalidInput, Outdated, RowOutOfRange, StorageFailed, StoreMismatch
from upweight.explore.reviews import Reviews


@contextmanager
def read_only(folder):
    """A folder that may be read and not written, not by root either, who is somebody else meanwhile."""
    root = os.geteuid() == 0
    above = folder.parents[:-2] if root else []
    modes = {one: one.stat().st_mode for one in (*above, folder, *folder.iterdir())}
    for one in above:
        one.chmod(one.stat().st_mode | 0o055)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for one, mode in modes.items():
            one.chmod(mode)


@pytest.mark.parametrize("killed", [False, True])
def test_a_log_in_a_folder_that_may_not_be_written_is_read(tmp_path, killed):
    reviews = log(tmp_path)
    reviews.decide(4, "relabel", new=7, who="ann")
    if not killed:
        reviews.close()  # what stood beside the file is in it
    assert (tmp_path / "reviews.sqlite-wal").exists() == killed
    with read_only(tmp_path):
        seen = Reviews(tmp_path, labels())
        assert [(one.row, one.new, one.who) for one in seen.entries()] == [(4, 7, "ann")]
        with pytest.raises(StorageFailed, match="Nothing was kept of this decision"):
            seen.decide(5, "keep")
        assert [one.row for one in seen.entries()] == [4]
    seen.decide(5, "keep")  # the folder was made writable
    reviews.decide(6, "drop")
    assert [one.row for one in seen.entries()] == [4, 5, 6]
    assert [one.row for one in Reviews(tmp_path, labels()).entries()] == [4, 5, 6]


def test_what_was_added_meanwhile_is_seen_by_who_only_reads(tmp_path):
    first = log(tmp_path)
    first.decide(4, "keep")
    first.close()
    with read_only(tmp_path):
        seen = Reviews(tmp_path, labels())
    other = Reviews(tmp_path, labels())
    other.decide(5, "keep")
    assert [one.row for one in seen.entries()] == [4, 5], "it stands beside the file as yet"
    other.close()
    assert [one.row for one in seen.entries()] == [4, 5]


def test_a_log_that_is_taken_away_from_who_only_reads(tmp_path):
    first = log(tmp_path)
    first.decide(4, "keep")
    first.close()
    with read_only(tmp_path):
        seen = Reviews(tmp_path, labels())
    (tmp_path / "reviews.sqlite").unlink()
    with pytest.raises(StorageFailed, match="was moved, deleted or replaced"):
        seen.entries()


def test_what_stands_is_a_fold_of_the_log(tmp_path):
    reviews = log(tmp_path)
    assert reviews.verdicts() == {}
    assert not reviews.file.exists()
    first = reviews.decide(4, "relabel", new=7, who="ann", why="a bar")
    assert (first.number, first.old, first.new, first.who, first.why) == (1, 3, 7, "ann", "a bar")
    second = reviews.decide(4, "drop", who="bob", seen=1)
    assert (second.old, second.new, reviews.verdict(4).wrong) == (7, None, True)
    back = reviews.decide(4, "undo", who="bob", seen=2)
    assert (back.undoes, back.old, back.new) == (2, None, 7)
    assert (reviews.verdict(4).action, reviews.verdict(4).label) == ("relabel", 7)
    again = reviews.decide(4, "undo", seen=3)
    assert (again.undoes, again.new) == (1, 3)
    assert (reviews.verdict(4).action, reviews.verdict(4).seen) == (None, 4)
    with pytest.raises(InvalidInput, match="nothing to undo"):
        reviews.decide(4, "undo", seen=4)
    kept = reviews.decide(4, "keep", seen=4)
    assert (kept.new, reviews.verdict(4).decided, reviews.verdict(4).wrong) == (3, True, False)
    reviews.decide(5, "skip")
    assert not reviews.verdict(5).decided
    again = log(tmp_path)
    assert again.entries() == reviews.entries()
    assert again.verdicts() == reviews.verdicts()


@pytest.mark.parametrize(
    ("row", "action", "new", "error"),
    [
        (99, "keep", None, RowOutOfRange),
        (-1, "keep", None, RowOutOfRange),
        (0, "burn", None, InvalidInput),
        (0, "relabel", None, InvalidInput),
        (0, "keep", 7, InvalidInput),
        (0, "relabel", 5, InvalidInput),
        (0, "relabel", "7", InvalidInput),
        (0, "relabel", True, InvalidInput),
        (0, "relabel", 3, InvalidInput),
    ],
)
def test_what_makes_no_sense_is_not_written(tmp_path, row, action, new, error):
    reviews = log(tmp_path)
    with pytest.raises(error):
        reviews.decide(row, action, new=new)
    assert reviews.entries() == []


@pytest.mark.parametrize(
    "statement",
    [
        "update entries set action = 'keep'",
        "delete from entries",
        "delete from log",
        "update log set work = 'other'",
        "insert or replace into entries(number, row, action, who, at, why, seen) values(1, 0, 'keep', '', '', '', 0)",
        "replace into entries(number, row, action, who, at, why, seen) values(1, 0, 'keep', '', '', '', 0)",
        "insert into log values(1, 'x')",
        "insert into entries(number, row, action, who, at, why, seen) values(-1, 0, 'keep', '', '', '', 0)",
    ],
)
def test_the_file_itself_refuses_changes(tmp_path, statement):
    reviews = log(tmp_path)
    reviews.decide(0, "relabel", new=7)
    reviews.decide(1, "keep")
    with sqlite3.connect(reviews.file) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.close()
    assert [one.action for one in log(tmp_path).entries()] == ["relabel", "keep"]


def test_a_decision_on_what_has_changed_is_refused_with_what_happened(tmp_path):
    one, other = log(tmp_path), log(tmp_path)
    one.decide(2, "keep", who="ann")
    with pytest.raises(Outdated, match=r"meanwhile ann said keep at .* \(entry 1\)") as refused:
        other.decide(2, "drop", who="bob")
    assert refused.value.meanwhile == one.entries()[0]
    assert other.verdict(2).action == "keep"
    other.decide(2, "drop", who="bob", seen=other.verdict(2).seen)
    assert one.verdict(2).action == "drop"


def test_writers_at_once_agree(tmp_path):
    """Four threads with connections of their own decide on the same rows; each row has one winner for every `seen`."""
    won, lost = [], []

    def write(who):
        reviews = log(tmp_path, 40)
        for row in range(40):
            try:
                won.append((row, reviews.decide(row, "keep", who=who).who))
            except Outdated as error:
                lost.append((row, error.meanwhile.who))
        reviews.close()

    threads = [threading.Thread(target=write, args=[f"window {k}"]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = log(tmp_path, 40).entries()
    assert [one.number for one in entries] == list(range(1, 41))
    assert sorted(won) == sorted((one.row, one.who) for one in entries)
    assert len(lost) == 120
    assert set(lost) <= set(won)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from made import log
reviews = log(Path({folder!r}), 100_000)
for row in range(100_000):
    print(reviews.decide(row, "relabel" if row % 2 else "keep", new=3 if row % 2 else None).number, flush=True)
"""


def test_what_was_acknowledged_survives_being_killed(tmp_path):
    draw, code = random.Random(0), WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    for _ in range(4):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
            first = writer.stdout.readline()
            time.sleep(draw.random() / 4)
            writer.kill()
            told = [int(line) for line in [first, *writer.stdout] if line.endswith("\n")]
        entries = log(tmp_path, 100_000).entries()
        assert told == list(range(1, len(told) + 1))
        assert len(told) <= len(entries) <= len(told) + 1
        assert [(one.number, one.row) for one in entries] == [(k + 1, k) for k in range(len(entries))]
        log(tmp_path, 100_000).decide(len(entries), "skip")


def test_a_log_of_another_run_is_refused_by_name(tmp_path):
    log(tmp_path).decide(0, "keep")
    with pytest.raises(StoreMismatch, match=r"run 0123456789abcdef, and this is run feedfeedfeedfeed"):
        Reviews(tmp_path, labels(work="feedfeedfeedfeed"))


def _rewritten(file, *statements):
    with sqlite3.connect(file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


UNGUARDED = ("drop trigger entries_UPDATE_refused", "drop trigger entries_DELETE_refused")


@pytest.mark.parametrize(
    "statements",
    [
        ["create table more(x)"],
        ["create view entries_view as select 1"],
        ["drop trigger entries_UPDATE_refused"],
        ["create trigger hook after insert on entries begin select load_extension('x'); end"],
    ],
)
def test_a_file_with_other_tables_is_damaged(tmp_path, statements):
    log(tmp_path).decide(0, "keep")
    _rewritten(tmp_path / "reviews.sqlite", *statements)
    with pytest.raises(Damaged, match="other tables"):
        log(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "row = 5000",
        "row = 'x'",
        "new = '7'",
        "new = '[1]'",
        "new = 'nothing'",
        "new = x'00ff'",
        "old = '7'",
        "seen = 9",
        "who = x'00ff'",
        "new = " + repr("[" * 3000),
    ],
)
def test_an_entry_that_cannot_have_been_written_is_damaged(tmp_path, change):
    reviews = log(tmp_path)
    reviews.decide(0, "keep")
    reviews.close()
    triggers = sqlite3.connect(reviews.file).execute("select sql from sqlite_master where type = 'trigger'").fetchall()
    _rewritten(reviews.file, *UNGUARDED, f"update entries set {change}")
    _rewritten(reviews.file, *[sql for (sql,) in triggers if "entries_UPDATE" in sql or "entries_DELETE" in sql])
    with pytest.raises(Damaged, match=r"entry 1 cannot have been written"):
        log(tmp_path)


def test_bytes_that_are_no_database_are_damaged(tmp_path):
    (tmp_path / "reviews.sqlite").write_bytes(b"no database at all" * 500)
    with pytest.raises(Damaged, match="is damaged"):
        log(tmp_path)


@pytest.mark.parametrize("at", [0.0, 0.4, 0.8])
def test_broken_pages_are_an_error_and_never_a_number(tmp_path, at):
    reviews = log(tmp_path, 1000)
    for row in range(60):
        reviews.decide(row, "keep", why="x" * 400)
    reviews.close()
    content = bytearray(reviews.file.read_bytes())
    start = int(at * len(content))
    content[start : start + 3000] = bytes(reversed(range(250))) * 12
    reviews.file.write_bytes(content)
    with pytest.raises((Damaged, StorageFailed)):
        log(tmp_path, 1000)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "reviews.sqlite").symlink_to(tmp_path / "outside.sqlite")
    with pytest.raises(InvalidInput, match="is a link"):
        log(tmp_path / "inside")
    assert not (tmp_path / "outside.sqlite").exists()


def test_a_disk_that_cannot_be_written_is_told(tmp_path):
    reviews = log(tmp_path / "missing")
    with pytest.raises(StorageFailed, match="Nothing was kept of this decision"):
        reviews.decide(0, "keep")
