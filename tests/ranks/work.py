"""What the processes of tests/ranks do: run as `python work.py SCENARIO FOLDER`, with torchrun's variables set."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import upweight as uw
from upweight.model.chunks import CHUNK
from upweight.model.sweep import Sweep
from upweight.runs import ranks

n, d, q = 4 * CHUNK + 100, 3, 3
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(n + q, d))
Y = (X @ [1.0, -2.0, 0.5] + DRAW.normal(size=n + q) > 0).astype(np.int64)
Z = X @ [1.0, -2.0, 0.5] + DRAW.normal(size=n + q)
QUERIES, TARGETS = X[n:], Z[n:]


def squared(params, example):
    return (params @ example[0] - example[1]) ** 2


def function(row=None, **settings):
    """A loss given as one function, by CG."""
    X_here = X[:n].copy()
    if row is not None:
        X_here[row] += 1
    theta = torch.tensor(np.linalg.lstsq(X[:n], Z[:n], rcond=None)[0])
    settings = {"solver": uw.solvers.CG(rtol=1e-8), "damping": 0.01} | settings
    return uw.Influence(uw.Objective(squared, theta, name="squared"), (X_here, Z[:n]), **settings)


def network(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    return uw.explain(module, X[:n], Y[:n], loss=nn.functional.cross_entropy, penalty=0.1, damping=0.1, **settings)


def logistic(**settings):
    from sklearn.linear_model import LogisticRegression  # its import takes longer than the rest

    return uw.explain(LogisticRegression(tol=1e-10).fit(X[:n], Y[:n]), X[:n], Y[:n], **settings)


def ridge():
    from sklearn.linear_model import Ridge

    return uw.explain(Ridge(alpha=1.0).fit(X[:n], Z[:n]), X[:n], Z[:n])


def answers(folder: Path) -> dict[str, np.ndarray]:
    """One of every way through the sweeps, by its name."""
    sampled = network(curvature=uw.operators.EKFAC(samples=1))
    by_rank = network(curvature=uw.operators.GaussNewton(keep=0), solver=uw.solvers.CG())
    checked = logistic().check((QUERIES, Y[n:]))
    indexed = sampled.index(folder / "index")
    return {
        "a function by CG": function().on_loss(QUERIES, TARGETS).values,
        "… into a store": function().on_loss(QUERIES, TARGETS, store=folder / "store").values,
        "a linear model by Cholesky": logistic().on_loss(QUERIES, Y[n:]).values,
        "a linear model by CG": logistic(solver=uw.solvers.CG()).on_loss(QUERIES, Y[n:]).values,
        "kept activations": network().on_loss(QUERIES, Y[n:]).values,
        "kept activations by CG": network(solver=uw.solvers.CG()).on_loss(QUERIES, Y[n:]).values,
        "sweeps of a network": by_rank.on_loss(QUERIES, Y[n:]).values,
        "random cotangents": sampled.on_loss(QUERIES, Y[n:]).values,
        "what leads": function().leading(QUERIES, TARGETS, k=3).largest.values,
        "… of a network": network(solver=uw.solvers.CG()).leading(QUERIES, Y[n:], k=3).total,
        "a run folder": uw.write_run(function(), folder / "run", QUERIES, TARGETS, self_influence=False).rows.losses,
        "labels out of fold": [out_of_fold(folder / "folds") for _ in range(2)][1],  # trained, then kept
        "self-influence": sampled.of_self().values,
        "a sum of rows": sampled.risk_gradient.numpy(),
        "leverage": uw.diagnostics.summary_frame(ridge()).to_numpy(),
        "check": np.array([checked.gradient_norm]),
        "an index": indexed.on_loss(indexed.coordinates(sampled, QUERIES, Y[n:])).values,
        "few rows": function().sweep.fold(lambda batch, w: batch[0].T @ w, rows=np.arange(CHUNK + 1)).numpy(),
    }


def out_of_fold(folder: Path) -> np.ndarray:
    """Labels by models that were trained without the rows."""
    run = uw.write_run(logistic(), folder, QUERIES, Y[n:], self_influence=False, out_of_fold=2)
    assert run.rows is not None
    return run.rows.out_of_fold


def before(folder: Path) -> None:
    """Rank 0 as a process of its own, before there are ranks: with the same threads, on the same machine."""
    if os.environ["RANK"] == "0":
        np.savez(folder / "alone.npz", **answers(folder / "alone"))


def values(folder: Path) -> None:
    np.savez(folder / f"rank-{os.environ['RANK']}.npz", **answers(folder / "together"))


def again(folder: Path) -> None:
    """What is in the store already, and the rest."""
    found = function().on_loss(QUERIES, TARGETS, store=folder / "store").values
    np.save(folder / f"again-{os.environ['RANK']}.npy", found)


def other(folder: Path) -> None:
    """Rank 1 has another row, which all are told; then the same, and they go on."""
    rank = os.environ["RANK"]
    _told(lambda: function(row=77 if rank == "1" else None).on_loss(QUERIES, TARGETS), folder / f"other-{rank}")
    np.save(folder / f"went-on-{rank}.npy", function().on_loss(QUERIES, TARGETS).values)


def apart(folder: Path) -> None:
    """Rank 1 asks another question, which all are told; then the same, and they go on."""
    rank, here = os.environ["RANK"], function()
    ask = here.of_self if rank == "1" else lambda: here.on_loss(QUERIES, TARGETS)
    _told(ask, folder / f"apart-{rank}")
    assert len(here.on_loss(QUERIES, TARGETS).values) == q


def inside(folder: Path) -> None:
    """Blocks of other ranks are asked for where nobody can bring them, and then as the message says."""
    rank, here = os.environ["RANK"], network(curvature=uw.operators.KFAC())
    V = torch.ones(1, here.objective.size, dtype=torch.float64)
    product = here.operator.apply(V)

    def dots(batch, weights):
        return (uw.calculus.gradients(here.objective, batch).double() * here.operator.apply(V)).sum(1) * weights

    _told(lambda: here.operator.bases, folder / f"inside-0-{rank}")
    few = here.sweep.examples.batch([0])
    with ranks.work("a sweep", 2):  # as every sweep is split
        _told(lambda: dots(few, 1), folder / f"inside-1-{rank}")
    with here.operator.here():
        assert len(here.operator.bases) == 2
        assert torch.equal(here.operator.apply(V), product)
        found = here.sweep.emit(dots)
    np.save(folder / f"inside-{rank}.npy", found)


def _told(ask, file: Path) -> None:
    try:
        ask()
    except uw.errors.UpweightError as error:
        file.write_text(f"{type(error).__name__}: {error}")


def _interrupted(what) -> None:
    """Calls `what` on rank 1 when it comes to its second chunk of the scores."""
    whole, seen = Sweep._rows, []

    def rows(self: Sweep, batches, label):
        seen.append(label)
        if os.environ["RANK"] == "1" and seen.count("scores") == 2:
            what()
        return whole(self, batches, label)

    Sweep._rows = rows


def failing(folder: Path) -> None:
    def what():
        message = "of rank 1 alone"
        raise ZeroDivisionError(message)

    _interrupted(what)
    again(folder)


def killed(folder: Path) -> None:
    _interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL))
    again(folder)


def stopped(folder: Path) -> None:
    _interrupted(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    again(folder)


def study() -> uw.Study:
    """For the command line."""
    return uw.Study(function(), (QUERIES, TARGETS))


if __name__ == "__main__":
    scenarios = sys.argv[2:]
    if scenarios[0] == "before":
        before(Path(sys.argv[1]))
    torch.distributed.init_process_group("gloo")
    for scenario in scenarios:
        if scenario != "before":
            globals()[scenario](Path(sys.argv[1]))
