"""A run that is killed in the middle goes on from its chunks, to the same bytes; other work is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import upweight as uw
from upweight.errors import StoreMismatch, UpweightError
from upweight.influence import kept, shards
from upweight.model.chunks import CHUNK
from upweight.runs.store import Store

n, d = 5 * CHUNK + 100, 3
HERE = Path(__file__).parent


def data():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(n + 3, d))
    return X[:n], X[:n] @ [1.0, -2.0, 0.5] + draw.normal(size=n), X[n:], np.zeros(3)


def squared(params, example):
    return (params @ example[0] - example[1]) ** 2


def quartic(params, example):
    return (params @ example[0] - example[1]) ** 2 + 0.1 * (params @ example[0]) ** 4


def influence(loss=squared, row=None, theta=None, weight=1.0, **settings):
    """By CG, whose solutions need not come out to the same bits."""
    X, y, *_ = data()
    if row is not None:
        X[row] += 1.0
    theta = np.linalg.lstsq(X, y, rcond=None)[0] if theta is None else theta
    weights = np.r_[weight, np.ones(n - 1)]
    examples = uw.Examples(X, y, sample_weight=weights)
    settings = {"solver": uw.solvers.CG(rtol=1e-8), "damping": 0.01} | settings
    return uw.Influence(uw.Objective(loss, torch.tensor(theta), name="squared"), examples, **settings)


def killed_after(chunks, folder):
    """What the subprocess runs: it dies by SIGKILL, in the middle of the next chunk's write."""
    whole, written = Store.passing, []

    def passing(store, chunk, rows, parts):
        for part in whole(store, chunk, rows, parts):
            if len(written) == chunks:
                while not [file for file in store.path.glob(".tmp-chunk-*") if file.stat().st_size > part.nbytes]:
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGKILL)
            yield part
        written.append(chunk)

    Store.passing = passing
    influence().on_loss(*data()[2:], store=folder)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash") / "run"
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_resume; test_resume.killed_after(2, sys.argv[2])"
    command = [sys.executable, "-c", code, str(HERE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


@pytest.fixture
def run(crashed, tmp_path):
    """A copy of the folder that the crash left."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in crashed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
        os.utime(copy / file.name, ns=(1, 1))
    return copy


def chunks(folder):
    return sorted(folder.glob("chunk-*.safetensors"))


def test_the_crash_left_whole_chunks_only(run):
    assert [file.name[:21] for file in run.glob(".tmp-*")] == [".tmp-chunk-000002.saf"]
    assert [file.name for file in chunks(run)] == ["chunk-000000.safetensors", "chunk-000001.safetensors"]
    assert (run / "manifest.json").exists()
    assert (run / "solutions.safetensors").exists()


@pytest.mark.parametrize("batch_size", [None, 100])
def test_resuming_keeps_the_chunks_and_ends_at_the_same_bytes(run, batch_size, tmp_path):
    queries = data()[2:]
    resumed = influence(batch_size=batch_size).on_loss(*queries, store=run)
    assert [file.stat().st_mtime_ns == 1 for file in chunks(run)] == [True, True, False, False, False, False]
    whole = influence().on_loss(*queries, store=tmp_path / "other")
    plain = influence().on_loss(*queries)
    if batch_size is None:
        assert resumed.values.tobytes() == whole.values.tobytes() == plain.values.tobytes()
        assert resumed.query_values.tobytes() == plain.query_values.tobytes()
        for ours, theirs in zip(chunks(run), chunks(tmp_path / "other"), strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
    else:
        np.testing.assert_allclose(resumed.values, plain.values, rtol=1e-6, atol=1e-12)


def test_a_finished_run_is_read_and_not_computed(run, monkeypatch):
    queries = data()[2:]
    first = influence().on_loss(*queries, store=run)
    before = {file.name: file.stat().st_mtime_ns for file in run.glob("*.safetensors")}
    again = influence().on_loss(*queries, store=run)
    assert {file.name: file.stat().st_mtime_ns for file in run.glob("*.safetensors")} == before
    assert again.values.tobytes() == first.values.tobytes()


def test_an_estimators_run_resumes_too(tmp_path):
    X, y, *queries = data()
    model = Ridge(alpha=1.0).fit(X, y)
    first = uw.explain(model, X, y).on_loss(*queries, store=tmp_path / "run")
    chunks(tmp_path / "run")[3].unlink()
    again = uw.explain(model, X, y).on_loss(*queries, store=tmp_path / "run")
    assert again.values.tobytes() == first.values.tobytes()
    assert len(chunks(tmp_path / "run")) == 6


@pytest.mark.parametrize("lost", [(), (1,), (0, 2)])
def test_chunks_that_are_several_of_a_sweep(lost, tmp_path, monkeypatch):
    """Six chunks of rows in three files of two: the bits are those of no store, and whole files are made again."""
    X, y, *queries = data()
    model = Ridge(alpha=1.0).fit(X, y)
    plain = uw.explain(model, X, y).on_loss(*queries)
    monkeypatch.setattr("upweight.influence.kept.span", lambda *_: 2)
    uw.explain(model, X, y).on_loss(*queries, store=tmp_path / "run")
    whole = {file.name: file.read_bytes() for file in chunks(tmp_path / "run")}
    assert list(whole) == [f"chunk-{number:06d}.safetensors" for number in range(3)]
    for number in lost:
        chunks(tmp_path / "run")[number - 3].unlink()
    again = uw.explain(model, X, y).on_loss(*queries, store=tmp_path / "run")
    assert again.values.tobytes() == plain.values.tobytes() == uw.Run.open(tmp_path / "run").scores.values.tobytes()
    assert {file.name: file.read_bytes() for file in chunks(tmp_path / "run")} == whole
    shards.compute(uw.explain(model, X, y).system, queries, tmp_path / "part", (1, 2))
    shards.compute(uw.explain(model, X, y).system, queries, tmp_path / "part", (0, 2))
    assert shards.merge([tmp_path / "part"]).values.tobytes() == plain.values.tobytes()
    assert {file.name: file.read_bytes()[-999:] for file in chunks(tmp_path / "part")} == {
        name: content[-999:] for name, content in whole.items()
    }
    monkeypatch.undo()
    with pytest.raises(StoreMismatch, match="rows_of_a_chunk: 2048 there, 1024 now"):
        uw.explain(model, X, y).on_loss(*queries, store=tmp_path / "run")


def test_chunks_are_large_where_a_linear_predictor_fills_them_fast():
    X, y, *_ = data()
    linear, other = uw.explain(Ridge(alpha=1.0).fit(X, y), X, y).system, influence().system
    assert [kept.span(linear, queries) for queries in (1, 64, 10_000)] == [1, 1, 1]  # six chunks: none is missed
    many = SimpleNamespace(objective=linear.objective, n=5_000_000)
    assert [kept.span(many, queries) for queries in (1, 64, 10_000)] == [1220, 32, 1]
    assert kept.span(SimpleNamespace(objective=other.objective, n=5_000_000), 64) == 1


def other_query():
    _, _, Xq, yq = data()
    Xq[2, 1] += 0.5
    return Xq, yq


OTHER_WORK = {
    "query": lambda folder: influence().on_loss(*other_query(), store=folder),
    "query label": lambda folder: influence().on_loss(data()[2], np.ones(3), store=folder),
    "fewer queries": lambda folder: influence().on_loss(data()[2][:2], np.zeros(2), store=folder),
    "loss of the same name": lambda folder: influence(quartic).on_loss(*data()[2:], store=folder),
    "row": lambda folder: influence(row=3333).on_loss(*data()[2:], store=folder),
    "theta": lambda folder: influence(theta=np.ones(d)).on_loss(*data()[2:], store=folder),
    "weight": lambda folder: influence(weight=2.0).on_loss(*data()[2:], store=folder),
    "damping": lambda folder: influence(damping=0.02).on_loss(*data()[2:], store=folder),
    "solver": lambda folder: influence(solver=uw.solvers.Cholesky()).on_loss(*data()[2:], store=folder),
    "curvature": lambda folder: influence(curvature=uw.operators.EmpiricalFisher()).on_loss(*data()[2:], store=folder),
    "measure": lambda folder: influence().on_measure(lambda p, z: p @ z[0], *data()[2:], store=folder),
}


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("work", OTHER_WORK.values(), ids=OTHER_WORK)
def test_other_work_in_the_same_folder_is_refused(run, work):
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(StoreMismatch, match="holds the results of other work") as refused:
        work(run)
    assert isinstance(refused.value, UpweightError)
    assert {file.name: file.read_bytes() for file in chunks(run)} == {
        file.name: before[file.name] for file in chunks(run)
    }
    assert len(chunks(run)) == 2


def test_two_lambdas_are_two_measures(tmp_path):
    queries = data()[2:]
    influence().on_measure(lambda p, z: p @ z[0], *queries, store=tmp_path / "run")
    with pytest.raises(StoreMismatch):
        influence().on_measure(lambda p, z: 2 * (p @ z[0]), *queries, store=tmp_path / "run")
    with pytest.raises(StoreMismatch):
        influence().on_measure(lambda p, z: (p @ z[0]) ** 3, *queries, store=tmp_path / "run")


def test_a_refused_call_leaves_the_folder_as_it_was(tmp_path):
    queries = data()[2:]
    influence().on_measure(lambda p, z: p @ z[0], *queries, store=tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.safetensors")}
    with pytest.raises(StoreMismatch):
        influence().on_measure(lambda p, z: 2 * (p @ z[0]), *queries, store=tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.safetensors")} == before
