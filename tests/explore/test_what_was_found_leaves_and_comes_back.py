"""Exports are what other programs take, and come back as the same decisions."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as tree
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made import CLASSES, N, labels as labels_of_no_run, labels_of, made, study, truth

import upweight as uw
from upweight.errors import InvalidInput
from upweight.explore import cells, exports, imports
from upweight.explore.reviews import Reviews


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def labels(run):
    return labels_of(run)


@pytest.fixture
def log(labels, tmp_path):
    """Row 0 relabelled, 1 dropped, 2 kept, 3 skipped, 4 decided and taken back."""
    reviews = Reviews(tmp_path, labels)
    wrong = next(name for name in ("=owl", "dog") if name != labels.given(0))
    reviews.decide(0, "relabel", new=wrong, who="=ann()", why='+1 line\nand another, with "quotes"')
    reviews.decide(1, "drop", who="bob")
    reviews.decide(2, "keep")
    reviews.decide(3, "skip")
    reviews.decide(4, "drop")
    reviews.decide(4, "undo", seen=5)
    return reviews


def test_labels_are_those_of_the_run(run, labels):
    assert labels.classes == tuple(sorted(CLASSES))
    assert [labels.given(row) for row in range(N)] == run.rows.labels.tolist()
    assert [labels.predicted(row) for row in range(N)] == run.rows.predictions.tolist()
    np.testing.assert_array_equal(labels.scores["self-influence"], run.rows.self_influence)
    np.testing.assert_array_equal(labels.scores["margin"], -run.rows.margins)
    assert (labels.n, labels.name(7)) == (N, "row 7")
    assert labels.called(" dog ") == "dog"
    with pytest.raises(InvalidInput, match="names no classes"):
        labels.called("wolf")


def test_a_regression_has_no_labels_to_review(tmp_path):
    from sklearn.linear_model import Ridge

    X = np.arange(12.0).reshape(6, 2)
    influence = uw.explain(Ridge().fit(X, X[:, 0] / 7), X, X[:, 0] / 7)
    with pytest.raises(InvalidInput, match="measurements and no classes"):
        labels_of(uw.write_run(influence, tmp_path / "run", X[:2], X[:2, 0]))
    influence.on_loss(X[:2], X[:2, 0], store=tmp_path / "scores")
    with pytest.raises(InvalidInput, match="its scores only"):
        labels_of(uw.Run.open(tmp_path / "scores"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_come_back_as_the_same_decisions(labels, log, tmp_path, kind):
    out = exports.exported(kind, labels, log.verdicts())
    file = tmp_path / out.name
    file.write_bytes(out.content)
    fresh = Reviews(tmp_path / "fresh", labels)
    (tmp_path / "fresh").mkdir()
    proposals, undecided = imports.read(file, labels)
    assert imports.add(fresh, proposals, undecided, "me") == imports.Added(4, 0, (), ())
    there, here = fresh.verdicts(), log.verdicts()
    assert {row: (one.action, one.label) for row, one in there.items()} == {
        row: (one.action, one.label) for row, one in here.items() if one.action
    }
    assert there[0].entry.who == here[0].entry.who == "=ann()"
    assert there[0].entry.why == here[0].entry.why
    assert there[2].entry.who == "me"
    assert imports.add(fresh, proposals, undecided, "me") == imports.Added(0, 4, (), ())
    fresh.decide(1, "keep", seen=fresh.verdict(1).seen)
    added = imports.add(fresh, proposals, undecided, "me")
    assert added.conflicts == (1,)
    assert "decided otherwise here and stay so: 1" in str(added)


def test_a_spreadsheet_runs_nothing(labels, log):
    out = exports.exported("csv", labels, log.verdicts())
    lines = list(csv.DictReader(io.StringIO(out.content.decode(), newline="")))
    assert (lines[0]["who"], lines[0]["why"][:2]) == ("'=ann()", "'+")
    for line in lines:
        for name, cell in line.items():
            assert not cell.startswith(("=", "@", "\t", "\r")), name
            assert not cell.startswith(("+", "-")) or float(cell) < 0, name
    guarded = sum(cell.startswith("'") for line in lines for cell in line.values())
    assert out.notes[0].startswith(f"{guarded} cells began like a formula")
    assert exports.exported("csv", labels, {}).notes == ()


@pytest.mark.parametrize("text", ["=1", "'=1", "''=1", "-3", "'tis", "", "'", "＝x", "plain", "\t=x", "@a", "+"])
def test_an_apostrophe_comes_off_again(text):
    assert cells.bare(cells.harmless(text)) == text
    assert not cells.harmless(text).startswith(("=", "+", "-", "@", "\t", "＝"))


def test_a_patch_is_what_changed_and_repair_reads_it(labels, log, tmp_path):
    out = exports.exported("patch", labels, log.verdicts())
    lines = list(csv.DictReader(io.StringIO(out.content.decode())))
    assert [(line["row"], line["id"], line["action"]) for line in lines] == [
        ("0", "row 0", "relabel"),
        ("1", "row 1", "drop"),
    ]
    file = tmp_path / "patch.csv"
    file.write_bytes(out.content)
    again = Reviews(tmp_path / "again", labels)
    again.file.parent.mkdir()
    assert imports.add(again, *imports.read(file, labels), "me").added == 2
    assert again.verdict(1).action == "drop"
    file.write_text("\n".join(out.content.decode().splitlines()[:2]))
    assert uw.apps.read_patch(study().influence, file) == {0: log.verdict(0).label}


def test_a_review_of_repair_comes_in(labels, tmp_path):
    found = uw.apps.repair(study().influence, inspect=5, by="loss")
    file = uw.apps.write_review(found, tmp_path / "review.csv", describe=lambda row: "=cmd()")
    assert "=cmd" not in file.read_text().replace("'=cmd", "")
    lines = list(csv.DictReader(io.StringIO(file.read_text())))
    lines[0]["correction"], lines[1]["correction"] = truth()[int(lines[0]["row"])], lines[1]["label"]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    proposals, _ = imports.read(file, labels)
    assert [(one.row, one.action) for one in proposals] == [
        (int(lines[0]["row"]), "relabel"),
        (int(lines[1]["row"]), "keep"),
    ]
    assert uw.apps.read_review(study().influence, file)[proposals[0].row] == proposals[0].new


# ---- cleanlab --------------------------------------------------------------------------------------------------------


def frame_of(labels, log):
    out = exports.exported("cleanlab", labels, log.verdicts())
    return pd.read_csv(io.BytesIO(out.content))


def test_cleanlabs_columns(run, labels, log):
    frame = frame_of(labels, log)
    assert list(frame) == ["is_label_issue", "label_quality", "given_label", "predicted_label"]
    assert np.flatnonzero(frame["is_label_issue"]).tolist() == [0, 1]
    order = sorted(CLASSES)
    assert [order[code] for code in frame["given_label"]] == run.rows.labels.tolist()
    assert [order[code] for code in frame["predicted_label"]] == run.rows.predictions.tolist()
    np.testing.assert_allclose(frame["label_quality"], np.exp(-run.rows.losses), rtol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_cleanlab_itself_takes_them(labels, log):
    """CleanLearning trains on all rows but those that were found wrong, as scikit-learn does without them."""
    classification = pytest.importorskip("cleanlab.classification")
    from sklearn.linear_model import LogisticRegression

    frame = frame_of(labels, log)
    X = np.asarray(uw.training_inputs(study().influence))
    y = labels.codes.astype(int)
    cleaned = classification.CleanLearning(LogisticRegression(tol=1e-8)).fit(X, y, label_issues=frame)
    kept = np.setdiff1d(np.arange(N), [0, 1])
    own = LogisticRegression(tol=1e-8).fit(X[kept], y[kept])
    np.testing.assert_allclose(cleaned.clf.coef_, own.coef_, atol=1e-5)
    with pytest.raises(ValueError, match="given_label"):
        classification.CleanLearning(LogisticRegression()).fit(X, (y + 1) % 3, label_issues=frame)


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def tasks_of(run, labels, log, rows):
    out = exports.exported(
        "label-studio",
        labels,
        log.verdicts(),
        queue=rows,
        cards=lambda some: {row: run.rows.cards[row] for row in some},
    )
    return json.loads(out.content)


def test_label_studio_gets_what_is_not_decided(run, labels, log):
    tasks = tasks_of(run, labels, log, [0, 1, 2, 3, 4, 5])
    assert [task["data"]["row"] for task in tasks] == [3, 4, 5]
    first = tasks[0]
    assert first["data"]["text"] == "text <b>3</b>"
    assert first["data"]["given"] == labels.given(3)
    assert first["predictions"][0]["result"][0]["value"] == {"choices": [labels.predicted(3)]}
    assert 0 <= first["predictions"][0]["score"] <= 1
    setup = tree.fromstring(
        exports.exported("label-studio-setup", labels, {}, queue=[3], cards=lambda rows: {3: "x"}).content
    )
    named = {one.get("name"): one for one in setup.iter() if one.get("name")}
    assert named["item"].get("value") == "$text"
    assert [one.get("value") for one in named["label"]] == list(labels.classes)
    choice = first["predictions"][0]["result"][0]
    assert named[choice["from_name"]].get("toName") == choice["to_name"] == "item"


def annotated(task, **choices):
    results = [
        {"type": "choices", "from_name": name, "to_name": "item", "value": {"choices": [choice]}}
        for name, choice in choices.items()
    ]
    return {**task, "annotations": [*task.get("annotations", []), {"result": results, "was_cancelled": False}]}


def test_what_label_studio_exports_comes_back(run, labels, log, tmp_path):
    tasks = [{"id": number, **task} for number, task in enumerate(tasks_of(run, labels, log, range(3, 12)), 900)]
    other = [next(name for name in labels.classes if name != task["data"]["given"]) for task in tasks]
    said = [
        annotated(tasks[0], label=other[0]),
        annotated(tasks[1], label=tasks[1]["data"]["given"]),
        annotated(tasks[2], verdict="drop"),
        annotated(tasks[3], verdict="skip"),
        tasks[4],
        annotated(annotated(tasks[5], label=other[5]), label=tasks[5]["data"]["given"]),
        annotated(annotated(tasks[6], label=other[6]), label=other[6]),
        {**tasks[7], "annotations": [{"result": [], "was_cancelled": True}]},
    ]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(said))
    proposals, undecided = imports.read(file, labels)
    rows = [task["data"]["row"] for task in said]
    assert [(one.row, one.action, one.new) for one in proposals] == [
        (rows[0], "relabel", other[0]),
        (rows[1], "keep", None),
        (rows[2], "drop", None),
        (rows[3], "skip", None),
        (rows[6], "relabel", other[6]),
    ]
    assert undecided == (rows[4], rows[5], rows[7])
    least = [{**task["data"], "id": task["id"]} for task in tasks[:3]]
    least[0]["label"], least[1]["verdict"] = other[0], "drop"
    file.write_text(json.dumps(least))
    proposals, undecided = imports.read(file, labels)
    assert [(one.row, one.action, one.new) for one in proposals] == [(3, "relabel", other[0]), (4, "drop", None)]
    assert undecided == (5,)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "row,action\n900,keep\n", "line 2: row '900' does not exist"),
        ("a.csv", "row,action\n-1,keep\n", "line 2: row '-1' does not exist"),
        ("a.csv", "row,action\n0,burn\n", "action 'burn' is none of"),
        ("a.csv", "row,action,new\n0,relabel,\n", "without another label"),
        ("a.csv", "row,action,new\n0,relabel,wolf\n", "names no classes"),
        ("a.csv", "row,action\n0,keep\n0,keep\n", "Row 0 comes twice, at "),
        ("a.csv", "row,action,run\n0,keep,feedfeedfeedfeed\n", "belongs to run feedfeedfeedfeed"),
        ("a.csv", "row,action,id\n0,keep,row 9\n", "is called 'row 0' in this run"),
        ("a.csv", "row,label,action\n0,wolf,keep\n", "names no classes"),
        ("a.csv", "row,old,new\n0,nothing,dog\n", "names no classes"),
        ("a.csv", "a,b\n1,2\n", "it has the columns a, b"),
        ("a.csv", 'row,action,why\n0,keep,"a\nb"\n\n900,keep,"c\nd"\n', "line 5: row '900' does not exist"),
        ("a.csv", 'row,action,why\n0,keep,"a\nb"\n1,"x\ny"\n', "line 4 has 2 cells and the first 3"),
        ("a.csv", "row,action\n0\n", "line 2 has 1 cells and the first 2"),
        ("a.csv", "", "it has the columns"),
        ("a.jsonl", "{", "cannot be read as reviews"),
        ("a.jsonl", "[1]", "cannot be read as reviews"),
        ("a.jsonl", "[" * 100_000, "cannot be read as reviews"),
        ("a.json", "{}x", "cannot be read as reviews"),
        ("a.json", "[1]", "cannot be read as reviews"),
        ("a.json", '[{"data": {}}]', "cannot be read as reviews"),
        ("a.json", '{"data": 1}', "cannot be read as reviews"),
        ("a.parquet", "PAR1", "cannot be read as reviews"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(labels, tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput) as refused:
        imports.read(tmp_path / name, labels)
    assert says in str(refused.value)
    assert name in str(refused.value)


def test_an_unknown_kind_is_refused(labels):
    with pytest.raises(InvalidInput, match="'xlsx' is no kind of export; there are csv, jsonl"):
        exports.exported("xlsx", labels, {})


def test_a_row_without_a_loss_has_no_score():
    known = labels_of_no_run(4)
    losses = np.array([0.5, np.nan, 0.2, 0.1])
    for scores in ({"loss": losses}, {}):
        without = replace(known, scores=scores)
        (tasks,) = [json.loads(exports._tasks(without, [0, 1], {}).content)]
        told = [task["predictions"][0].get("score") for task in tasks]
        assert told == ([pytest.approx(1 - np.exp(-0.5)), None] if scores else [None, None])
        assert exports._cleanlab(without, {})["label_quality"][1] is None
