"""How far an iteration runs before it looks up: to keep its state, and to see whether the values have settled.

Values settle long before a residual is small: what is missing of x lies where few gradients reach. `Pace` follows
X · g for the gradients g of a few rows; with d_j the change of all of them between two looks, relative to their size,
what is still to come is estimated by the geometric series

    left = d_j ρ/(1 − ρ)        ρ = d_j/d_{j−1}, at most 0.95
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import UnsupportedModel
from upweight.model import per_row
from upweight.operators.base import Operator
from upweight.runs import ranks
from upweight.runs.stopping import asked, stop_here
from upweight.solvers import bounds

Keep = Callable[[Mapping[str, Tensor]], None]
STEPS = 8  # between two looks at the values
SECONDS = 30.0  # between two states that are kept
_PATIENCE = 5.0  # seconds that a signal waits
_WITNESSES = 64  # rows whose values are followed
_SLOWEST = 0.95


class Pace:
    """The looks of one solve.

    Args:
        settled: the estimated relative change of the values at which to stop; None looks at the residual alone.
        operator: whose rows are followed.
        keep: what to do with a state that another solve can go on from.

    Raises:
        UnsupportedModel: if values are to settle, and the operator has no rows.
    """

    def __init__(self, settled: float | None, operator: Operator, keep: Keep | None) -> None:
        self.settled, self.keep = settled, keep
        self.rows = None if settled is None else _gradients(operator)
        self.left: Float[Tensor, " k"] | None = None
        self._values: Tensor | None = None
        self._change: Tensor | None = None
        self._each: float | None = None
        self._start = self._kept = time.monotonic()

    def steps(self, most: int) -> int:
        """How many products to make before the next look, at most so many."""
        self._start = time.monotonic()
        if self.rows is not None:
            return min(most, STEPS)
        if self.keep is None:
            return most
        return min(most, STEPS if self._each is None else max(1, int(_PATIENCE / max(self._each, 1e-9))))

    def look(self, X: Float[Tensor, "k p"], P: Float[Tensor, "k p"], steps: int) -> bool:
        """Keeps the state if it is time; whether the values have settled.

        Raises:
            Stopped: if a signal has asked for it, once the state is kept; several ranks go on, for all must stop alike.
        """
        now = time.monotonic()
        alone = not ranks.several()
        if self.keep is not None:  # by rank 0's clock, for all take as many steps
            self._each = float(ranks.same("the pace", torch.tensor([(now - self._start) / max(1, steps)]).double())[0])
        if self.keep is not None and ((alone and asked()) or now - self._kept >= SECONDS):
            self.keep({"x": X, "p": P})
            self._kept = now
            if alone:
                stop_here("some steps of the solver")
        if self.rows is None:
            return False
        values = X @ self.rows.T
        if self._values is not None:
            size = values.norm(dim=1).clamp(min=torch.finfo(values.dtype).tiny)
            change = (values - self._values).norm(dim=1) / size
            if self._change is not None:
                ratio = (change / self._change.clamp(min=1e-300)).clamp(max=_SLOWEST)
                self.left = torch.where(change > 0, change * ratio / (1 - ratio), 0.0)
            self._change = change
        self._values = values
        return self.left is not None and bool((self.left <= (self.settled or 0.0)).all())

    def bound(
        self, X: Float[Tensor, "k p"], R: Float[Tensor, "k p"], V: Float[Tensor, "k p"], energy: Tensor, lowest: float
    ) -> Float[Tensor, " k"] | None:
        """What can still come to the values at most, relative to their size; see `bounds.of_values`."""
        if self.rows is None:
            return None
        size = (X @ self.rows.T).norm(dim=1).clamp(min=torch.finfo(X.dtype).tiny)
        return bounds.of_values(self.rows, X, R, V, energy, lowest) / size


def _gradients(operator: Operator) -> Float[Tensor, "r p"]:
    """∇L of a few rows, spread through the data."""
    sweep = getattr(operator, "sweep", None)
    if sweep is None:
        message = (
            f"settled follows the values of a few rows, and {type(operator).__name__} has none. Leave settled out, and "
            "name the residual to reach: CG(rtol=1e-6)."
        )
        raise UnsupportedModel(message)
    return per_row.gradients(sweep, sweep.examples.spread(_WITNESSES))
