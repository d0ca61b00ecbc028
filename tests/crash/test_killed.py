"""Killed at any moment, a run goes on to the bytes of one that was not, and computes at most one chunk again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import upweight as uw
from upweight.errors import StoreMismatch
from upweight.model import chunks
from upweight.runs.store import Store
from upweight.solvers import pacing

HERE = Path(__file__).parent
n = 2 * chunks.CHUNK + 50
MOMENTS = 20


def data():
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return X, torch.randint(0, 3, (n,), generator=draw), X[:3] + 0.1, torch.tensor([0, 1, 2])


def influence(kind):
    """By `kind` of solve, of a network whose answers take several seconds of sums, products or chunks to make."""
    X, y, *_ = data()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    how = {
        "Cholesky": {"curvature": uw.operators.GaussNewton(), "solver": uw.solvers.Cholesky()},
        "CG": {"curvature": uw.operators.GaussNewton(), "solver": uw.solvers.CG(rtol=1e-9)},
        "EKFAC": {"curvature": uw.operators.EKFAC(samples=1)},
    }
    return uw.explain(net, X, y, loss=torch.nn.functional.cross_entropy, damping=0.01, progress=False, **how[kind])


def run(kind, folder):
    """The call that is interrupted and repeated; everything is kept as soon as it can be."""
    chunks.KEPT_EVERY = pacing.SECONDS = 0.0
    pacing._PATIENCE = 0.0
    *_, Xq, yq = data()
    return uw.write_run(influence(kind), folder, Xq, yq)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folders of runs that were not interrupted, made once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            run(kind, made[kind])
        return made[kind]

    return of


@pytest.fixture(autouse=True)
def _as_they_were(monkeypatch):
    for module, name in ((chunks, "KEPT_EVERY"), (pacing, "SECONDS"), (pacing, "_PATIENCE")):
        monkeypatch.setattr(module, name, getattr(module, name))


def same(folder, other, *, bits=True):
    """Whether two runs hold the same: every byte but the number of products, and no chunk was made twice.

    A solve by CG that was killed in its middle goes on from its state, to its residual, not to the bit.
    """
    names = sorted(file.name for file in other.glob("*.safetensors"))
    assert sorted(file.name for file in folder.glob("*.safetensors")) == names
    for name in names:
        if bits and name != "scores.safetensors":
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = uw.Run.open(folder), uw.Run.open(other)
    most = 0 if bits else 1e-8 * np.abs(theirs.scores.values).max()
    np.testing.assert_allclose(ours.scores.values, theirs.scores.values, rtol=0 if bits else 1e-6, atol=most)
    made = [told["number"] for told in ours.events if told["event"] == "chunk"]
    assert len(made) == len(set(made)), "a chunk was computed again"
    return True


class Lost(BaseException):
    """What ends a process, as far as this one can be ended and go on."""


@pytest.mark.parametrize("kind", ["CG", "EKFAC", pytest.param("Cholesky", marks=pytest.mark.slow)])
def test_lost_after_every_event(kind, tmp_path, monkeypatch, whole):
    """After every file that is written; the next call loses the next one, until none is left to write."""
    note, seen = Store.note, []

    def last(store, event, **told):
        note(store, event, **told)
        if event in {"kept", "chunk"} and not told.get("name", "").startswith("state"):
            seen.append(told)
            raise Lost

    other = whole(kind)
    monkeypatch.setattr(Store, "note", last)
    for _ in range(100):
        try:
            run(kind, tmp_path / "run")
        except Lost:
            continue
        break
    assert len(seen) > 8
    assert len({str(told) for told in seen}) == len(seen), "something was made twice"
    assert same(tmp_path / "run", other)


def test_sums_of_another_loss_are_not_taken_up(tmp_path, monkeypatch):
    """Lost in the middle of the factors: what is there was made by another loss of the same name."""
    note = Store.note

    def last(store, event, **told):
        note(store, event, **told)
        if told.get("name", "").startswith("sum"):
            raise Lost

    with monkeypatch.context() as lost:
        lost.setattr(Store, "note", last)
        with pytest.raises(Lost):
            run("EKFAC", tmp_path / "run")
    plain = torch.nn.functional.cross_entropy

    def cross_entropy(outputs, target):
        return 3 * plain(outputs, target)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    with pytest.raises(StoreMismatch, match="losses differ by"):
        run("EKFAC", tmp_path / "run")


def killed(kind, folder, delay=None, after=None):
    """The run in a process of its own, killed after some seconds, or itself behind so many events; whether it was."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_killed; test_killed.child(*sys.argv[3:])"
    command = [sys.executable, "-c", code, str(HERE), str(HERE.parent), kind, str(folder), str(after or 0)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        _, err = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


def child(kind, folder, after):
    """What the process does."""
    note, seen = Store.note, []

    def last(store, event, **told):
        note(store, event, **told)
        seen.append(event)
        if len(seen) == int(after):
            os.kill(os.getpid(), signal.SIGKILL)

    Store.note = last
    run(kind, Path(folder))


@pytest.mark.parametrize(("kind", "after"), [("CG", 7), ("EKFAC", 3)])
def test_killed_by_the_system(kind, after, tmp_path, whole):
    assert killed(kind, tmp_path / "run", after=after)
    assert run(kind, tmp_path / "run").finished
    assert same(tmp_path / "run", whole(kind), bits=kind != "CG")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Cholesky", "CG", "EKFAC"])
def test_killed_at_random_moments(kind, tmp_path, whole):
    start = time.monotonic()
    assert not killed(kind, tmp_path / "timed")
    longest, draw = time.monotonic() - start, random.Random(0)
    other, hits = whole(kind), 0
    for moment in range(3 * MOMENTS):
        folder = tmp_path / f"run {moment}"
        if not killed(kind, folder, delay=draw.uniform(0.3 * longest, longest)):
            longest *= 0.9  # the machine was busier when it was timed
            continue
        hits += 1
        run(kind, folder)
        assert same(folder, other, bits=kind != "CG")
        if hits == MOMENTS:
            break
    assert hits == MOMENTS
    assert np.isfinite(uw.Run.open(other).scores.values).all()
