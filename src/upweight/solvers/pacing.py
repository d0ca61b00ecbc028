"""How far an iteration runs before it looks up: to keep its state, and to see whether the values have settled.

Values settle long before a residual is small: what is missing of x lies where few gradients reach. `Pace` follows
X · g for the gradients g of a few rows; with d the change of all of them over the last w steps, relative to their size,
and d' over the w steps before, what is still to come is estimated by the geometric series

    left = d ρ/(1 − ρ)        ρ = d/d', at most 0.95;  w a quarter of all steps, and 3 at least

the largest of the last sixth of the estimates, and of two at least: a step that changes little may precede one that
changes much.
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
STEPS = 8  # between two looks at the values, where they cannot be looked at after every step
_AGREEING = 6  # the last steps of so many in all whose estimates have to agree, two at least
_FEWEST = 3  # steps over which a change of the values is taken at least
SECONDS = 30.0  # between two states that are kept
_PATIENCE = 5.0  # seconds that a signal waits
_WITNESSES = 64  # rows whose values are followed
_SLOWEST = 0.95
_LOST = 0.3  # of the true residual: a recurrence that is so far off it knows little of what values still do


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
        self.ended = False
        self._said: list[Float[Tensor, " k"]] = []  # estimates after the last steps
        self._fewest = _FEWEST
        self._values: list[Float[Tensor, "k r"]] = []  # after every step
        self._each: float | None = None
        self._start = self._kept = time.monotonic()

    def look(self, X: Float[Tensor, "k p"], P: Float[Tensor, "k p"]) -> bool:
        """After every step: keeps the state if it is time; whether the values have settled, which `ended` says later.

        Raises:
            Stopped: if a signal has asked for it, once the state is kept; several ranks go on, for all must stop alike.
        """
        self._keep(X, P)
        if self.rows is None:
            return False
        self._values.append(X @ self.rows.T)
        left = self._left()
        if left is None:
            return False
        self._said.append(left)
        agree = max(2, len(self._values) // _AGREEING)
        self.left = torch.stack(self._said[-agree:]).amax(0)
        self.ended = len(self._said) >= agree and bool((self.left <= (self.settled or 0.0)).all())
        return self.ended

    def rests(self, X: Float[Tensor, "k p"], P: Float[Tensor, "k p"], drifted: float, steps: int | None) -> bool:
        """After a run: keeps the state if it is time; whether the values have settled.

        Args:
            X: the solutions.
            P: the directions to go on in.
            drifted: what the recurrence believes of the residual is off by, as a share of it. Where that is much, what
                was seen was not so, and the next steps count alone.
            steps: of the run, if they were not looked at one by one.
        """
        if steps is not None:
            return self._looks(X, P, steps)
        self._keep(X, P)
        if self.ended and drifted > _LOST:
            self.ended, self._values, self._said = False, [], []
        return self.ended

    def _left(self) -> Float[Tensor, " k"] | None:
        """What is still to come to the values, relative to their size; None where too few steps were made."""
        made = len(self._values)
        window = max(self._fewest, made // 4)
        if made <= 2 * window:
            return None
        now, then, first = (self._values[made - 1 - back] for back in (0, window, 2 * window))
        size = now.norm(dim=1).clamp(min=torch.finfo(now.dtype).tiny)
        change, earlier = (now - then).norm(dim=1) / size, (then - first).norm(dim=1) / size
        ratio = (change / earlier.clamp(min=1e-300)).clamp(max=_SLOWEST)
        return torch.where(change > 0, change * ratio / (1 - ratio), 0.0)

    def _keep(self, X: Tensor, P: Tensor) -> None:
        now, alone = time.monotonic(), not ranks.several()
        if self.keep is not None and ((alone and asked()) or now - self._kept >= SECONDS):
            self.keep({"x": X, "p": P})
            self._kept = now
            if alone:
                stop_here("some steps of the solver")

    def steps(self, most: int) -> int:
        """How many products a run makes, at most so many, where steps cannot be looked at one by one."""
        self._start = time.monotonic()
        if self.rows is not None:
            return min(most, STEPS)
        if self.keep is None:
            return most
        return min(most, STEPS if self._each is None else max(1, int(_PATIENCE / max(self._each, 1e-9))))

    def _looks(self, X: Tensor, P: Tensor, steps: int) -> bool:
        if self.keep is not None:  # by rank 0's clock, for all take as many steps
            each = (time.monotonic() - self._start) / max(1, steps)
            self._each = float(ranks.same("the pace", torch.tensor([each]).double())[0])
        self._fewest = 1  # of many steps
        return self.look(X, P)

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
