"""The answer that every library is compared with: dense float64, written out here, by nothing of upweight.

values[q, i] = (1/n) ∇L(query q) · (C + λI)⁻¹ ∇L(row i), what removing row i does to a query's loss; C is
the Hessian of the mean loss, or its Gauss–Newton matrix. For models that are linear in θ the two are one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from networks import loaded, loss_of
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from workloads import WORKLOADS, Workload

CHUNK = 64


class Flat:
    """A model and its loss as functions of one vector θ."""

    def __init__(self, model: torch.nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.criterion = model, criterion
        named = dict(model.named_parameters())
        self.shapes = {name: value.shape for name, value in named.items()}
        self.theta = torch.cat([value.detach().flatten() for value in named.values()])

    def output(self, theta: Tensor, X: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        named = {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return functional_call(self.model, named, (X,))

    def loss(self, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.output(theta, X), y)

    def gradients(self, X: Tensor, y: Tensor) -> Tensor:
        """The gradient of each row's own loss, (rows, p)."""
        one = grad(lambda theta, x, t: self.loss(theta, x[None], t[None]))
        return torch.stack([one(self.theta, x, t) for x, t in zip(X, y, strict=True)])


def by_columns(product: Callable[[Tensor], Tensor], p: int) -> Tensor:
    """The matrix of a linear map, a few columns at a time."""
    eye = torch.eye(p, dtype=torch.float64)
    return torch.cat([vmap(product)(rows) for rows in eye.split(CHUNK)])


def hessian(flat: Flat, X: Tensor, y: Tensor) -> Tensor:
    """∇² of the mean loss, by the derivative of its gradient along every axis."""
    back = vjp(grad(lambda theta: flat.loss(theta, X, y)), flat.theta)[1]
    return by_columns(lambda v: back(v)[0], len(flat.theta))


def gauss_newton(flat: Flat, X: Tensor, y: Tensor) -> Tensor:
    """(1/n) Σ Jᵀ A J, J the derivative of the outputs, A the Hessian of the mean loss in them."""
    outputs, back = vjp(lambda theta: flat.output(theta, X), flat.theta)
    curved = vjp(grad(lambda out: flat.criterion(out, y)), outputs)[1]

    def product(v: Tensor) -> Tensor:
        forward = jvp(lambda theta: flat.output(theta, X), (flat.theta,), (v,))[1]
        return back(curved(forward)[0])[0]

    return by_columns(product, len(flat.theta))


def softmax_hessian(X: Tensor, W: Tensor) -> Tensor:
    """Softmax regression without an intercept, in closed form: blocks (k, l) are Xᵀ diag(p_k(δ_kl − p_l)) X / n."""
    P, (n, d), K = (X @ W.T).softmax(1), X.shape, len(W)
    H = torch.zeros(K, d, K, d, dtype=torch.float64)
    for k in range(K):
        for other in range(k, K):
            weight = P[:, k] * (float(k == other) - P[:, other]) / n
            H[k, :, other] = X.T @ (weight[:, None] * X)
            H[other, :, k] = H[k, :, other].T
    return H.reshape(K * d, K * d)


def answers(workload: Workload, folder: Path) -> dict[str, NDArray[np.float64]]:
    """`hessian` and `gauss_newton`, both (q, n); and `self`, the diagonal over the rows, by the first of them."""
    with np.load(folder / "data.npz") as data:
        X, y, Xq, yq = (torch.from_numpy(data[key]) for key in ("X", "y", "Xq", "yq"))
    model = loaded(workload.name, folder, torch.float64)
    flat = Flat(model, loss_of(workload.name))
    G, Q = flat.gradients(X, y), flat.gradients(Xq, yq)
    if workload.name.startswith("softmax"):
        curvatures = {"hessian": softmax_hessian(X, model[0].weight.detach())}  # type: ignore[union-attr]
    elif workload.name in {"text", "least-squares"}:
        curvatures = {"hessian": hessian(flat, X, y)}
    elif workload.name == "llama":
        curvatures = {"gauss_newton": gauss_newton(flat, X, y)}
    else:
        curvatures = {"hessian": hessian(flat, X, y), "gauss_newton": gauss_newton(flat, X, y)}
    found: dict[str, NDArray[np.float64]] = {}
    for name, C in curvatures.items():
        values, lowest = solved(C, workload.λ, Q, G)
        found[name] = values
        found[f"{name}_lowest"] = np.array(lowest)
    found["self"] = own(curvatures.get("hessian", next(iter(curvatures.values()))), workload.λ, G)
    return found


def solved(C: Tensor, λ: float, Q: Tensor, G: Tensor) -> tuple[NDArray[np.float64], float]:
    """The values, and the smallest eigenvalue of C + λI (or 0 where p > 4,000, if Cholesky finds it positive)."""
    A = (C + C.T) / 2 + λ * torch.eye(len(C), dtype=torch.float64)
    lowest = float(torch.linalg.eigvalsh(A)[0]) if len(C) <= 4000 else 0.0
    S = torch.linalg.solve(A, Q.T).T if lowest < 0 else torch.cholesky_solve(Q.T, torch.linalg.cholesky(A)).T
    return (S @ G.T / len(G)).numpy(), lowest


def own(C: Tensor, λ: float, G: Tensor) -> NDArray[np.float64]:
    """The effect of every row's removal on its own loss, to first order."""
    A = (C + C.T) / 2 + λ * torch.eye(len(C), dtype=torch.float64)
    return ((torch.linalg.solve(A, G.T).T * G).sum(1) / len(G)).numpy()


def write(name: str, folder: Path) -> None:
    """truth.npz beside the workload's files; nothing where it exists."""
    target = folder / "truth.npz"
    if not target.exists():
        np.savez(target, **answers(WORKLOADS[name], folder))
