"""A run folder: what it says of rows and queries is what the model says, and it is read without the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

import upweight as uw
from upweight.errors import Damaged, StoreMismatch, TheoryWarning
from upweight.model.chunks import CHUNK
from upweight.runs.store import Store

n = 2 * CHUNK + 30
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(n, 3))
Y = np.array(["no", "yes"])[(X[:, 0] + DRAW.normal(size=n) > 0).astype(int)]
XQ, YQ = DRAW.normal(size=(5, 3)), ["yes", "no", "yes", "no", "no"]
MODEL = LogisticRegression().fit(X, Y)


def card(row):
    return f"row {row}" if row % 2 else {"number": row}


def influence():
    return uw.explain(MODEL, X, Y, ids=[f"id {row}" for row in range(n)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    uw.write_run(influence(), path, XQ, YQ, card=card)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """The folder at another place, as after a move to another machine."""
    return shutil.copytree(folder, tmp_path / "moved and renamed")


def log_loss(X, y):
    chosen = np.searchsorted(MODEL.classes_, y)
    return -MODEL.predict_log_proba(X)[np.arange(len(chosen)), chosen]


def test_rows_and_queries_are_what_the_model_says(folder):
    run = uw.Run.open(folder)
    np.testing.assert_allclose(run.rows.losses, log_loss(X, Y), rtol=1e-12)
    np.testing.assert_allclose(run.queries.losses, log_loss(XQ, YQ), rtol=1e-12)
    assert run.rows.labels.tolist() == Y.tolist()
    assert run.rows.predictions.tolist() == MODEL.predict(X).tolist()
    assert run.queries.labels.tolist() == YQ
    assert run.queries.predictions.tolist() == MODEL.predict(XQ).tolist()
    np.testing.assert_array_equal(run.rows.self_influence, influence().of_self().values)
    assert run.queries.self_influence is None
    assert run.rows.cards[:2] == [{"number": 0}, "row 1"]
    assert run.rows.cards[-1] == f"row {n - 1}"
    assert run.queries.cards[0] == pytest.approx(dict(zip("012", XQ[0], strict=True)))
    assert (len(run.rows), len(run.queries)) == (n, 5)


def test_scores_are_those_of_on_loss(folder, copy):
    plain = influence().on_loss(XQ, YQ)
    for path in (folder, copy):
        run = uw.Run.open(path)
        assert run.finished
        assert run.scores.values.tobytes() == plain.values.tobytes()
        assert run.scores.query_values.tobytes() == plain.query_values.tobytes()
        assert run.scores.derivative.tobytes() == plain.derivative.tobytes()
        assert run.scores.ids.tolist() == plain.ids.tolist()
        assert str(run.scores) == str(plain)
    assert repr(run) == f"Run('{copy}', finished; LogisticRegression)"


def test_a_reader_needs_neither_torch_nor_the_model(folder):
    code = (
        "import sys; import upweight as uw; run = uw.Run.open(sys.argv[1]); "
        "print(run.scores.values.shape, len(run.rows), len(run.events) > 3, *({'torch', 'sklearn'} & {*sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split(") ")[1].split() == [str(n), "True"]


def test_the_same_call_reads_and_another_card_is_made_anew(copy):
    before = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    uw.write_run(influence(), copy, XQ, YQ, card=card)
    assert {file.name: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")} == before
    run = uw.write_run(influence(), copy, XQ, YQ, card=lambda row: None)
    assert run.rows.cards == [None] * n
    assert (copy / "chunk-000001.safetensors").stat().st_mtime_ns == before["chunk-000001.safetensors"]


@pytest.mark.parametrize("moment", ["chunk-000001", "items-000000", "items-000002", "queries", "scores"])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(folder, copy, moment):
    """What was written last, and all behind it, is missing."""
    order = ["chunk-000001", "chunk-000002", "scores", "queries", "items-000000", "items-000001", "items-000002"]
    for name in order[order.index(moment) :]:
        (copy / f"{name}.safetensors").unlink()
    if moment.startswith("chunk") or moment == "scores":
        assert not uw.Run.open(copy).finished
    uw.write_run(influence(), copy, XQ, YQ, card=card)
    for file in folder.glob("*.safetensors"):
        if file.name != "scores.safetensors":  # it tells how many products were made
            assert (copy / file.name).read_bytes() == file.read_bytes(), file.name


def test_pictures_and_numbers(tmp_path):
    draw = torch.Generator().manual_seed(0)
    pictures, targets = torch.rand(6, 1, 5, 4, generator=draw), torch.rand(6, 1, generator=draw)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 1))
    explained = uw.explain(module, pictures, targets, loss=torch.nn.functional.mse_loss, damping=0.1)
    run = uw.write_run(explained, tmp_path / "run", pictures[:2], targets[:2], self_influence=False)
    assert run.rows.self_influence is None
    np.testing.assert_allclose(run.rows.labels, targets[:, 0], rtol=1e-6)
    np.testing.assert_allclose(run.rows.predictions, module(pictures)[:, 0].detach(), rtol=1e-5)
    for picture, card in zip(pictures[:, 0].numpy(), run.rows.cards, strict=True):
        assert card.dtype == np.uint8
        span = picture.max() - picture.min()
        assert np.abs(card / 255 - (picture - picture.min()) / span).max() < 1 / 254
    colour = np.zeros((300, 200, 3), np.uint8)
    colour[150:] = 7
    run = uw.write_run(
        explained, tmp_path / "run", pictures[:2], targets[:2], card=lambda _: colour, self_influence=False
    )
    assert run.rows.cards[0].shape == (75, 50, 3)
    assert run.rows.cards[0][[0, -1], 0, 0].tolist() == [0, 7]


def test_a_regression_has_numbers_for_labels(tmp_path):
    y = X @ [1.0, 2.0, 3.0] + DRAW.normal(size=n)
    model = LinearRegression().fit(X, y)
    run = uw.write_run(uw.explain(model, X, y), tmp_path / "run", XQ, np.zeros(5))
    np.testing.assert_allclose(run.rows.labels, y)
    np.testing.assert_allclose(run.rows.predictions, model.predict(X))


def test_a_query_without_a_value_has_none_in_the_folder_either(tmp_path):
    columns = np.column_stack([X, np.zeros(n)])  # no row says what the last one does
    y = X @ [1.0, 2.0, 3.0] + DRAW.normal(size=n)
    queries = np.column_stack([XQ, [0, 1, 0, 0, 2.0]])
    explained = uw.explain(LinearRegression().fit(columns, y), columns, y)
    with pytest.warns(TheoryWarning):
        values = explained.on_loss(queries, np.zeros(5), store=tmp_path / "run").values
    assert np.isnan(values).any(1).tolist() == [False, True, False, False, True]
    np.testing.assert_array_equal(uw.Run.open(tmp_path / "run").scores.values, values)


def test_hostile_text_is_text(tmp_path):
    texts = ["<script>alert(1)</script>", "\x00\x1b[31m", "../../etc/passwd", "=1+1", "\ud800", "", "}]{["]
    few = uw.explain(LogisticRegression().fit(X[:40], Y[:40]), X[:40], Y[:40])
    run = uw.write_run(few, tmp_path / "run", XQ, YQ, card=lambda row: texts[row % len(texts)])
    assert run.rows.cards == [texts[row % len(texts)] for row in range(40)]
    assert {file.name for file in tmp_path.iterdir()} == {"run"}


def test_events_tell_what_happened_also_behind_a_cut(folder, copy):
    events = uw.Run.open(folder).events
    assert [told["event"] for told in events[:2]] == ["opened", "kept"]
    assert [told["number"] for told in events if told["event"] == "chunk"] == [0, 1, 2]
    assert events[-1]["event"] == "finished"
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert uw.Run.open(copy).events == events
    with (copy / "events.jsonl").open("a") as file:
        file.write("\n[1]\n{}\n")
    assert uw.Run.open(copy).events == [*events, {}]


@pytest.mark.parametrize("name", ["chunk-000001", "items-000001", "queries", "scores"])
@pytest.mark.parametrize("how", ["flipped", "cut", "of another file"])
def test_a_damaged_file_is_an_error_and_never_a_number(copy, name, how):
    file = copy / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[-5] ^= 4
    elif how == "cut":
        content = content[:-1]
    else:
        content = (copy / "chunk-000000.safetensors").read_bytes()
    file.write_bytes(bytes(content))
    run = uw.Run.open(copy)
    with pytest.raises(Damaged, match=name):
        getattr(run, {"items-000001": "rows", "queries": "queries"}.get(name, "scores"))


def test_chunks_that_are_missing_are_told(copy):
    (copy / "chunk-000001.safetensors").unlink()
    with pytest.raises(Damaged, match=rf"chunks of {n - CHUNK:,} rows, and its scores have {n:,}"):
        assert uw.Run.open(copy).scores


def test_other_work_and_other_writers_are_refused(copy):
    with pytest.raises(StoreMismatch):
        uw.write_run(influence(), copy, XQ[:2], YQ[:2])
    work = json.loads((copy / "manifest.json").read_text())["fingerprint"]
    with Store(copy, work), pytest.raises(OSError, match="another process"):
        uw.write_run(influence(), copy, XQ, YQ)
