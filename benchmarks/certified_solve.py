"""Claim: the damped Gauss–Newton system of a network is solved exactly, in about the time of a few forward passes.

MLP 784-128-10 tanh on the first 5,500 MNIST digits, ten queries, λ = 0.01, p = 101,770. The values of `on_loss` beside
an independent float64 solve (products written here with torch.func, SciPy's CG to 1e-8); products and seconds with and
without each preconditioner, what each preconditioner alone gives, plain CG of one query at a time, and the same for the
Hessian, at a damping at which it is positive.

    UPWEIGHT_DATA=… python benchmarks/certified_solve.py        # writes results/certified_solve.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from common import gigaflops, report, seconds
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import upweight as uw
from upweight.operators import EKFAC, KFAC, GaussNewton, Hessian, Nystroem
from upweight.solvers import CG, Factored, Plain, Preconditioned

N, QUERIES, DAMPING, EPOCHS = 5500, 10, 0.01, 20


def trained(X: Tensor, y: Tensor) -> nn.Module:
    """Adam for a few epochs: not at a minimum, as networks are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(X), generator=order).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimiser.step()
    return model.eval()


class Independent:
    """Products, gradients and solves of the same problem in float64, with torch.func and SciPy only."""

    def __init__(self, model: nn.Module, X: Tensor, y: Tensor) -> None:
        self.model = model
        self.params = {name: p.detach().double() for name, p in model.named_parameters()}
        self.X, self.y = X.double(), y
        self.products = 0
        f = self.outputs(self.params)
        self.P = f.softmax(1)

    def outputs(self, params: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, params, (self.X,))

    def tree(self, v: np.ndarray) -> dict[str, Tensor]:
        pieces = torch.from_numpy(v).split([p.numel() for p in self.params.values()])
        return {name: piece.reshape(p.shape) for (name, p), piece in zip(self.params.items(), pieces, strict=True)}

    def gauss_newton(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        _, Jv = jvp(self.outputs, (self.params,), (self.tree(v),))
        Z = self.P * (Jv - (self.P * Jv).sum(1, keepdim=True)) / len(self.X)
        return flat(vjp(self.outputs, self.params)[1](Z)[0])

    def hessian(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        return flat(jvp(torch.func.grad(self.risk), (self.params,), (self.tree(v),))[1])

    def risk(self, params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.outputs(params), self.y)

    def values(self, product: Callable[[np.ndarray], np.ndarray], damping: float, xq: Tensor, yq: Tensor) -> np.ndarray:
        """(1/n) s·∇Lᵢ for every row: SciPy's CG for each query, then one jvp."""

        def damped(v: np.ndarray) -> np.ndarray:
            return product(v) + damping * v

        lines = []
        for x, y in zip(xq.double(), yq, strict=True):
            gradient = torch.func.grad(
                lambda p, x=x, y=y: nn.functional.cross_entropy(functional_call(self.model, p, (x[None],)), y[None])
            )(self.params)
            v = flat(gradient)
            A = scipy.sparse.linalg.LinearOperator((len(v), len(v)), damped, dtype=np.float64)
            s, failed = scipy.sparse.linalg.cg(A, v, rtol=1e-8, maxiter=5000)
            if failed:
                raise RuntimeError(failed)
            _, line = jvp(self.row_losses, (self.params,), (self.tree(s),))
            lines.append(line.numpy() / len(self.X))
        return np.stack(lines)

    def row_losses(self, params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.outputs(params), self.y, reduction="none")


def flat(tree: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([block.reshape(-1) for block in tree.values()]).detach().numpy()


def likeness(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The worst query's correlation, and the largest error relative to that query's largest value."""
    worst = min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(values, truth, strict=True))
    error = np.abs(values - truth).max(1) / np.abs(truth).max(1)
    return {"smallest_pearson": worst, "largest_relative_error": float(error.max())}


def main() -> None:
    data = uw.datasets.mnist()
    X = torch.from_numpy(data.images[:N] / 255).float()
    y = torch.tensor(data.labels[:N]).long()
    xq = torch.from_numpy(data.test_images[:QUERIES] / 255).float()
    yq = torch.tensor(data.test_labels[:QUERIES]).long()
    model = trained(X, y)
    settings = {"loss": nn.functional.cross_entropy, "damping": DAMPING}

    def ours(curvature: Any, solver: Any, **changed: Any) -> uw.Scores:
        return uw.explain(model, X, y, curvature=curvature, solver=solver, **(settings | changed)).on_loss(xq, yq)

    ours(GaussNewton(), CG(rtol=0.5))  # warm the caches of every library
    oracle = Independent(model, X, y)
    independent_seconds, truth = seconds(lambda: oracle.values(oracle.gauss_newton, DAMPING, xq, yq))
    numbers: dict[str, Any] = {
        "independent": {"seconds": independent_seconds, "products": oracle.products},
        "gigaflops_float64": gigaflops(torch.float64),
        "gigaflops_float32": gigaflops(torch.float32),
    }
    solvers: dict[str, tuple[Any, Any]] = {
        "CG": (GaussNewton(), CG()),
        "CG, 1e-4": (GaussNewton(), CG(rtol=1e-4)),
        "CG + Nystroem(200)": (GaussNewton(), CG(preconditioner=Preconditioned(Nystroem(200)))),
        "CG + KFAC": (GaussNewton(), CG(preconditioner=Preconditioned(KFAC(samples=1)))),
        "CG + EKFAC": (GaussNewton(), CG(preconditioner=Preconditioned(EKFAC(samples=1)))),
        "EKFAC alone": (EKFAC(), Factored()),
        "KFAC alone": (KFAC(), Factored()),
    }
    for name, (curvature, solver) in solvers.items():
        took, scores = seconds(lambda curvature=curvature, solver=solver: ours(curvature, solver))
        known = scores.certificate
        gap = getattr(known, "preconditioner_gap", None)
        numbers[name] = {
            "seconds": took,
            "products": known.sweeps,
            "residual": float(np.max(known.residual)),
            "preconditioner_gap": None if gap is None else [float(np.min(gap)), float(np.max(gap))],
        } | likeness(scores.values, truth)
        print(name, numbers[name], flush=True)
    flops = 4 * N * 101_770 * QUERIES
    numbers["limit_seconds_of_CG"] = numbers["CG"]["products"] * flops / numbers["gigaflops_float64"] / 1e9
    alone, _ = seconds(
        lambda: [
            uw.explain(
                model, X, y, curvature=GaussNewton(keep=0), solver=CG(preconditioner=Plain()), **settings
            ).on_loss(xq[:1], yq[:1])
        ]
    )
    numbers["one query, autograd products"] = {"seconds": alone}
    exact = uw.explain(model, X, y, curvature=Hessian(), **settings)
    lowest = exact.check().min_curvature
    positive = float(np.ceil(-1.2 * lowest * 1e3) / 1e3) if lowest < 0 else DAMPING
    took, scores = seconds(lambda: ours(Hessian(), CG(), damping=positive))
    oracle.products = 0
    truth = oracle.values(oracle.hessian, positive, xq[:3], yq[:3])
    numbers["Hessian"] = {
        "smallest_eigenvalue": lowest,
        "positive_at_0.01": lowest + DAMPING > 0,
        "damping": positive,
        "seconds": took,
        "products": scores.certificate.sweeps,
    } | likeness(scores.values[:3], truth)
    report(__file__, {"n": N, "queries": QUERIES, "damping": DAMPING, "epochs": EPOCHS}, numbers)


if __name__ == "__main__":
    main()
