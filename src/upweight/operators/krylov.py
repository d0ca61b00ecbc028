"""Lanczos's basis of a symmetric operator: an orthonormal Q with Q C Qᵀ tridiagonal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.model import chunks
from upweight.operators.base import Operator
from upweight.runs import ranks
from upweight.runs.stopping import asked, stop_here

_GONE = 1e-11  # of the largest curvature met: a space that the operator does not leave


def lanczos(
    operator: Operator,
    steps: int,
    *,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    keep: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> tuple[Float[Tensor, "m p"], Float[Tensor, "m m"], float]:
    """Q, T = Q C Qᵀ, and the norm of what the last step would still add, so that ‖Cu − θu‖ = norm·|s_m| for u = sQ.

    Every vector is orthogonalised against all others, twice. Where the operator does not leave the space, a new random
    vector is taken, so that directions of equal curvature are found too; m < steps only where nothing is left but the
    gauge.  Cost: one product per step; 8·steps·p bytes.

    Args:
        operator: C.
        steps: vectors of the basis.
        seed: of the vectors that are drawn.
        state: what `keep` was given of the same operator, steps and seed: it goes on from there, to the same bits.
        keep: is given the basis as far as it has come every half a minute, and at the end.

    Raises:
        Stopped: if a signal has asked for it, once the state is kept; several ranks go on, for all must stop alike.
    """
    p = operator.size
    draw = torch.Generator().manual_seed(seed)
    Q = torch.empty(steps, p, dtype=torch.float64)
    alphas: list[float] = []
    betas: list[float] = []
    scale, beta, draws, begun = 0.0, 0.0, 0, 0
    vector: Tensor | None = None
    if state is not None:
        begun, draws, scale = len(state["basis"]), int(state["draws"]), float(state["scale"])
        Q[:begun], alphas, betas = state["basis"], state["alphas"].tolist(), state["betas"].tolist()
        beta, vector = betas[-1], state["vector"] if betas[-1] else None
        for _ in range(draws):
            torch.randn(1, p, generator=draw, dtype=torch.float64)
    since = time.monotonic()
    for step in range(begun, steps):
        if vector is None:
            draws += 1
            fresh = _orthogonal(operator.project(torch.randn(1, p, generator=draw, dtype=torch.float64)), Q[:step])
            if float(fresh.norm()) <= 1e-8 * p**0.5:
                return Q[:step].clone(), _tridiagonal(alphas, betas[: step - 1]), 0.0
            vector = _unit(fresh / fresh.norm(), Q[:step])
        Q[step] = vector
        image = operator.project(operator.apply(Q[step : step + 1]))
        alphas.append(float(image[0] @ Q[step]))
        scale = max(scale, float(image.norm()))
        image = _orthogonal(image, Q[: step + 1])
        beta = float(image.norm())
        left = beta <= _GONE * max(scale, 1e-300)
        beta = 0.0 if left else beta
        betas.append(beta)
        vector = None if left else _unit(operator.project(image / beta), Q[: step + 1])
        stopping = asked() and not ranks.several()
        if keep is not None and (stopping or step + 1 == steps or time.monotonic() - since >= chunks.KEPT_EVERY):
            numbers = {"alphas": alphas, "betas": betas, "scale": scale, "draws": draws}
            told = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
            keep({**told, "basis": Q[: step + 1], "vector": image.new_zeros(p) if vector is None else vector})
            since = time.monotonic()
            stop_here(f"step {step + 1} of {steps} of Lanczos's basis")
    return Q, _tridiagonal(alphas, betas[:-1]), beta


def _orthogonal(v: Tensor, Q: Tensor) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        v = v - (v @ Q.T) @ Q
    return v


def _unit(v: Tensor, Q: Tensor) -> Tensor:
    """v as a unit vector without what lies in Q, once more: the rounding of a small remainder grew with it."""
    v = _orthogonal(v, Q)[0]
    return v / v.norm()


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas, dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    return T
