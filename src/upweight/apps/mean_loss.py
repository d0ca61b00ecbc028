"""The mean loss of some queries at one model, and what changes of the training data do to it, to first order.

One linear system for all queries together, then sweeps that form no gradient of a row. With n training rows of weights
wᵢ, sample weights uᵢ and class weights c(y), and ∇r's share of a row where the penalty is folded into the rows:

    S = (C + λI)⁻¹ (1/q) Σ_q ∇L(z_q),      s(z) = S · (∇L(z) + share)

    row i becomes z = (x, y)      (1/n) (wᵢ s(zᵢ) − uᵢ c(y) s(z))              equation 3
    ∂/∂xᵢ                         −(wᵢ/n) ∂(S · ∇L(zᵢ))/∂xᵢ                    equation 5
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw
from upweight.apps.solving import solved


def losses_of(influence: uw.Influence, examples: uw.Examples) -> Float[NDArray[np.float64], " m"]:
    """The loss of every example now.  Cost: one forward pass; no curvature.

    Args:
        influence: of the model.
        examples: its training rows, or from `influence.queries(on)`.
    """
    objective = influence.objective.reporting()
    sweep = influence.sweep.over(objective, examples)
    return sweep.emit(lambda batch, _: uw.calculus.losses(objective, batch), label="losses")


class MeanLoss:
    """What changes of training rows do to the queries' mean loss; Cost: one linear system, solved here.

    Args:
        model: where it is asked.
        queries: from `model.queries(on)`.

    A stochastic solver that has not settled warns.

    Raises:
        NotConverged: if the solver did not keep its promise.
    """

    def __init__(self, model: uw.Influence, queries: uw.Examples) -> None:
        self.model = model
        objective = model.objective

        def gradient(batch: Any, weights: Tensor) -> Tensor:
            return uw.calculus.pull(objective, batch, torch.ones_like(weights)[None])

        total = model.sweep.over(objective, queries).fold(gradient, label="gradient of the queries")
        what = f"the mean loss of {len(queries)} queries"
        self.S: Float[Tensor, "1 p"] = solved(model, total / len(queries), what, estimates=True)
        self.share = float(self.S[0] @ model.penalty_share.to(self.S))

    def slopes(self, examples: uw.Examples) -> Float[NDArray[np.float64], " m"]:
        """s(z) of every example.  Cost: one sweep."""
        objective = self.model.objective
        sweep = self.model.sweep.over(objective, examples)
        return (
            sweep.emit(lambda batch, _: uw.calculus.dots(objective, batch, self.S)[:, 0], label="slopes") + self.share
        )

    def of_labels(self, names: list[Any]) -> Float[NDArray[np.float64], "n C"]:
        """The change by giving every training row each of these labels.

        Cost: the rows are read once; 1 + C products with their gradients.
        """
        encoder, objective, examples = self.model.encoder, self.model.objective, self.model.examples
        targets = [encoder.targets(np.asarray([name])) for name in names]
        factors = np.array([float(encoder.class_weights(target)[0]) for target in targets])

        def each(batch: Any, _: Tensor) -> Float[Tensor, "b C_plus_1"]:
            x, y = batch
            asked = [batch, *((x, _filled(target, y)) for target in targets)]
            return torch.cat([uw.calculus.dots(objective, one, self.S).double() for one in asked], 1)

        s = self.model.sweep.emit(each, vectors=2, label="labels") + self.share
        old = examples.weights[:, None] * s[:, :1]
        return (old - examples.sample_weight[:, None] * factors * s[:, 1:]) / self.model.n

    def of_replacing_each(self, pool: uw.Examples) -> tuple[NDArray[np.float64], int]:
        """(n,) the change by making every training row the example of the pool for which it is largest, and which.

        uᵢ ≥ 0 only scales the example's part, so one example is the best for all rows.  Cost: two sweeps.
        """
        examples = self.model.examples
        parts = self.model.class_weights(pool) * self.slopes(pool)
        best = int(parts.argmin())
        return (examples.weights * self.slopes(examples) - examples.sample_weight * parts[best]) / self.model.n, best

    def by_inputs(self, rows: NDArray[np.int64]) -> Float[NDArray[np.float64], "r ..."]:
        """The derivative by the inputs of training rows, as the user gave them.

        Raises:
            UnsupportedModel: if the objective's inputs are not the user's, as for kernels.
        """
        objective, movable = self.model.objective, self.model.encoder.movable(rows)

        def field(batch: Any, weights: Tensor) -> Tensor:
            gradient = uw.calculus.input_gradients(objective, batch, self.S)[0].double().cpu()
            return gradient * weights.reshape(-1, *[1] * (gradient.ndim - 1))

        moved = self.model.sweep.emit(field, rows=rows, label="perturb")
        return movable.widened(-moved[None] / self.model.n)[0]


def _filled(target: Tensor, y: Tensor) -> Tensor:
    """One encoded label for every line of y, in the precision of y where that holds it."""
    as_before = target.to(y)
    new = as_before if bool((as_before == target.to(y.device)).all()) else target.to(y.device)
    return new.reshape(1, *y.shape[1:]).expand(len(y), *y.shape[1:])
