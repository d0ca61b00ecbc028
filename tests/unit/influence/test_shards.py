"""Parts of scores by processes that do not know of each other: together they are the scores, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.linear_model import LinearRegression

import upweight as uw
from ranks import work
from upweight.errors import StorageFailed, StoreMismatch
from upweight.influence import kept, shards
from upweight.influence.system import System
from upweight.model.chunks import CHUNK
from upweight.model.sweep import Sweep
from upweight.runs.store import SOLUTIONS, Store, fingerprint

ON = work.QUERIES, work.TARGETS
LABELLED = work.QUERIES, work.Y[work.n :]


def named():
    """Weights and names of rows and queries, which a part must bring along."""
    names = [f"row {i}" for i in range(work.n)]
    X, z, weights = work.X[: work.n], work.Z[: work.n], np.linspace(1, 2, work.n)
    theta = np.linalg.solve(X.T @ (weights[:, None] * X), X.T @ (weights * z))
    examples = uw.Examples(X, z, sample_weight=weights, ids=names)
    return uw.Influence(uw.Objective(work.squared, torch.tensor(theta)), examples, damping=0.1)


STUDIES = {
    "by CG": (work.function, ON),
    "named and weighted": (named, ON),
    "a linear model": (work.ridge, ON),
    "a network by EKFAC": (lambda: work.network(curvature=uw.operators.EKFAC()), LABELLED),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("study", STUDIES)
def test_parts_make_the_scores_of_one_run(study, own, tmp_path, monkeypatch):
    make, on = STUDIES[study]
    folders = [tmp_path / (f"part-{i}" if own else "all") for i in range(3)]
    for i in (2, 0, 1):
        if not own and i == 0:  # from here on nothing is solved
            monkeypatch.setattr(System, "solve", None)
            monkeypatch.setattr(System, "solve_in", None)
        shards.compute(make().system, on, folders[i], (i, 3))
    found = shards.merge(folders)
    monkeypatch.undo()
    whole = make().on_loss(*on)
    assert found.values.tobytes() == whole.values.tobytes()
    assert repr(found) == repr(whole)
    for name in ("rows", "scale", "query_values", "ids", "query_ids"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    assert np.array_equal(found.certificate.residual, whole.certificate.residual)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_a_query_without_a_solution_has_no_values_in_any_part(tmp_path):
    X = np.c_[work.X, work.X[:, 0]]
    model = LinearRegression().fit(X[: work.n], work.Z[: work.n])
    X[work.n, 3] += 1  # the first query tells the two columns apart, which no row does
    on = X[work.n :], work.TARGETS
    for i in range(2):
        shards.compute(uw.explain(model, X[: work.n], work.Z[: work.n]).system, on, tmp_path / str(i), (i, 2))
    found = shards.merge([tmp_path / "0", tmp_path / "1"]).values
    expected = uw.explain(model, X[: work.n], work.Z[: work.n]).on_loss(*on).values
    assert np.isnan(found).all(1).tolist() == [True, False, False]
    assert np.array_equal(found, expected, equal_nan=True)


@given(st.integers(1, 50 * CHUNK), st.integers(1, 70))
def test_every_chunk_is_in_one_part(n, m):
    parts = [list(shards.chunks_of((i, m), n)) for i in range(m)]
    assert [k for part in parts for k in part] == list(range(-(-n // CHUNK)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_solutions_may_differ_by_rounding_and_no_more(tmp_path):
    folders = [tmp_path / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        shards.compute(work.ridge().system, ON, folder, (i, 2))
    store = Store(folders[1], fingerprint(folders[1]))
    S = store.solutions
    store.keep(SOLUTIONS, {SOLUTIONS: S * (1 + 1e-9)})
    shards.merge(folders)
    store.keep(SOLUTIONS, {SOLUTIONS: S * (1 + 1e-5)})
    with pytest.raises(StoreMismatch, match=r"1 holds the results of other work: its solutions differ by 1e-05"):
        shards.merge(folders)


AT_WORK = """
import sys, time
from pathlib import Path
from ranks import work
from upweight.influence import shards
from upweight.model.sweep import Sweep

whole, folder, i = Sweep._rows, Path(sys.argv[1]), int(sys.argv[2])

def together(sweep, batches, label):
    if label == "scores":  # both are in the middle of their parts
        (folder.parent / f"at-{i}").touch()
        while not all((folder.parent / f"at-{j}").exists() for j in range(2)):
            time.sleep(0.01)
    return whole(sweep, batches, label)

Sweep._rows = together
shards.compute(work.function().system, (work.QUERIES, work.TARGETS), folder, (i, 2))
"""


def test_two_parts_are_computed_at_the_same_time(tmp_path):
    """Each process waits in its rows for the other to come to its own."""
    where = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(work.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", AT_WORK, str(tmp_path / "run")]
    both = [subprocess.Popen([*command, str(i)], env=where, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        said = [one.communicate(timeout=120)[1] for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], said
    assert shards.merge([tmp_path / "run"]).values.tobytes() == work.function().on_loss(*ON).values.tobytes()
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_part_excludes_itself_and_the_whole_and_nothing_else(tmp_path, monkeypatch):
    whole, tried = Sweep._rows, []

    def refuses(call):
        with pytest.raises(StorageFailed, match="is being written by another process"):
            call()

    def meanwhile(sweep, batches, label):
        if label == "scores" and not tried:
            tried.append(label)
            refuses(lambda: shards.compute(work.ridge().system, ON, tmp_path, (0, 3)))
            refuses(lambda: work.ridge().on_loss(*ON, store=tmp_path))
            shards.compute(work.ridge().system, ON, tmp_path, (1, 3))
        return whole(sweep, batches, label)

    monkeypatch.setattr(Sweep, "_rows", meanwhile)
    shards.compute(work.ridge().system, ON, tmp_path, (0, 3))
    assert tried
    assert {int(file.name[6:12]) for file in tmp_path.glob("chunk-*")} == {0, 1, 2}
    store = Store(tmp_path, fingerprint(tmp_path))
    monkeypatch.setattr("upweight.runs.store._LOOK", 0.1)
    with store:
        refuses(lambda: shards.compute(work.ridge().system, ON, tmp_path, (2, 3)))
    assert work.ridge().on_loss(*ON, store=tmp_path).values.tobytes() == work.ridge().on_loss(*ON).values.tobytes()


def test_two_parts_that_solve_at_once_go_by_the_first_solutions(tmp_path):
    """As when both look before either has written: the second must not write over what the first computes with."""
    system = work.ridge().system
    queries = system.encoded(*ON)
    store = kept.folder(system, queries, "loss", tmp_path)
    first = store.agree("numbers", np.ones(3), 1e-6)
    seen = type(store.path).exists
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store.path), "exists", lambda path: path.stem != "numbers" and seen(path))
        second = store.agree("numbers", np.ones(3) + 1e-9, 1e-6)
    assert np.array_equal(first, second)
