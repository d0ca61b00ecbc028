"""Trainings are killed by kill -9 in the middle; the same call again trains only what is missing, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import upweight as uw

HERE = Path(__file__).parent
LOG = "UPWEIGHT_TEST_LOG"
n, d = 60, 4
DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(n, d)).round(2)
Y = (X @ [1.0, -1.0, 0.5, 0.0] + DRAW.normal(size=n) > 0).astype(int)
XQ, YQ = X[:3] + 0.3, Y[:3]


def noted(seconds=0.03):
    """A training has begun, and takes a while."""
    if LOG in os.environ:
        with open(os.environ[LOG], "a") as file:
            file.write("training\n")
        time.sleep(seconds)


def script(weights, seed=0):
    """A training by chance that says when it begins."""
    noted()
    return sgd(weights)


def sgd(weights):
    """A few steps on rows drawn by chance."""
    model = torch.nn.Linear(d, 2, dtype=torch.float64)
    optimizer, w = torch.optim.SGD(model.parameters(), lr=0.1), torch.from_numpy(weights)
    for _ in range(5):
        rows = torch.randint(n, (16,))
        losses = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(X[rows])), torch.from_numpy(Y[rows]), reduction="none"
        )
        optimizer.zero_grad()
        (losses * w[rows]).mean().backward()
        optimizer.step()
    return model


@dataclass(frozen=True)
class Slow:
    """Newton's method that says when it begins."""

    def bind(self, influence):
        train = uw.Newton().bind(influence)

        def slowly(weights, seed=0):
            noted()
            return train(weights, seed)

        return slowly


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = sgd(np.ones(n))
    return uw.explain(
        model, torch.from_numpy(X), torch.from_numpy(Y), loss=torch.nn.functional.cross_entropy, penalty=0.01
    )


def machine():
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=1000).fit(X, Y), X, Y)


def left_out(store=None):
    queries = torch.from_numpy(XQ), torch.from_numpy(YQ)
    found = uw.leave_one_out(network(), queries, range(8), script, seeds=2, store=store, progress=False)
    return [found.actual, found.control, found.by_seed]


def subsets(store=None):
    queries = torch.from_numpy(XQ), torch.from_numpy(YQ)
    masks = uw.random_subsets(n, 9, seed=1)
    found = uw.subset_retraining(network(), queries, masks, script, seeds=2, store=store, progress=False)
    return [found.values]


def attacked(store=None):
    settings = {"level": 1.0, "step": 0.1, "iterations": 12, "patience": 12, "half": 2.0, "progress": False}
    found = uw.apps.attack(machine(), (XQ, YQ), count=3, retrain=Slow(), store=store, **settings)
    theta = found.model.objective.theta.numpy()
    return [found.after, found.losses, found.predicted, theta, found.random_loss, found.feature_change]


def flipped(store=None):
    found = uw.apps.flip_labels(machine(), (XQ, YQ), 8, retrain=Slow(), store=store, progress=False)
    return [found.rows, found.new, found.losses, found.predicted, found.model.objective.theta.numpy()]


WORK = {work.__name__: work for work in (left_out, subsets, attacked, flipped)}


def in_bytes(found):
    return [np.asarray(part).tobytes() for part in found]


def started(name, folder, log):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_trainings_killed as t; "
    code += "t.WORK[sys.argv[2]](sys.argv[3])"
    command = [sys.executable, "-c", code, str(HERE), name, str(folder)]
    return subprocess.Popen(command, env=os.environ | {LOG: str(log)}, stderr=subprocess.PIPE, text=True)


def chunks(folder):
    return sorted(folder.glob("chunk-*.safetensors"))


def killed(process, folder, count, delay=0.0):
    """Killed by SIGKILL, so long after the folder has got so many chunks."""
    with process:
        while len(chunks(folder)) < count and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
    return process.returncode, said


def trainings(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each work finds without interruption, and in how many trainings."""
    known = {}

    def of(name):
        if name not in known:
            log = tmp_path_factory.mktemp("whole") / "log"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(LOG, str(log))
                known[name] = in_bytes(WORK[name]()), trainings(log)
        return known[name]

    return of


def resumed(name, folder, log, monkeypatch):
    """The bytes that the same call finds, and the trainings that it makes."""
    before = trainings(log)
    monkeypatch.setenv(LOG, str(log))
    found = in_bytes(WORK[name](folder))
    monkeypatch.delenv(LOG)
    return found, trainings(log) - before


@pytest.mark.parametrize(("name", "count"), [("subsets", 5), ("attacked", 9)])
def test_killed_in_the_middle_and_made_again(name, count, whole, tmp_path, monkeypatch):
    folder, log = tmp_path / "run", tmp_path / "log"
    code, said = killed(started(name, folder, log), folder, count)
    assert code == -signal.SIGKILL, said
    begun, kept = trainings(log), len(chunks(folder))
    wanted, total = whole(name)
    assert count <= kept < total + count
    found, again = resumed(name, folder, log, monkeypatch)
    assert found == wanted
    assert begun + again <= total + 1  # the one in flight
    if name == "subsets":
        assert again == total - kept
    assert resumed(name, folder, log, monkeypatch)[1] == 0


def killed_child(name, folder, log, count, delay):
    """As `killed`, of a child of this process, which need not import anything; whether it was killed before its end."""
    child = os.fork()
    if not child:
        try:
            os.environ[LOG] = str(log)
            WORK[name](folder)
            os._exit(0)
        finally:
            os._exit(1)
    while len(chunks(folder)) < count and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["left_out", "subsets", "attacked"])
def test_killed_at_twenty_random_moments(name, whole, tmp_path, monkeypatch):
    """Each time the same folder goes on until it is killed again; where it has come to its end a new one is begun."""
    wanted, total = whole(name)
    draw, killings, number, runs = np.random.default_rng(sorted(WORK).index(name)), 0, 0, []
    while killings < 20:
        folder, log, kills, ended = tmp_path / f"run{number}", tmp_path / f"log{number}", 0, False
        number += 1
        while killings < 20 and not ended:
            count = min(len(chunks(folder)) + 1, total)
            ended = not killed_child(name, folder, log, count, draw.exponential(0.1))
            kills, killings = kills + (not ended), killings + (not ended)
        found, again = resumed(name, folder, log, monkeypatch)
        assert found == wanted
        assert trainings(log) <= total + kills  # at most the one in flight was lost
        runs.append((kills, trainings(log) - total, again))
    print(
        f"{name}: {killings} kills, {total} trainings; of every folder (kills, made again, missing at the end): {runs}"
    )
