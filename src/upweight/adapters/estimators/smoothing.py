"""Smooth losses that stand for losses with kinks (paper, section 4.3), and the warning that says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.adapters.estimators.built import Fit
from upweight.errors import InvalidInput
from upweight.model import losses
from upweight.model.losses import Loss
from upweight.model.objective import L2

WIDTH = 0.001  # the paper's t
_REACH = 10  # margins (or spreads of predictions) that one row may move an intercept by, before it counts as loose
_HELD = 1e6  # the curvature that keeps such an intercept where it is


def smooth_hinge(fit: Fit) -> tuple[Loss, str]:
    """What stands for the hinge, with t = 0.001 unless the user names another; and the warning."""
    return _chosen(fit, losses.hinge, losses.smooth_hinge(WIDTH), "losses.smooth_hinge(t)")


def smooth_tube(fit: Fit) -> tuple[Loss, str]:
    """The loss that stands for epsilon_insensitive(ε), and the warning."""
    epsilon = float(fit.estimator.epsilon)
    return _chosen(
        fit,
        losses.epsilon_insensitive(epsilon),
        losses.smooth_epsilon_insensitive(epsilon, WIDTH),
        f"losses.smooth_epsilon_insensitive({epsilon:g}, t)",
    )


def _chosen(fit: Fit, raw: Loss, default: Loss, advice: str) -> tuple[Loss, str]:
    """The user's loss if it stands for `raw`.

    Raises:
        InvalidInput: if it does not.
    """
    loss = default if fit.loss is None else fit.loss
    if getattr(loss, "name", None) == raw.name:
        stretched = (
            f"{fit.name} minimises {raw.name}, and it is explained with t = 0: the loss has no curvature, and the "
            f"penalty alone resists. Smoother: loss={advice}, t=0.001"
        )
        return loss, stretched
    limit = getattr(loss, "limit", None)
    if limit is None or limit.name != raw.name:
        message = (
            f"loss={loss!r} was given for {fit.name}, which minimises {raw.name}. Pass a smooth version of that, "
            f"loss={advice}, or losses.{raw.name} itself for t = 0."
        )
        raise InvalidInput(message)
    stretched = (
        f"{fit.name} minimises {raw.name}, whose kinks have no second derivative. It is explained at the same weights "
        f"with {loss.name}; a query's value is its {raw.name}"
    )
    return loss, stretched


def held_intercepts(
    fit: Fit,
    loss: Loss,
    strength: float,
    eta: NDArray[np.float64],
    targets: NDArray[Any],
    free: NDArray[np.bool_],
) -> tuple[L2, str]:
    """r = (λ/2)‖coef‖² with what holds the free intercepts that no row determines, and words about it.

    Such an intercept is held at its value: its block gets a strength and the tilt that makes the gradient vanish there.

    Args:
        fit: the estimator and its rows.
        loss: the smooth loss.
        strength: λ.
        eta: (n, K) predictors of the rows.
        targets: of the rows, encoded.
        free: (K,) False where fit() itself leaves the intercept undetermined.
    """
    h = loss.curvature(torch.from_numpy(eta), torch.from_numpy(np.asarray(targets)))
    weights = (
        torch.ones(fit.n, dtype=torch.float64) if fit.sample_weight is None else torch.from_numpy(fit.sample_weight)
    )
    unit = 1.0 if hasattr(fit.estimator, "classes_") else float(np.std(eta)) or 1.0
    curved = (weights[:, None] * torch.diagonal(h, dim1=1, dim2=2)).sum(0).numpy() > 1 / (_REACH * unit)
    strengths = {"coef": strength} if strength else {}
    if (free & curved).all():
        return L2(strengths), ""
    intercepts = torch.as_tensor(np.atleast_1d(fit.estimator.intercept_), dtype=torch.float64)
    held = torch.from_numpy(np.where(free & curved, 0.0, _HELD))
    penalty = L2(strengths | {"intercept": held}, {"intercept": -held * intercepts})
    loose = int((~(free & curved)).sum())
    which = "The intercept is" if len(free) == 1 else f"The intercepts of {loose} of {len(free)} pairs are"
    if not free.all():
        why = "all support vectors are at a bound (none is free)"
    elif loss.limit is None:
        why = "without smoothing (t = 0) the loss has no curvature"
    else:
        why = "too few rows lie within t of a kink; a larger t identifies it"
    return penalty, f". {which} unidentified, for {why}, and held fixed"
