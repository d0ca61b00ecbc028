"""The way back through a recorded training: its steps made again, and their adjoints.

With θ_{t+1}, m_{t+1} = move(θ_t, m_t, g_t) and g_t = Σ_{i in batch t} uᵢ wᵢ ∇L(zᵢ, θ_t) / D_t + c(u) ∇r(θ_t), all
uᵢ = 1, the adjoints a_t = ∂f(θ_T)/∂θ_t and b_t = ∂f(θ_T)/∂m_t go backwards through `move`, and where they meet g_t

    a_t  +=  ∂(a_g · g_t)/∂θ_t,        values[q, i]  −=  a_g · ∂g_t/∂uᵢ

Reference: Hara, Nitanda and Maehara (2019), "Data cleansing for models trained with SGD"; Bae et al. (2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.influence.face import Influence
from upweight.model import attention_twice, calculus, per_row
from upweight.model.objective import Objective
from upweight.model.transforms import undisturbed
from upweight.runs import threads
from upweight.training.going import Going
from upweight.training.moves import Memory, back_through, joined, shrunk, slopes
from upweight.training.trajectory import Step, Trajectory

REPLAYED = 1e-2  # of the way between two states that were kept: by how much steps made again may miss the second
_ROUNDINGS = 4  # of every parameter, that a step may take

Rows = NDArray[np.int64] | None  # of a weight's derivative; None where all rows share in it, as in a penalty


@dataclass(frozen=True)
class Backwards:
    """The way back along a trajectory, for any queries.

    Args:
        trajectory: the training.
        influence: the trained model on its rows.
        fixed: whether Adam's second moment is taken as it was.
    """

    trajectory: Trajectory
    influence: Influence
    fixed: bool

    def at_the_end(self, measured: Objective, queries: Any) -> Going:
        """The adjoints of the last parameters: the gradients of the queries."""
        with undisturbed():
            final, _ = self.begun(len(self.trajectory))
            a = per_row.gradients(self.influence.sweep.over(measured.at(final), queries)).clone()
            b = [torch.zeros_like(a) for _ in self.trajectory.rule.state]
            values = np.zeros((len(a), self.influence.n))
            return Going(len(self.trajectory), a, b, values, a.norm(dim=1), 1.0, 1.0)

    def back(self, state: Going, since: int) -> Iterator[Going]:
        """What is known before every step, from where it is back to `since`; values are of the steps from there on."""
        for start, stop in self.trajectory.segments(since):
            if start >= state.step:
                continue
            with undisturbed():
                path = self._path(start, stop)[: state.step - start]
            for step in reversed(range(max(start, since), min(stop, state.step))):
                with undisturbed():
                    a, b = self._step_back(step, *path.pop(), state.a, state.b, state.values)
                state = state.back(step, a, b)
                yield state

    def ended(self, weights: Tensor, since: int) -> Tensor:
        """Where the training ends with other weights in the steps from `since` on."""
        with undisturbed():
            start = max(at for at in self.trajectory.states if at <= since)
            place = self.begun(start)
            for step in range(start, len(self.trajectory)):
                place = self._ahead(step, *place, weights if step >= since else None)
            return place[0]

    def begun(self, at: int) -> tuple[Tensor, Memory]:
        """θ and the memory that were kept before a step."""
        return self.trajectory.begun(at, self._names)

    # ---- inner steps -------------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> list[str]:
        return list(self.influence.objective.blocks)

    def _gradient(
        self, step: Step, theta: Tensor, moved: Tensor | None = None, *, graph: bool = True
    ) -> tuple[Tensor, list[Rows], list[Tensor]]:
        """g_t, with its graph in θ and in weights u if that is wanted, whose rows these are, and the u."""
        objective, examples = self.influence.objective, self.influence.examples
        total, rows, weights = theta.new_zeros(()), [], []
        params = objective.unravel(theta)
        for part in step.parts:
            own = torch.from_numpy(examples.weights[part.rows] if part.weights is None else part.weights)
            u = torch.ones_like(own) if moved is None else moved[torch.from_numpy(part.rows)]
            u = u.clone().requires_grad_()
            with attention_twice.bent():
                losses = calculus.losses_at(objective, params, examples.batch(part.rows)).double()
            mean = part.weights is None and not self.trajectory.summed
            total = total + part.scale * (u * own * losses).sum() / (float(own.sum()) if mean else 1.0)
            rows.append(part.rows)
            weights.append(u)
        if objective.penalty is not None:
            factor = self._factor(theta, moved)
            total = total + factor * objective.penalty(params).double()  # type: ignore[operator]
            if self.trajectory.shares is not None:
                rows.append(None)
                weights.append(factor)
        g = (
            calculus.with_graph(total, theta)
            if graph
            else calculus.pulled([total], [theta], [torch.ones_like(total)])[0]
        )
        return g, rows, weights

    def _factor(self, theta: Tensor, moved: Tensor | None) -> Tensor:
        """c(u): what the penalty is multiplied by."""
        shares = self.trajectory.shares
        if shares is None:
            return theta.new_ones(())
        every = torch.from_numpy(shares)
        return (every.sum() if moved is None else every @ moved).clone().requires_grad_()

    def _settings(self, step: Step) -> Any:
        objective = self.influence.objective
        sizes = [block.numel() for block in objective.blocks.values()]
        return joined(step.groups, [self.trajectory.group_of[name] for name in self._names], sizes)

    def _moved(self, step: int, theta: Tensor, memory: Memory, g: Tensor) -> tuple[Tensor, Memory]:
        """The optimiser's step by a gradient that has been clipped."""
        settings = self._settings(self.trajectory.steps[step])
        return self.trajectory.rule.move(theta, memory, g, settings, step + 1, self.fixed)

    def _ahead(self, step: int, theta: Tensor, memory: Memory, moved: Tensor | None = None) -> tuple[Tensor, Memory]:
        """θ and the memory after a step, without a graph."""
        leaf = theta.detach().clone().requires_grad_()
        g, _, _ = self._gradient(self.trajectory.steps[step], leaf, moved, graph=False)
        with torch.no_grad():
            return self._moved(step, theta, memory, g * shrunk(g, self.trajectory.clip))

    def _path(self, start: int, stop: int) -> list[tuple[Tensor, Memory]]:
        """θ and the memory before every step from one kept state to the next.

        Raises:
            InvalidInput: if the steps lead elsewhere.
        """
        place, path = self.begun(start), []
        for step in range(start, stop):
            path.append(place)
            place = self._ahead(step, *place)
        (begun, _), (ended, _) = self.begun(start), self.begun(stop)
        missed, way = float((place[0] - ended).norm()), float((ended - begun).norm())
        rounded = _ROUNDINGS * (stop - start) * self.trajectory.rounding * float(ended.norm())
        if not missed <= REPLAYED * way + rounded:
            message = (
                f"Steps {start} to {stop}, made again from the rows and settings that were recorded, end {missed:.2g} "
                f"off, and went {way:.2g}. Usual reasons: recording.batch() named other rows than the loss was of, or "
                "another scale; gradients were clipped or changed before the step, which clip= does not tell; a "
                "penalty in the loss that penalty= does not tell; another criterion than loss=; random layers. "
                "Correct what uw.Recording was told, and train once more."
            )
            raise InvalidInput(message)
        return path

    def _step_back(
        self, step: int, theta: Tensor, memory: Memory, a: Tensor, b: list[Tensor], values: NDArray[np.float64]
    ) -> tuple[Tensor, list[Tensor]]:
        """The adjoints before a step from those after it; what the step adds to the scores goes to `values`."""
        leaf = theta.detach().clone().requires_grad_()
        g, rows, weights = self._gradient(self.trajectory.steps[step], leaf)
        at = g.detach().clone().requires_grad_()
        shrinking = shrunk(at, self.trajectory.clip)
        (bent,) = (
            calculus.pulled([shrinking], [at], [torch.ones_like(shrinking)]) if shrinking.requires_grad else (None,)
        )
        share = shrinking.detach()
        inputs = [one.detach().clone().requires_grad_() for one in (theta, *memory, share * at)]
        with torch.enable_grad():
            after, remembered = self._moved(step, inputs[0], tuple(inputs[1:-1]), inputs[-1])
        by_coordinate = slopes([after, *remembered], inputs)
        own, *slots = (torch.empty_like(one) for one in (a, *b))

        def one(query: int) -> None:
            *before, onto = back_through(by_coordinate, [one[query] for one in (a, *b)])
            onto = share * onto if bent is None else share * onto + (onto @ at.detach()) * bent
            back, *by_weight = calculus.pulled([g], [leaf, *weights], [onto])
            before[0] = before[0] + back
            for kept, line in zip((own, *slots), before, strict=True):
                kept[query] = line
            for numbers, part in zip(rows, by_weight, strict=True):
                self._credit(values[query], numbers, part.numpy())

        threads.each(len(a), one)
        return own, slots

    def _credit(self, values: NDArray[np.float64], rows: Rows, slope: NDArray[np.float64]) -> None:
        """Derivatives by weights u of a step, taken off the scores of the rows; a row may stand twice in a batch."""
        shares = self.trajectory.shares
        if rows is not None:
            np.subtract.at(values, rows, slope)
        elif shares is not None:
            values -= float(slope) * shares
