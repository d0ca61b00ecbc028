"""From which step on a training is differentiated: the earliest from which the derivative predicts real trainings.

The judges are training rows: their losses at the end are predicted and measured, by weights of all rows that are moved
at random and trainings from the step on. No query has a say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from upweight.errors import NotLocal
from upweight.runs.progress import bar
from upweight.training.backwards import Backwards
from upweight.training.locality import SIZES, Locality, Moved, draws_for

ROWS = 8  # whose losses judge
PARTS = (0.0, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3)  # of the training, that are left out
MOST = 10.0  # times that an adjoint may grow on its way back
AGREES, SLOPE = 0.95, 1.25  # what they must show, if any step does: more than is asked of queries, which are others


@dataclass(frozen=True)
class Choice:
    """A step, and why it was chosen.

    Args:
        since: the first step that is differentiated.
        tried: what was found of it and of earlier ones, in words, by their numbers.
        moved: the trainings from it on that judged.
    """

    since: int
    tried: dict[int, str]
    moved: Moved = field(repr=False)

    def __str__(self) -> str:
        earlier = "; ".join(f"from {step} on {told}" for step, told in self.tried.items() if step != self.since)
        first = f"steps from {self.since} on, as {ROWS} training rows say ({self.tried[self.since]})"
        return f"{first}; {earlier}" if earlier else first


def chosen(way: Backwards) -> Choice:
    """The earliest of a few steps from which on the derivative holds, and the adjoint grows tenfold at most.

    It should hold with a margin, for queries are other rows: a correlation of 0.95 and a slope within 0.8 and
    1.25, for changes of all three sizes. If it does from no step, the earliest is taken from which it holds at all.

    Cost: the way back for eight rows, four trainings for each step that is refused, and twelve from each other.

    Raises:
        NotLocal: if it holds from none of them.
    """
    length, examples = len(way.trajectory), way.influence.examples
    rows = examples.subset(examples.spread(ROWS))
    measured = way.influence.objective
    steps = sorted({int(length * part) for part in PARTS})
    known: dict[int, tuple[NDArray[np.float64], float]] = {}
    grown: dict[int, str] = {}
    end = way.at_the_end(measured, rows)
    with bar(length, "choosing the first step", way.influence.sweep.progress, unit="step") as done:
        for state in way.back(end, 0):
            done(1)
            if not state.largest <= MOST:
                grown = {step: f"the adjoint grew {state.largest:.3g}-fold" for step in steps if step <= state.step}
                break
            if state.step in steps:
                known[state.step] = (state.values.copy(), state.growth)
    tried = dict(grown)
    holding: list[Moved] = []
    for step in sorted(known):
        moved = Moved(way, step)

        def compared(sizes: tuple[float, ...], moved: Moved = moved) -> Locality:
            values, growth = known[moved.since]
            return moved.compared(measured, rows, values, growth, draws_for(len(rows)), sizes)

        found = compared(SIZES[-1:])
        found = compared(SIZES) if found.holds else found
        tried[step] = _told(found)
        if found.holds:
            holding.append(moved)
        if found.agrees(AGREES, SLOPE):
            return Choice(step, tried, moved)
    if holding:
        return Choice(holding[0].since, tried, holding[0])
    message = (
        "The derivative through this training is not what small changes of the weights do, from whatever step on: "
        f"{'; '.join(f'from {step} on {why}' for step, why in sorted(tried.items()))}. The steps were too large or too "
        "many for it. Use scores at the end of training, uw.explain(model, …); or name the step, uw.through(recording, "
        f"since={steps[-1]}), and on_loss(…, check=False), to see the numbers."
    )
    raise NotLocal(message)


def _told(found: Locality) -> str:
    worst = int(np.argmin(np.nan_to_num(found.correlation, nan=-1.0)))
    return f"±{found.sizes[worst]:g}: r = {found.correlation[worst]:.2f}, slope = {found.slope[worst]:.2f}"
