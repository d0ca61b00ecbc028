"""What the training rows do not determine: which columns, in words, and the answers that lean on them.

A solver finds the directions that no row sees (`solvers.flat`). Here they get the names of their columns, solutions
that lean on them become a warning or a refusal, and so do new rows that tell such columns apart.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NotPositiveDefinite, TheoryWarning
from upweight.model.linear import Linear
from upweight.solvers import Solution
from upweight.solvers.flat import LEANS, Flat


@dataclass(frozen=True)
class Undetermined:
    """The directions that no row sees, beside the columns they belong to.

    Args:
        flat: the directions; None if there are none.
        structure: of the linear predictor; None if there is none.
        names: of its features; empty if they have none.
    """

    flat: Flat | None
    structure: Linear | None
    names: list[str]

    @property
    def features(self) -> NDArray[np.int64]:
        """The numbers of the columns whose coefficients the data do not determine."""
        if self.flat is None or self.structure is None:
            return np.zeros(0, dtype=np.int64)
        places = np.flatnonzero(self.flat.touched)
        K, d = self.structure.n_outputs, self.structure.n_features
        return np.unique(places[places < K * d] % d)

    @property
    def columns(self) -> list[str]:
        """Their names, and `intercept` if it is among them."""
        if self.flat is None or self.structure is None:
            return []
        K, d = self.structure.n_outputs, self.structure.n_features
        named = [self.names[j] if len(self.names) == d else f"x{j}" for j in self.features]
        return [*named, *(["intercept"] if self.flat.touched[K * d :].any() else [])]

    @property
    def why(self) -> str:
        """What no row tells apart, in words; "" if there is nothing."""
        if self.flat is None:
            return ""
        names = self.columns
        if not names:
            return f"{self.flat.plain.shape[1]} combinations of parameters change no row's loss to second order"
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"the columns {listed} repeat or add up to others, without a penalty on them"

    def announce(self, solution: Solution, *, refuse: bool = True) -> None:
        """A TheoryWarning about systems that have no solution, whose lines are NaN.

        Args:
            solution: of all systems.
            refuse: whether it is an error if none has one.

        Raises:
            NotPositiveDefinite: if it is.
        """
        k, leaning = len(solution.x), torch.nonzero(solution.x.isnan().any(1)).flatten().tolist()
        if not leaning:
            return
        asked = (
            f"{len(leaning)} of {k} systems (first: number {leaning[0]}) ask for what the training rows do not "
            f"determine: {self.why}, and {float(solution.residual.max()):.2g} of the gradient leans on "
            "combinations that no row has"
        )
        advice = (
            "Ask about examples whose columns go together as they do in the training rows, drop a column and fit "
            "again, or fit with a penalty."
        )
        if refuse and len(leaning) == k:
            refusal = f"{asked}. {advice}"
            raise NotPositiveDefinite(refusal, solution)
        warnings.warn(f"{asked}; their values are NaN. {advice}", TheoryWarning, stacklevel=5)

    def determined(self, G: Float[Tensor, "r p"]) -> Float[Tensor, "r p"]:
        """G, with NaN for gradients of new rows that lean on what no training row has, and a TheoryWarning."""
        if self.flat is None:
            return G
        leans = self.flat.leaning(G) > LEANS
        if bool(leans.any()):
            first = int(torch.nonzero(leans)[0])
            message = (
                f"{int(leans.sum())} of {len(G)} changes (first: number {first}) bring a row that no training row "
                f"resembles: {self.why}, and the new row tells them apart. Such a row settles "
                "coefficients that nothing held before, which is no small change: their values are NaN. Train with it "
                "instead, or drop a column and fit again."
            )
            warnings.warn(message, TheoryWarning, stacklevel=5)
        return torch.where(leans[:, None], torch.nan, G)
