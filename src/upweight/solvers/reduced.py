"""Conjugate gradients on what is left of a sparse system (`operators.eliminated`), by a way that is found as it goes.

Two things are not known before. Whether a unit diagonal helps: it does where rows say most about every column, and not
where columns are more than rows and the penalty holds most of them alone, and all alike, for then the plain matrix has
one eigenvalue for all that no row sees, and a scaled one as many as columns. And whether many right-hand sides should
share a space: where their own ways are short it costs more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.operators.eliminated import Eliminated
from upweight.solvers.block import descend_together
from upweight.solvers.recurrence import Progress, descend, norms

MANY = 32  # right-hand sides that may share a space
ALONE = 32  # steps of their own before they do
TRIED = 24  # steps after which the other scale is tried, for as many
LONG = 60  # steps that are expected in all, from which that pays


@dataclass
class Way:
    """The way of one solve, which may have several runs.

    Args:
        system: what is left of the system.
        larger: (k,) what turns ‖r‖ into units of the goal of ‖D r‖.
        shared: whether right-hand sides may share a space.
        tried: whether both scales were tried.
        past: what was left after every step of this run, the largest of all right-hand sides, in units of the goal.
    """

    system: Eliminated
    larger: Float[Tensor, " k"]
    shared: bool
    tried: bool = False
    past: list[float] = field(default_factory=list)

    @property
    def many(self) -> bool:
        """Whether right-hand sides share a space if their own ways are long."""
        return self.shared and len(self.larger) >= MANY

    def run(
        self,
        R: Float[Tensor, "k p"],
        goal: Float[Tensor, " k"],
        steps: int,
        direction: Float[Tensor, "k p"] | None,
        watch: Callable[[Tensor], None],
    ) -> Progress:
        """Steps towards (C + λI) x = r; x is of all columns, in the units of θ, what is left of r in those of D r.

        Args:
            R: the right-hand sides.
            goal: of ‖D r‖.
            steps: products at most.
            direction: that of an earlier run to go on from.
            watch: is told the norms of the residuals after every product.
        """

        def seen(left: Tensor) -> None:
            self.past.append(float((left / goal.clamp(min=1e-300)).max()))
            watch(left)

        system, side = self.system, self.system.side(R)
        along = None if direction is None else system.taken_from(direction)
        self.past = [float((norms(side.middle, system.weights) / goal.clamp(min=1e-300)).max())]
        start = Progress(torch.zeros_like(side.middle), side.middle, side.middle, 0, torch.full_like(goal, torch.inf))
        undecided = system.wide and not self.tried and not self.many
        first = min(steps, ALONE if self.many else TRIED if undecided else steps)
        run = self._further(start, goal, first, along, seen)
        if undecided and run.steps == TRIED and self.expected > LONG:
            run = self._of_both_scales(start, run, goal, min(TRIED, steps - TRIED), seen)
        if run.stopped is None and run.steps < steps and self.past[-1] > 1:
            run = self._further(run, goal, steps - run.steps, run.direction, seen)
        weights = self.system.weights
        return replace(
            run,
            x=system.whole(side, run.x),
            residual=system.spread_out(run.residual if weights is None else run.residual * weights),
            direction=system.spread_out(run.direction),
        )

    def _further(
        self, run: Progress, goal: Tensor, steps: int, direction: Tensor | None, watch: Callable[[Tensor], None]
    ) -> Progress:
        """So many steps more."""
        if steps <= 0:
            return run
        system = self.system
        scale = system.scale.repeat(system.shape[1])
        known = (system.product, system.preconditioner, run.x, run.residual, goal, steps)
        if self.many and run.steps:
            more = descend_together(*known, weights=system.weights, watch=watch)
            more = replace(more, smallest=run.smallest)  # that of the shared space is in other units
        else:
            more = descend(
                *known,
                direction,
                scale=scale,
                weights=system.weights,
                besides=lambda R: norms(R, 1 / scale) * self.larger,  # ‖r‖/‖v‖
                watch=watch,
            )
        return replace(more, steps=run.steps + more.steps, smallest=torch.minimum(run.smallest, more.smallest))

    def _of_both_scales(
        self, start: Progress, run: Progress, goal: Tensor, most: int, watch: Callable[[Tensor], None]
    ) -> Progress:
        """The run, or as many steps with the other scale where they come further."""
        self.tried, own, left = True, self.system, self.past[-1]
        self.system = replace(own, even=True)
        other = self._further(start, goal, most, None, watch)
        steps = run.steps + other.steps
        if other.stopped is None and self.past[-1] < left:
            return replace(other, steps=steps)
        self.system, self.past[-1] = own, left
        return replace(run, steps=steps)

    @property
    def expected(self) -> float:
        """How many steps there will be, by the pace of the later half of those that were made."""
        made = len(self.past) - 1
        half, left = (made + 1) // 2, self.past[-1]
        if left <= 1:
            return float(made)
        gained = math.log(self.past[half] / left)
        return made + math.log(left) * (made - half) / gained if gained > 0 else math.inf
