"""What a training row would cost after training with each label that it might have: the suggestions of `repair`.

For a linear predictor everything but row i is taken to second order. With η̂ the row's K outputs, h = ∂²ℓ/∂η² there,
w its weight, C + λI the curvature and x̃ = (x, 1), the K × K block of what its outputs can do without it is

    S = x̃ᵀ(n(C + λI) − w h ⊗ x̃x̃ᵀ)⁻¹x̃ = A(I − w h A)⁻¹          A = x̃ᵀ(n(C + λI))⁻¹x̃

and the outputs without the row, and after training with the label c at its weight w_c, are

    η₋ᵢ = η̂ + w S ∂ℓ(η̂, y)/∂η          η_c = argmin ½(η − η₋ᵢ)ᵀS⁻¹(η − η₋ᵢ) + w_c ℓ(η, c)

ℓ itself is kept, so ℓ(η_c, c) is the loss of outputs, never below 0, and that of the present label is its loss now.
Squared loss: exact. With a folded penalty and class weights r follows Σw, which moves η₋ᵢ a little.
References: Rahnama Rad and Maleki (2020), who leave rows out in this way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw
from upweight.apps.mean_loss import losses_of
from upweight.apps.solving import solved

_BLOCK = 128  # rows whose relabelling is measured on one another, of which only the diagonal is needed
_NUMBERS = 2**23  # of the right-hand sides at once: 64 MB
_LEAST = 1e-9  # of 1 − leverage
_ROUNDS = 100
_HALVINGS = 40
_OF = "the outputs of a row"  # what systems are solved for
_AS_GOOD = 0.01  # a label that saves no more than this share of the row's present loss is no better than the present


def suggested(
    influence: uw.Influence,
    rows: Int[NDArray[np.int64], " k"],
    names: list[Any],
    present: Int[NDArray[np.int64], " k"],
    candidates: int,
) -> tuple[Int[NDArray[np.int64], " k"], Float[NDArray[np.float64], " k"]]:
    """For every row the class with the smallest loss after training with it, and how much smaller that is than now.

    The present class stays, and the second number is 0, where no other saves more than a hundredth of the loss.
    """
    held = losses_of(influence, influence.examples.subset(rows))
    linear = _closed(influence)
    after = (_trained if linear else _first_order)(influence, rows, names, present, candidates)
    places = np.arange(len(rows))
    after[places, present] = held
    best = after.argmin(1)
    best = np.where(after[places, best] < (1 - _AS_GOOD) * held, best, present)
    return best, held - after[places, best]


def _closed(influence: uw.Influence) -> bool:
    """Whether S is known: a linear predictor, its own curvature, and solutions that are no estimates."""
    curvature = influence.curvature
    curvature = curvature.of if isinstance(curvature, uw.operators.Dense) else curvature
    own = isinstance(curvature, uw.operators.Hessian | uw.operators.GaussNewton)
    return influence.objective.linear is not None and own and not isinstance(influence.solver, uw.solvers.LiSSA)


# ---- linear predictors -------------------------------------------------------------------------------------------


def _trained(
    influence: uw.Influence, rows: NDArray[np.int64], names: list[Any], present: NDArray[np.int64], candidates: int
) -> Float[NDArray[np.float64], "k C"]:
    """ℓ(η_c, c) for the labels c that cost least without the row; infinite for others."""
    objective = influence.objective
    width = objective.linear.n_outputs * objective.size  # type: ignore[union-attr]
    systems = len(rows) * objective.linear.n_outputs  # type: ignore[union-attr]
    share = influence.penalty_share
    aside = solved(influence, share[None], _OF, systems=systems)[0] if bool(share.any()) else None
    size = max(1, _NUMBERS // width)
    blocks = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    return np.concatenate(
        [_of_block(influence, systems, rows[block], names, present[block], candidates, aside) for block in blocks]
    )


def _of_block(
    influence: uw.Influence,
    systems: int,
    rows: NDArray[np.int64],
    names: list[Any],
    present: NDArray[np.int64],
    candidates: int,
    aside: Float[Tensor, " p"] | None,
) -> Float[NDArray[np.float64], "b C"]:
    structure, reported = influence.objective.linear, influence.objective.reporting().linear
    assert structure is not None
    assert reported is not None
    loss, n, b, C = structure.loss, influence.n, len(rows), len(names)
    batch = influence.examples.batch(rows)
    eta = uw.calculus.outputs(influence.objective, batch)  # (b, K)
    weight = torch.from_numpy(influence.examples.weights[rows])
    units = _units(influence, batch[0])  # (b, K, p)
    moved = solved(influence, units.flatten(0, 1), _OF, systems=systems).reshape(units.shape)
    h = loss.curvature(eta, batch[1]) * weight[:, None, None]
    S = _without(units @ moved.mT / n, h)
    left = eta + torch.einsum("bij,bj->bi", S, weight[:, None] * loss.slope(eta, batch[1]))
    y = [influence.encoder.targets(np.asarray([name] * b)) for name in names]
    base = influence.examples.sample_weight[rows]
    weights = torch.stack([torch.from_numpy(base * influence.encoder.class_weights(label)) for label in y], 1)  # (b, C)
    starts = left[:, None].expand(-1, C, -1)
    if aside is not None:
        along = units @ aside
        along = along + torch.einsum("bij,bjk,bk->bi", S, h, along)
        starts = starts - (weights - weight[:, None])[:, :, None] / n * along[:, None]
    without = torch.stack([reported.loss.value(left, label) for label in y], 1)
    without[torch.arange(b), torch.from_numpy(present)] = torch.inf  # what it costs now is known
    tried = without.argsort(dim=1, stable=True)[:, :candidates]
    after = np.full((b, C), np.inf)
    for column in tried.T:
        target = torch.stack([y[int(c)][place] for place, c in enumerate(column)])
        picked = torch.arange(b), column
        end = minimised(loss, starts[picked], S, weights[picked], target)
        after[np.arange(b), column.numpy()] = reported.loss.value(end, target).numpy()
    return after


def _units(influence: uw.Influence, X: Any) -> Float[Tensor, "b K p"]:
    """The gradients e_j ⊗ x̃ of every output."""
    structure = influence.objective.linear
    assert structure is not None
    x = torch.from_numpy(X.toarray()) if hasattr(X, "toarray") else X
    eye = torch.eye(structure.n_outputs, dtype=torch.float64)
    coef = torch.einsum("ij,bd->bijd", eye, x.double()).flatten(2)
    return torch.cat([coef, eye.expand(len(x), -1, -1)], 2) if structure.intercept else coef


def _without(A: Float[Tensor, "b K K"], h: Float[Tensor, "b K K"]) -> Float[Tensor, "b K K"]:
    """S = A(I − hA)⁻¹ as B(I − BᵀhB)⁻¹Bᵀ with A = BBᵀ; a leverage of 1 is taken for a little less."""
    values, vectors = torch.linalg.eigh((A + A.mT) / 2)
    B = vectors * values.clamp(min=0).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(torch.eye(B.shape[1], dtype=B.dtype) - B.mT @ h @ B)
    root = B @ vectors / values.clamp(min=_LEAST).sqrt()[:, None]
    return root @ root.mT


def minimised(
    loss: uw.losses.Loss,
    start: Float[Tensor, "m K"],
    S: Float[Tensor, "m K K"],
    weights: Float[Tensor, " m"],
    y: Tensor,
) -> Float[Tensor, "m K"]:
    """argmin over η of ½(η − start)ᵀS⁻¹(η − start) + w ℓ(η, y), for every line; S may be singular.

    η = start + S r, so that r = −w ∂ℓ/∂η at the minimum: Newton's method in r, its step halved until the value falls.
    """
    r, eye = torch.zeros_like(start), torch.eye(start.shape[1], dtype=start.dtype)
    w = weights[:, None]

    def outputs(r: Tensor) -> Tensor:
        return start + torch.einsum("mij,mj->mi", S, r)

    def value(r: Tensor) -> Tensor:
        return ((outputs(r) - start) * r).sum(1) / 2 + weights * loss.value(outputs(r), y)

    for _ in range(_ROUNDS):
        eta = outputs(r)
        missing = r + w * loss.slope(eta, y)  # S times it is the gradient
        if float(torch.einsum("mij,mj->mi", S, missing).abs().max()) <= 1e-10 * (1 + float(eta.abs().max())):
            break
        step = -torch.linalg.solve(eye + w[:, :, None] * loss.curvature(eta, y) @ S, missing)
        slope = torch.einsum("mi,mij,mj->m", missing, S, step)
        now, length = value(r), torch.ones_like(weights)
        for _ in range(_HALVINGS):
            worse = value(r + length[:, None] * step) > now + 1e-4 * length * slope
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        r = r + length[:, None] * step
    return outputs(r)


# ---- other models ------------------------------------------------------------------------------------------------


def _first_order(
    influence: uw.Influence,
    rows: NDArray[np.int64],
    names: list[Any],
    present: NDArray[np.int64],
    candidates: int,  # noqa: ARG001
) -> Float[NDArray[np.float64], "k C"]:
    """The loss after training with the other label that costs least now, where it may be suggested; else infinite.

    First order says little about a label that costs much: L(c) − (1/n) ∇L_cᵀ(C + λI)⁻¹(w_c∇L_c − w∇L_y) falls below 0
    for the label of the largest gradient first. So it chooses nothing: the label is the one that costs least now, and
    it may be suggested if it costs less now than the present label would without the row, L(y) + self-influence. What
    the row then costs is the sum above, but at least 0. A large damping makes little of both effects, and labels stay.
    """
    places = np.arange(len(rows))
    now = np.stack([losses_of(influence, _relabelled(influence, rows, [name] * len(rows))) for name in names], 1)
    without = now[places, present] + influence.of_self(rows).values
    others = now.copy()
    others[places, present] = np.inf
    rival = others.argmin(1)
    after = np.full(now.shape, np.inf)
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        new = [names[c] for c in rival[block]]
        asked = _relabelled(influence, rows[block], new)
        change = np.diag(influence.of_relabeling(rows[block], new, on=asked).values)
        after[block, rival[block]] = np.maximum(0, others[block, rival[block]] + change)
    after[places, rival] = np.where(others[places, rival] < without, after[places, rival], np.inf)
    return after


def _relabelled(influence: uw.Influence, rows: NDArray[np.int64], names: list[Any]) -> uw.Examples:
    """These training rows with other labels, as queries."""
    return influence.examples.relabelled(rows, influence.encoder.targets(np.asarray(names)))
