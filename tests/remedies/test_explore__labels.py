"""What is said to type by the explorer's reviews, exports and proofs, typed."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest
from made import N, labels, labels_of, log, made, study

import upweight as uw
from refusals import refused
from upweight.explore import corrected, exports, imports, intervals, proof
from upweight.explore.queue import Queue, planned
from upweight.explore.reviews import Reviews


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def known(run):
    return labels_of(run)


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_rows_and_classes_of_a_run(known):
    with refused(" does not exist: the run has ", " rows. Name one of 0 to "):
        known.given(N)
    assert known.given(N - 1) in known.classes
    with refused(" is no class of this run: there are ", ". Write one of them"):
        known.meant("wolf")
    assert known.meant("dog") == "dog"
    with refused(" classes of this run, not one: there are ", "Write one of them as it stands here"):
        known.called("wolf")
    assert known.called("=owl") == "=owl"


def test_a_run_with_classes_is_made(tmp_path):
    influence = study().influence
    influence.on_loss(*study().queries, store=tmp_path / "run")
    with refused(", and a review is of labels. ", "Make a run that has them: uw.write_run(influence, folder, Xq, yq)"):
        labels_of(uw.Run.open(tmp_path / "run"))
    assert labels_of(uw.write_run(influence, tmp_path / "run", *study().queries)).n == N


def test_measurements_are_looked_at_by_their_self_influence(tmp_path):
    from sklearn.linear_model import Ridge

    X = np.arange(12.0).reshape(6, 2)
    run = uw.write_run(uw.explain(Ridge().fit(X, X[:, 0] / 7), X, X[:, 0] / 7), tmp_path, X[:2], X[:2, 0])
    with refused(
        ", which are measurements ", "Make a run of a classifier, or look at the rows by their self-influence"
    ):
        labels_of(run)
    assert len(run.rows.self_influence) == 6


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_decisions_that_make_sense(tmp_path):
    reviews = log(tmp_path)
    with refused("action=", "Name one of them"):
        reviews.decide(0, "burn")
    with refused(" characters and why ", "Write less"):
        reviews.decide(0, "keep", why="x" * 3000)
    with refused("A new label belongs to relabel, and only there. ", "Pass action='relabel', new="):
        reviews.decide(0, "keep", new=7)
    reviews.decide(0, "relabel", new=7)
    with refused(" in the data already. ", "To say that it is right, keep it: keep"):
        reviews.decide(1, "relabel", new=7)
    reviews.decide(1, "keep")
    with refused(", so there is nothing to undo. ", "Decide first: keep, relabel, drop or skip"):
        reviews.decide(2, "undo")
    reviews.decide(2, "skip")
    with refused(" was not written: ", "Look at the row again, and decide with seen="):
        reviews.decide(2, "keep")
    assert reviews.decide(2, "keep", seen=3).number == 4


def test_a_link_is_moved_away(tmp_path):
    (tmp_path / "reviews.sqlite").symlink_to(tmp_path / "elsewhere")
    with refused(", and reviews stay inside the run. ", "Move it away"):
        log(tmp_path)
    (tmp_path / "reviews.sqlite").rename(tmp_path / "away")
    assert log(tmp_path).decide(0, "keep").number == 1


def test_a_broken_log_is_moved_away(tmp_path):
    (tmp_path / "reviews.sqlite").write_bytes(b"nothing of the kind" * 300)
    with refused(" is damaged (", "Move the file away, and the reviews begin anew; the program sqlite3 may rescue"):
        log(tmp_path)
    (tmp_path / "reviews.sqlite").rename(tmp_path / "away")
    assert log(tmp_path).decide(0, "keep").number == 1


def test_a_log_with_other_tables_is_moved_away(tmp_path):
    with sqlite3.connect(tmp_path / "reviews.sqlite") as other:
        other.execute("create table t(x)")
    other.close()
    with refused("it has other tables than a log of reviews", "Move the file away, and the reviews begin anew."):
        log(tmp_path)
    (tmp_path / "reviews.sqlite").rename(tmp_path / "away")
    assert log(tmp_path).decide(0, "keep").number == 1


def test_an_entry_out_of_nowhere_is_moved_away(tmp_path):
    reviews = log(tmp_path)
    reviews.decide(0, "keep")
    with sqlite3.connect(reviews.file) as other:
        other.execute("insert into entries(row, action, who, at, why, seen) values(900, 'keep', '', '', '', 0)")
    other.close()
    with refused(
        " cannot have been written (", "Move the file away, and the reviews begin anew; its entries can be read"
    ):
        log(tmp_path)
    reviews.close()
    (tmp_path / "reviews.sqlite").rename(tmp_path / "away")
    assert log(tmp_path).decide(0, "keep").number == 1


def test_a_log_of_another_run_is_exported_there_and_brought_here(run, known, tmp_path):
    there = labels(N, "feedfeedfeedfeed")
    Reviews(tmp_path, there).decide(3, "keep")
    with refused(
        ", and this is run ", "Export it where it belongs, and bring it here: upweight reviews RUN --add FILE"
    ):
        Reviews(tmp_path, labels(N))
    made = exports.exported("csv", there, Reviews(tmp_path, there).verdicts())
    (tmp_path / "a.csv").write_bytes(made.content)
    (tmp_path / "here").mkdir()
    with refused(" belongs to run ", "Import it there, or take the column `run` out if the rows are the same"):
        imports.read(tmp_path / "a.csv", labels(N))
    (tmp_path / "a.csv").write_text(made.content.decode().replace(",feedfeedfeedfeed", ","))
    here = Reviews(tmp_path / "here", labels(N))
    assert imports.add(here, *imports.read(tmp_path / "a.csv", labels(N)), "me").added == 1


def test_a_folder_is_made_writable(tmp_path):
    reviews = log(tmp_path / "gone")
    with refused(". Nothing was kept of this decision. ", "Make room, or make the folder writable, and decide again"):
        reviews.decide(0, "keep")
    (tmp_path / "gone").mkdir()
    assert reviews.decide(0, "keep").number == 1


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_queues_that_there_are():
    with refused("by=", " is no order of the queue; there are "):
        Queue("size")
    assert Queue("loss").by == "loss"
    with refused("budget=", "Pass a budget of 1 to "):
        Queue(budget=0)
    assert Queue(budget=1).budget == 1
    with refused("The run holds no ", "Name one of these, or make the run again"):
        planned(Queue("margin"), labels())
    assert len(planned(Queue("loss"), labels()).rows) == 20
    with refused(" is no share. ", "Count the hits among those that were looked at"):
        intervals.share(3, 2)
    assert intervals.share(2, 2)[1] == 1


# ---- files -----------------------------------------------------------------------------------------------------------


def test_kinds_of_exports(known):
    with refused(" is no kind of export; there are ", "Name one of them"):
        exports.exported("xlsx", known, {})
    assert exports.exported("csv", known, {}).name == "reviews.csv"


def test_lines_that_fit(known, tmp_path, monkeypatch):
    file = tmp_path / "said.csv"

    def read(text: str):
        file.write_text(text)
        return imports.read(file, known)[0]

    with refused("There is no file ", "Write one with: upweight export RUN --as csv --out "):
        imports.read(file, known)
    assert read("row,action\n0,keep\n")
    with refused(" cannot be read as reviews (", "Pass what `upweight export` or `upweight repair` wrote"):
        read("a,b\n")
    assert read("row,action\n0,keep\n")
    with refused(" comes twice, at ", "Keep one of them"):
        read("row,action\n0,keep\n0,drop\n")
    assert read("row,action\n0,drop\n")
    with refused(": action '", "Write one of them, or nothing"):
        read("row,action\n0,burn\n")
    assert read("row,action\n0,\n") == []
    with refused(": relabel of row ", "Fill in `new`"):
        read("row,action,new\n0,relabel,\n")
    other = next(name for name in known.classes if name != known.given(0))
    assert read(f"row,action,new\n0,relabel,'{other}\n" if other == "=owl" else f"row,action,new\n0,relabel,{other}\n")
    with refused(" does not exist; there are 0 to ", "Was it made for another run? Import it there"):
        read("row,action\n900,keep\n")
    assert read("row,action\n119,keep\n")
    with refused(" has the label ", "Was it made for other data? Import it into the run of these"):
        read(f"row,action,label\n0,keep,{other}\n")
    assert read(f"row,action,label\n0,keep,{known.given(0)}\n")
    monkeypatch.setattr(imports, "LARGEST", 10)
    with refused(" bytes, and at most ", "Cut it into parts"):
        read("row,action\n0,keep\n1,keep\n")
    monkeypatch.setattr(imports, "LARGEST", 100)
    assert read("row,action\n0,keep\n")


def test_names_of_rows_that_fit(known, tmp_path):
    (tmp_path / "said.csv").write_text("row,action,id\n0,keep,row 9\n")
    with refused(" is called ", "Was it made for other data? Import it into the run of these"):
        imports.read(tmp_path / "said.csv", known)
    (tmp_path / "said.csv").write_text("row,action,id\n0,keep,row 0\n")
    assert imports.read(tmp_path / "said.csv", known)[0]


def test_the_table_that_rows_came_from(known, tmp_path):
    table, out = tmp_path / "data.csv", tmp_path / "new.csv"
    given = [str(known.given(row)) for row in range(N)]

    def written(lines, ids=None):
        table.write_text("kind,id\n" + "".join(f"{name},{row}\n" for row, name in lines))
        return corrected.apply(table, "kind", known, {}, out, ids).rows

    whole = [(f"row {row}", name) for row, name in enumerate(given)]
    with refused("There is no file ", "Name the table that the run's rows came from"):
        corrected.apply(table, "kind", known, {}, out)
    assert written(whole) == N
    assert written(whole[::-1]) == written(whole[::-1], "id") == N
    table.write_text("\n".join(["kind", *given[::-1]]) + "\n")
    with refused(" of the run has the label ", "Was the file changed, or sorted? Name the file of this run"):
        corrected.apply(table, "kind", known, {}, out)
    with refused(
        " of them with a label of the run, and the run has ", "Name the file that its rows came from, or with"
    ):
        written(whole[:-1])
    assert written(whole) == N
    with refused(" has two rows that '", "Name a column that names every row once"):
        written([*whole, whole[0]], "id")
    assert written([*whole, ("new", "dog")], "id") == N + 1
    with refused(" others of the run. ", "Name the column of its rows' names, or the file that they came from"):
        written(whole[:-1], "id")
    assert written(whole, "id") == N


def test_rows_without_names_are_taken_in_order(tmp_path):
    table, known = tmp_path / "data.csv", labels(4)
    table.write_text("kind,id\n3,a\n7,b\n3,c\n7,d\n")
    with refused(" names rows, and the rows of the run have no names. ", "Leave it out, or make the run with names"):
        corrected.apply(table, "kind", known, {}, tmp_path / "new.csv", "id")
    assert corrected.apply(table, "kind", known, {}, tmp_path / "new.csv").rows == 4


def test_a_proof_that_is_none_is_deleted_and_made_again(tmp_path):
    told = {"work": "w", "entry": 1, "at": "2026-01-01T00:00:00Z", "relabelled": 1, "dropped": 0}
    some = proof.Answers(np.zeros(3), np.zeros(3))
    found = proof.proof(np.zeros(3), some, some, some, **told)
    file = proof.write(found, tmp_path)
    file.write_text(json.dumps({"format": 1}))
    with refused(" is no proof of this run (", "Delete it, and make it again: upweight prove STUDY --run RUN"):
        proof.opened(file, "w")
    file.unlink()
    proof.write(found, tmp_path)
    assert [len(part) for part in proof.read(tmp_path, "w")] == [1, 0]


def test_a_log_that_was_moved_away_takes_nothing(tmp_path):
    reviews = log(tmp_path)
    reviews.decide(0, "keep")
    away = reviews.file.with_name("away.sqlite")
    reviews.file.rename(away)
    with refused(" was moved, deleted or replaced while it was open", "decide again: that begins a new log"):
        reviews.decide(1, "keep")
    reviews.decide(1, "keep")
    assert [entry.row for entry in log(tmp_path).entries()] == [1]


def test_an_action_and_a_label_that_disagree(known, tmp_path):
    other = next(name for name in known.classes if name != known.given(0))
    file = tmp_path / "said.csv"
    file.write_text(f"row,action,new\n0,keep,{other}\n")
    with refused(" beside another label, ", "Write relabel for the action, or leave `new` empty"):
        imports.read(file, known)
    for right in (f"0,relabel,{other}", "0,keep,"):
        file.write_text(f"row,action,new\n{right}\n")
        assert len(imports.read(file, known)[0]) == 1
    file.write_text(f"row,label,new\n0,{known.given(0)},\n1,{known.given(1)},{known.given(1)}\n")
    assert [one.row for one in imports.read(file, known)[0]] == [1]  # nothing filled in is nothing said
