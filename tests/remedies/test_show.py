"""What is said to type by upweight/show, typed."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict

import upweight as uw
from refusals import refused
from small import XQ, ZQ, ridge
from upweight.runs.files import read_tensors, write_tensors
from upweight.show.parts import packed_in


def test_the_picture_of_leverages_is_of_a_summary():
    influence = ridge()
    with refused("frame has no column ", "Pass what influence.summary_frame() returns"):
        uw.plots.leverage_residual(influence.on_loss(XQ, ZQ).top(3))
    frame = influence.summary_frame()
    axes = uw.plots.leverage_residual(frame)
    dots = np.asarray(axes.collections[0].get_offsets())
    assert np.allclose(dots, frame[["leverage", "studentized_residual"]])


def whole(folder):
    """Whether a run in this folder, made now or gone on with, is whole."""
    uw.write_run(ridge(), folder, XQ, ZQ)
    run = uw.Run.open(folder)
    assert run.rows is not None
    assert run.queries is not None
    return np.array_equal(run.scores.values, ridge().on_loss(XQ, ZQ).values)


def emptied(file):
    """The file of a store has nothing in it but its names."""
    write_tensors(file, {}, read_tensors(file)[1])


def test_a_run_is_made_before_it_is_opened(tmp_path):
    with refused(" holds no run. Make one: ", "uw.write_run(influence, "):
        uw.Run.open(tmp_path / "run")
    assert whole(tmp_path / "run")
    ridge().on_loss(XQ, ZQ, store=tmp_path / "scores alone")
    assert uw.Run.open(tmp_path / "scores alone").scores.values.shape == (len(XQ), ridge().n)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b'{"fingerprint": 1}', b"[" * 10_000], ids=range(6))
def test_a_run_with_a_damaged_manifest_is_made_again(tmp_path, content):
    assert whole(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_bytes(content)
    with refused(" is damaged (", "Delete the folder, and make the run again"):
        uw.Run.open(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert whole(tmp_path / "run")


def test_a_run_is_finished_before_its_scores_are_read(tmp_path):
    assert whole(tmp_path / "run")
    (tmp_path / "run" / "scores.safetensors").unlink()
    with refused(" is not finished: ", "of them, influence.on_loss(Xq, yq, store="):
        assert uw.Run.open(tmp_path / "run").scores
    assert whole(tmp_path / "run")


def test_a_run_that_lacks_a_chunk_is_filled(tmp_path):
    assert whole(tmp_path / "run")
    file = tmp_path / "run" / "chunk-000000.safetensors"
    arrays, card = read_tensors(file)
    write_tensors(file, {"values": arrays["values"][:5]}, card)
    with refused(" holds chunks of ", "Make the call again that made it: it fills the gap"):
        assert uw.Run.open(tmp_path / "run").scores
    file.unlink()
    assert whole(tmp_path / "run")


def test_a_chunk_that_is_none_is_filled(tmp_path):
    assert whole(tmp_path / "run")
    file = tmp_path / "run" / "chunk-000000.safetensors"
    arrays, card = read_tensors(file)
    for other in ({}, {"values": arrays["values"][:, 0]}, {"values": arrays["values"].astype(np.float32)}):
        write_tensors(file, other, card)
        with refused(" of this run (", "make the call again that made it: it fills the gap"):
            assert uw.Run.open(tmp_path / "run").scores
        file.unlink()
        assert whole(tmp_path / "run")


def test_scores_that_are_none_are_deleted(tmp_path):
    assert whole(tmp_path / "run")
    emptied(tmp_path / "run" / "scores.safetensors")
    with refused(" holds no scores (", "Delete it, and make the same call again"):
        assert uw.Run.open(tmp_path / "run").scores
    (tmp_path / "run" / "scores.safetensors").unlink()
    assert whole(tmp_path / "run")


@pytest.mark.parametrize(("name", "read"), [("items-000000", "rows"), ("queries", "queries")])
def test_items_that_are_none_are_deleted(tmp_path, name, read):
    assert whole(tmp_path / "run")
    file = tmp_path / "run" / f"{name}.safetensors"
    emptied(file)
    with refused(" holds no items (", "Delete it, and make the same call again"):
        getattr(uw.Run.open(tmp_path / "run"), read)
    file.unlink()
    assert whole(tmp_path / "run")


@pytest.mark.parametrize("wrong", [7, np.zeros((2, 2)), [1], np.zeros((2, 2, 4), np.uint8)], ids=range(4))
def test_a_card_is_a_text_columns_or_a_picture(tmp_path, wrong):
    with refused(
        ") is a ", "Return a text, a dict of columns, a picture as uint8 (H, W) or (H, W, 3), a list of texts, or None"
    ):
        uw.write_run(ridge(), tmp_path / "run", XQ, ZQ, card=lambda _: wrong)
    for right in ("7", {"a": 7}, np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), ["7", " 8"], None):
        run = uw.write_run(ridge(), tmp_path / "run", XQ, ZQ, card=lambda _, card=right: card)
        assert np.array_equal(run.rows.cards[0], right)


def test_a_page_gets_the_room_that_it_needs(tmp_path):
    run = uw.write_run(ridge(), tmp_path / "run", XQ, ZQ)
    with refused("and a page of this run without any query takes ", "Pass limit=") as told:
        uw.write_report(run, tmp_path / "page.html", limit=1000)
    limit = int(re.search(r"limit=(\d+), or more", str(told.value)).group(1))
    assert uw.write_report(run, tmp_path / "page.html", limit=limit).stat().st_size <= limit


def test_rows_are_looked_at_as_something_that_can_be_seen():
    scores = ridge().on_loss(XQ, ZQ)
    texts = [f"text {row}" for row in range(ridge().n)]
    with refused(" is a ", "Pass a DataFrame, a list of texts, an array of pictures or of columns, or a function"):
        uw.look(scores, 7)
    for right in (texts, lambda i: texts[i]):
        assert f"text {scores.helpful(1).rows[0, 0]}<" in uw.look(scores, right)._repr_html_()
    assert "uw-cell" in uw.look(scores, np.zeros((ridge().n, 4)))._repr_html_()


def test_items_that_are_missing_are_made_again(tmp_path):
    assert whole(tmp_path / "run")
    (tmp_path / "run" / "items-000000.safetensors").rename(tmp_path / "run" / "items-000001.safetensors")
    with refused(" has no items-", "Make the call again that made it"):
        assert uw.Run.open(tmp_path / "run").rows
    (tmp_path / "run" / "items-000001.safetensors").unlink()
    assert whole(tmp_path / "run")


def test_evidence_is_of_the_runs_queries(tmp_path):
    influence = ridge()
    run = uw.write_run(influence, tmp_path / "run", XQ, ZQ)
    with refused(" is no evidence of a run's scores", "Pass what uw.leave_one_out"):
        uw.keep_evidence(run, run.scores)
    with refused("The run's queries have a ", "Pass the queries that write_run was given"):
        uw.keep_evidence(run, uw.leave_one_out(influence, (XQ, ZQ + 1), [0, 1]))
    sums = {"measure": lambda params, _: sum(one.sum() for one in params.values())}
    margins = uw.leave_one_out(influence, (XQ, ZQ), [0, 1], **sums)
    with refused("The run holds the ", "Pass what was asked of the same influence"):
        uw.keep_evidence(run, margins)
    uw.keep_evidence(run, uw.leave_one_out(influence, (XQ, ZQ), [0, 1]))
    assert uw.evidence(run).removals.rows.tolist() == [0, 1]


def test_evidence_that_is_none_is_kept_again(tmp_path):
    run = uw.write_run(ridge(), tmp_path / "run", XQ, ZQ)
    outcomes = uw.leave_one_out(ridge(), (XQ, ZQ), [0, 1])
    uw.keep_evidence(run, outcomes)
    emptied(tmp_path / "run" / "evidence-removals.safetensors")
    with refused(" holds no evidence (", "Delete it, and keep it again: uw.keep_evidence"):
        uw.evidence(run)
    assert np.array_equal(uw.evidence(uw.keep_evidence(run, outcomes)).removals.actual, outcomes.actual)


def _classifier():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(40, 5))
    y = np.where(X[:, 0] + draw.normal(size=40) > 0, "yes", "no")
    return uw.explain(LogisticRegression().fit(X, y), X, y), X, y


def test_what_is_said_out_of_fold_is_a_label_probabilities_or_folds(tmp_path):
    influence, X, y = _classifier()
    run = (influence, tmp_path / "run", X[:2], y[:2])
    with refused("out_of_fold has shape ", "Pass a label of these for each row, the probabilities that "):
        uw.write_run(*run, out_of_fold=np.ones((40, 7)))
    chances = cross_val_predict(LogisticRegression(), X, y, method="predict_proba")
    for right in (y, chances, 5):
        assert uw.write_run(*run, out_of_fold=right).rows.out_of_fold.shape == (40,)
    with refused(" folds of ", "Pass a number of folds from 2 to "):
        uw.write_run(*run, out_of_fold=1)
    assert len(uw.write_run(*run, out_of_fold=2).rows.out_of_fold) == 40
    with refused(" are no classes, so nothing is said out of fold", "Leave out_of_fold out"):
        uw.write_run(ridge(), tmp_path / "ridge", XQ, ZQ, out_of_fold=5)
    assert whole(tmp_path / "ridge")


def test_a_class_of_one_row_is_merged_or_said_by_the_user(tmp_path):
    draw = np.random.default_rng(0)
    X = draw.normal(size=(40, 3))
    y = np.where(X[:, 0] > 0, "cat", "dog").astype("<U5")
    y[3] = "hound"
    model = LogisticRegression().fit(X, y)
    influence = uw.explain(model, X, y)
    with refused(" has one row, number ", "correct it, or merge the class with another, and fit again; or pass "):
        uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=5)
    said = cross_val_predict(model, X, y, cv=KFold(5, shuffle=True))
    assert (uw.write_run(influence, tmp_path / "run", X[:2], y[:2], out_of_fold=said).rows.out_of_fold == said).all()
    y[3] = "dog"
    merged = uw.explain(LogisticRegression().fit(X, y), X, y)
    assert len(uw.write_run(merged, tmp_path / "merged", X[:2], y[:2], out_of_fold=5).rows.out_of_fold) == 40


def test_parts_are_left_out_where_there_are_none(tmp_path):
    draw = np.random.default_rng(0)
    X = draw.normal(size=(40, 5))
    y = X[:, 0] + 0.01 * draw.normal(size=40)
    lasso = uw.explain(Lasso(alpha=0.3).fit(X, y), X, y)
    with refused(", and the rows at hand have ", "Leave parts out"):
        uw.write_run(lasso, tmp_path / "lasso", X[:2], y[:2], parts=1)
    assert uw.write_run(lasso, tmp_path / "lasso", X[:2], y[:2]).finished
    rows = [{"a": X[row, :2], "b": X[row, 2:], "labels": int(y[row] > 0)} for row in range(40)]
    named = uw.explain(Named().double(), rows, loss=torch.nn.functional.cross_entropy, damping=0.1)
    with refused("Rows are made of ", "Leave parts out"):
        uw.write_run(named, tmp_path / "named", rows[:2], parts=1)
    assert uw.write_run(named, tmp_path / "named", rows[:2]).finished


class Named(torch.nn.Module):
    """Of two named parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(5, 2)

    def forward(self, a, b):
        return self.layer(torch.cat([a, b], 1))


def test_parts_that_are_none_are_deleted(tmp_path):
    influence, X, y = _classifier()
    run = uw.write_run(influence, tmp_path / "run", X[:2], y[:2], parts=1)
    emptied(tmp_path / "run" / "parts.safetensors")
    with refused(" holds no parts of rows (", "Delete it, and make the same call again"):
        packed_in(run)
    (tmp_path / "run" / "parts.safetensors").unlink()
    assert len(packed_in(uw.write_run(influence, tmp_path / "run", X[:2], y[:2], parts=1))) == 4
