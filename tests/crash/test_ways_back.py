"""Killed behind any step, the way back through a training goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.errors import StoreMismatch
from upweight.runs.store import Store
from upweight.training import going

HERE = Path(__file__).parent
N, STEPS = 20, 7
DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 3, generator=DRAW, dtype=torch.float64), torch.arange(N) % 2


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def recorded(rate=0.05, penalty=None, store=None):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with uw.Recording(model, optimizer, X, Y, loss=cross_entropy, penalty=penalty, clip=0.5, store=store) as recording:
        for step in range(STEPS):
            rows = torch.arange(3 * step, 3 * step + 6) % N
            optimizer.zero_grad()
            cross_entropy(model(X[rows]), Y[rows]).backward()
            recording.batch(rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return recording


def through(rate=0.05, since=1, penalty=None):
    return uw.through(recorded(rate, penalty), since=since, progress=False)


def run(folder, **settings):
    going.KEPT_EVERY = 0.0
    return through(**settings).on_loss(X[:3], Y[:3], check=False, store=folder).values


def script(folder):
    """What a script does that keeps its training, too: it trains if that was not done, and goes on."""
    going.KEPT_EVERY = 0.0
    training = folder / "training"
    if (training / "steps.safetensors").exists():
        recording = uw.Recording.open(training, net(), X, Y, loss=cross_entropy)
    else:
        recording = recorded(store=training)
    through = uw.through(recording, since=1, progress=False)
    return through.on_loss(X[:3], Y[:3], check=False, store=folder / "scores").values


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(going, "KEPT_EVERY", going.KEPT_EVERY)


def child(folder, after, what="run"):
    """What the process does: it kills itself behind so many events."""
    note, seen = Store.note, []

    def last(store, event, **told):
        note(store, event, **told)
        seen.append(event)
        if len(seen) == int(after):
            os.kill(os.getpid(), signal.SIGKILL)

    Store.note = last
    {"run": run, "script": script}[what](Path(folder))


@pytest.mark.parametrize("after", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_by_the_system(after, tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_ways_back; test_ways_back.child(*sys.argv[3:])"
    folder = tmp_path / "run"
    command = [sys.executable, "-c", code, str(HERE), str(HERE.parent), str(folder), str(after)]
    process = subprocess.run(command, check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (folder / "state.safetensors").exists()
    np.testing.assert_array_equal(run(folder), run(tmp_path / "whole"))


IN_TRAINING, AFTER_IT, ON_THE_WAY = 4, STEPS + 4, STEPS + 9


@pytest.mark.parametrize("after", [IN_TRAINING, pytest.param(AFTER_IT, marks=pytest.mark.slow), ON_THE_WAY])
def test_a_training_in_a_folder_outlives_its_process(after, tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_ways_back; test_ways_back.child(*sys.argv[3:])"
    folder = tmp_path / "run"
    command = [sys.executable, "-c", code, str(HERE), str(HERE.parent), str(folder), str(after), "script"]
    process = subprocess.run(command, check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (folder / "training" / "steps.safetensors").exists() == (after != IN_TRAINING)
    assert (folder / "scores" / "state.safetensors").exists() == (after == ON_THE_WAY)
    values = script(folder)
    np.testing.assert_array_equal(values, script(tmp_path / "whole"))
    np.testing.assert_array_equal(values, through().on_loss(X[:3], Y[:3], check=False).values)


class Lost(BaseException):
    """What ends a process, as far as this one can be ended and go on."""


def test_lost_behind_every_step(tmp_path, monkeypatch):
    expected = through().on_loss(X[:3], Y[:3], check=False).values
    note, seen = Store.note, []

    def last(store, event, **told):
        note(store, event, **told)
        if event == "kept" and "step" in told:
            seen.append(told["step"])
            raise Lost

    monkeypatch.setattr(Store, "note", last)
    for _ in range(20):
        try:
            values = run(tmp_path / "run")
        except Lost:
            continue
        break
    assert seen == [*range(STEPS - 1, 0, -1), 1], "every step once, and the scores"
    np.testing.assert_array_equal(values, expected)
    files = sorted(file.name for file in (tmp_path / "run").glob("*.safetensors"))
    assert files == [f"{name}.safetensors" for name in ("gradients", "losses", "penalty_gradient", "values")]


def test_a_folder_of_another_training_is_not_taken_up(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(StoreMismatch, match="through: "):
        run(tmp_path / "run", rate=0.04)
    with pytest.raises(StoreMismatch, match="steps: "):
        run(tmp_path / "run", since=2)
    with pytest.raises(StoreMismatch, match="penalty gradient"):  # so weak that steps made again end where they did
        run(tmp_path / "run", penalty=lambda params: 1e-6 * sum((block**2).sum() for block in params.values()))
