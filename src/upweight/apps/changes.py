"""What `contrast` may do to training rows: give them another label, or leave them out."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import upweight as uw

_CHUNK = 4096


class Change(Protocol):
    """What may be done to training rows for one wanted label."""

    candidates: NDArray[np.int64]

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """The first-order change of the K outputs by changing each candidate."""
        ...

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """By how much ∇R changes, at the parameters of this objective."""
        ...

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """The model that is trained on the changed data."""
        ...


class Relabelled:
    """Rows of other classes get the wanted label; rows of weight 0 are no candidates, for they would stay unseen.

    A row's sample weight stays, the new label brings the weight w′ of its own class, and with `penalty_per_example` the
    penalty follows the sum of the weights.

    Args:
        influence: of the model and the data, whose training is done again in `made`.
        wanted: the label.
        at: the model at whose parameters effects are measured; None takes the influence itself.
    """

    def __init__(self, influence: uw.Influence, wanted: Any, at: uw.Influence | None = None) -> None:
        self.influence, self.wanted, self.at = influence, wanted, influence if at is None else at
        seen = influence.examples.sample_weight > 0
        self.candidates = np.flatnonzero((uw.training_labels(influence) != wanted) & seen)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """−(1/n) S · (w′∇L(x, y′) − w∇L(x, y) + (w′ − w)(n/Σw)∇r), the last part only if the penalty is folded."""
        share, parts = S @ self.at.penalty_share, [torch.zeros(0, len(S), dtype=torch.float64)]
        for start in range(0, len(self.candidates), _CHUNK):
            rows = self.candidates[start : start + _CHUNK]
            batch, weights = self._new(rows)
            new = weights[:, None] * uw.calculus.dots(self.at.objective, batch, S).double()
            more = weights - torch.from_numpy(self.at.examples.weights[rows])
            parts.append(_dots(self.at, rows, S) - new - more[:, None] * share)
        return torch.cat(parts).numpy() / self.at.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """(1/n) Σ (w′∇L(x, y′) − w∇L(x, y) + (w′ − w)(n/Σw)∇r)."""
        batch, weights = self._new(rows)
        new = uw.calculus.pull(objective, batch, weights[None])[0].double()
        more = float(weights.sum() - self.at.examples.weights[rows].sum())
        return (new + more * _share(self.at, objective)) / self.at.n - _pulled(self.at, objective, rows)

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained with the new labels."""
        return uw.retrained(uw.edited(self.influence, rows, y_new=np.full(len(rows), self.wanted)), retrain=retrain)

    def _new(self, rows: NDArray[np.int64]) -> tuple[Any, Tensor]:
        targets = self.influence.encoder.targets(np.full(len(rows), self.wanted))
        new = self.influence.examples.relabelled(rows, targets)
        weights = self.influence.examples.sample_weight[rows] * self.influence.class_weights(new)
        return new.batch(slice(None)), torch.from_numpy(weights)


class Removed:
    """Rows are left out.

    Args:
        influence: of the model and the data, whose training is done again in `made`.
        wanted: the label that this is for.
        at: the model at whose parameters effects are measured; None takes the influence itself.
    """

    def __init__(self, influence: uw.Influence, wanted: Any, at: uw.Influence | None = None) -> None:  # noqa: ARG002
        self.influence, self.at = influence, influence if at is None else at
        self.candidates = np.flatnonzero(influence.examples.weights > 0)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """(w/n) S · (∇L + the row's share of the penalty)."""
        weights = torch.from_numpy(self.at.examples.weights[self.candidates])
        parts = [
            _dots(self.at, self.candidates[start : start + _CHUNK], S)
            for start in range(0, len(self.candidates), _CHUNK)
        ]
        return (torch.cat(parts) + weights[:, None] * (S @ self.at.penalty_share)).numpy() / self.at.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """−(1/n) Σ w (∇L + share)."""
        share = _share(self.at, objective) * float(self.at.examples.weights[rows].sum()) / self.at.n
        return -_pulled(self.at, objective, rows) - share

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained without them."""
        return uw.retrained(self.influence, without=rows, retrain=retrain)


def _share(influence: uw.Influence, objective: uw.Objective) -> Float[Tensor, " p"]:
    """What a row's gradient carries of the penalty's, at the parameters of this objective; 0 if it carries nothing."""
    return uw.Influence(objective, influence.examples, encoder=influence.encoder).penalty_share


def _dots(influence: uw.Influence, rows: NDArray[np.int64], S: Float[Tensor, "K p"]) -> Float[Tensor, "r K"]:
    """w S · ∇L of training rows."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return weights[:, None] * uw.calculus.dots(influence.objective, influence.examples.batch(rows), S).double()


def _pulled(influence: uw.Influence, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
    """(1/n) Σ w ∇L of training rows, at the parameters of this objective."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return uw.calculus.pull(objective, influence.examples.batch(rows), weights[None])[0].double() / influence.n
