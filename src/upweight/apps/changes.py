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
    """Rows of other classes get the wanted label."""

    def __init__(self, influence: uw.Influence, wanted: Any) -> None:
        self.influence, self.wanted = influence, wanted
        self.candidates = np.flatnonzero(uw.training_labels(influence) != wanted)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """−(1/n) S · (w′∇L(x, y′) − w∇L(x, y))."""
        parts = []
        for start in range(0, len(self.candidates), _CHUNK):
            rows = self.candidates[start : start + _CHUNK]
            batch, weights = self._new(rows)
            new = weights[:, None] * uw.calculus.dots(self.influence.objective, batch, S).double()
            parts.append(_dots(self.influence, rows, S) - new)
        return torch.cat(parts).numpy() / self.influence.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """(1/n) Σ (w′∇L(x, y′) − w∇L(x, y))."""
        batch, weights = self._new(rows)
        new = uw.calculus.pull(objective, batch, weights[None])[0].double()
        return new / self.influence.n - _pulled(self.influence, objective, rows)

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained with the new labels."""
        return uw.retrained(uw.edited(self.influence, rows, y_new=np.full(len(rows), self.wanted)), retrain=retrain)

    def _new(self, rows: NDArray[np.int64]) -> tuple[Any, Tensor]:
        targets = self.influence.encoder.targets(np.full(len(rows), self.wanted))
        new = self.influence.examples.relabelled(rows, targets)
        weights = self.influence.examples.sample_weight[rows] * self.influence.class_weights(new)
        return new.batch(slice(None)), torch.from_numpy(weights)


class Removed:
    """Rows are left out."""

    def __init__(self, influence: uw.Influence, wanted: Any) -> None:  # noqa: ARG002
        self.influence = influence
        self.candidates = np.flatnonzero(influence.examples.weights > 0)

    def effects(self, S: Float[Tensor, "K p"]) -> Float[NDArray[np.float64], "c K"]:
        """(w/n) S · (∇L + the row's share of the penalty)."""
        influence = self.influence
        weights = torch.from_numpy(influence.examples.weights[self.candidates])
        parts = [
            _dots(influence, self.candidates[start : start + _CHUNK], S)
            for start in range(0, len(self.candidates), _CHUNK)
        ]
        return (torch.cat(parts) + weights[:, None] * (S @ influence.penalty_share)).numpy() / influence.n

    def gradient(self, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
        """−(1/n) Σ w (∇L + share)."""
        influence = self.influence
        at = uw.Influence(objective, influence.examples, encoder=influence.encoder)
        share = at.penalty_share * float(influence.examples.weights[rows].sum()) / influence.n
        return -_pulled(influence, objective, rows) - share

    def made(self, rows: NDArray[np.int64], retrain: Any) -> uw.Influence:
        """Trained without them."""
        return uw.retrained(self.influence, without=rows, retrain=retrain)


def _dots(influence: uw.Influence, rows: NDArray[np.int64], S: Float[Tensor, "K p"]) -> Float[Tensor, "r K"]:
    """w S · ∇L of training rows."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return weights[:, None] * uw.calculus.dots(influence.objective, influence.examples.batch(rows), S).double()


def _pulled(influence: uw.Influence, objective: uw.Objective, rows: NDArray[np.int64]) -> Float[Tensor, " p"]:
    """(1/n) Σ w ∇L of training rows, at the parameters of this objective."""
    weights = torch.from_numpy(influence.examples.weights[rows])
    return uw.calculus.pull(objective, influence.examples.batch(rows), weights[None])[0].double() / influence.n
