"""The derivative of what a training found by the weight of every row in it, backwards through its own steps.

With θ_{t+1}, m_{t+1} = move(θ_t, m_t, g_t) and g_t = Σ_{i in batch t} uᵢ wᵢ ∇L(zᵢ, θ_t) / D_t + ∇r(θ_t), all uᵢ = 1,

    values[q, i] = −∂f_q(θ_T)/∂uᵢ

is the predicted change of query q's measure had row i had no weight in this training: batches, their denominators D_t,
their order and the first parameters stay as they were. No minimum is assumed, and no curvature is inverted.
Reference: Hara, Nitanda and Maehara (2019), "Data cleansing for models trained with SGD"; Bae et al. (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters import explain
from upweight.errors import InvalidInput, NotLocal, checked_count
from upweight.influence.certificate import Certificate
from upweight.influence.face import Influence
from upweight.influence.scores import Scores, naming
from upweight.model import calculus, per_row
from upweight.model.objective import Objective
from upweight.model.transforms import undisturbed
from upweight.runs.progress import bar
from upweight.training.going import Going, kept_in
from upweight.training.locality import Locality, correlation_of
from upweight.training.moves import Memory, back_through, joined, shrunk, slopes
from upweight.training.recording import Recording, Step, flat

REPLAYED = 1e-2  # of the way between two states that were kept: by how much steps made again may miss the second
SIZES = (1e-3, 1e-2, 1e-1)  # by how much weights are moved in the check
_ROUNDINGS = 4  # of every parameter, that a step may take
_PAIRS = 6  # of predicted and actual changes at least, for a correlation that says something


@dataclass(frozen=True)
class Through:
    """Scores through a recorded training, made by `through`.

    Args:
        recording: the training.
        influence: the trained model on the same rows: who reads queries.
        since: the first step that is differentiated; weights in steps before it are taken to have no effect.
        second_moment: "fixed", or "through" for the derivative of Adam's second moment too.
    """

    recording: Recording = field(repr=False)
    influence: Influence
    since: int
    second_moment: str

    def on_loss(self, Xq: Any, yq: Any = None, *, check: bool = True, store: Any = None) -> Scores:
        """The change of each query's loss had a row had no weight in this training.

        Cost: the steps once more, and for each step and query one double backward pass of its batch; the check six
        trainings from `since` on, of fewer than six queries more: six pairs of changes are compared at least.

        Args:
            Xq: the queries' inputs.
            yq: the queries' targets.
            check: whether to move weights at random, train again and refuse an answer that does not predict it.
            store: a folder in which the way back is kept every minute, so that the same call goes on there after
                whatever ended it; None keeps nothing.

        Raises:
            NotLocal: if the derivative does not predict what small changes of the weights really do.
            InvalidInput: if the steps, made again, do not lead where the training went.
        """
        queries = self.influence.queries((Xq, yq))
        return self._scores(self.influence.objective, queries, check, store)

    def on_measure(
        self,
        measure: Callable[[Any, Any], Tensor],
        Xq: Any,
        yq: Any = None,
        *,
        check: bool = True,
        store: Any = None,
    ) -> Scores:
        """The same for any scalar measure(params, example) of a query."""
        queries = self.influence.system.encoder.examples(Xq, yq)
        return self._scores(self.influence.objective.measuring(measure), queries, check, store)

    def locality(self, Xq: Any, yq: Any = None, *, draws: int = 2, seed: int = 0) -> Locality:
        """What small changes of all weights really do to these queries, beside what the derivative predicts.

        Cost: 2 · draws trainings for each of three sizes, from `since` on, and the scores.

        Raises:
            InvalidInput: if draws is no positive whole number.
        """
        checked_count(draws, "draws")
        queries = self.influence.queries((Xq, yq))
        measured = self.influence.objective
        values, growth = self._values(measured, queries)
        return self.checked(measured, queries, values, growth, draws, seed)

    # ---- inner steps -------------------------------------------------------------------------------------------------

    def _scores(self, measured: Objective, queries: Any, check: bool, store: Any) -> Scores:
        values, growth = self._values(measured, queries, store)
        told = f"derivative through steps {self.since} to {self.length} of {self.recording.optimiser_name}"
        told += ", second moment fixed" if self.second_moment == "fixed" and self._adaptive else ""
        if check:
            draws = -(-_PAIRS // len(queries))
            found = self.checked(measured, queries, values, growth, draws, 0)
            if not found.holds:
                message = (
                    f"The derivative through this training is not what small changes of the weights do: {found}. The "
                    "steps were too large or too many for it. Use scores at the end of training, uw.explain(model, …); "
                    f"later steps alone, uw.through(recording, since={self._later}); or on_loss(…, check=False) to see "
                    "the numbers."
                )
                raise NotLocal(message)
            told = f"{told}; {found}"
        return Scores(
            values,
            "row without weight in this training",
            np.arange(self.influence.n),
            self.influence.n,
            Certificate.unsolved(len(queries), self.influence.objective.coverage, told),
            measure=measured.measure,
            query_values=per_row.measures(self.influence.sweep.over(measured, queries)),
            **naming(self.influence.examples.names, queries.names),
        )

    @property
    def length(self) -> int:
        """How many steps the training had."""
        return len(self.recording.steps)

    @property
    def _later(self) -> int:
        return self.since + max(1, (self.length - self.since) // 2)

    @property
    def _adaptive(self) -> bool:
        return len(self.recording.rule.state) > 1

    @cached_property
    def _names(self) -> list[str]:
        return list(self.influence.objective.blocks)

    def _begun(self, at: int) -> tuple[Tensor, Memory]:
        """θ and the memory that were kept before a step."""
        state = self.recording.states[at]
        memory = [
            {name: state.memory[name][slot] for name in self._names} for slot in range(len(self.recording.rule.state))
        ]
        return flat(state.parameters, self._names), tuple(flat(slot, self._names) for slot in memory)

    def _gradient(
        self, step: Step, theta: Tensor, moved: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[NDArray[np.int64], Tensor]]]:
        """g_t with its graph in θ and in the weights u of its rows, and these."""
        objective, examples = self.influence.objective, self.influence.examples
        total, weights = theta.new_zeros(()), []
        params = objective.unravel(theta)
        for part in step.parts:
            own = torch.from_numpy(examples.weights[part.rows])
            u = torch.ones(len(part.rows), dtype=torch.float64) if moved is None else moved[torch.from_numpy(part.rows)]
            u = u.clone().requires_grad_()
            losses = calculus.losses_at(objective, params, examples.batch(part.rows)).double()
            total = total + part.scale * (u * own * losses).sum() / self._denominator(own)
            weights.append((part.rows, u))
        if objective.penalty is not None:
            total = total + objective.penalty(params).double()  # type: ignore[operator]
        return calculus.with_graph(total, theta), weights

    def _denominator(self, own: Tensor) -> float:
        """What the criterion divides a batch's sum by."""
        return 1.0 if getattr(self.recording.loss, "reduction", "mean") == "sum" else float(own.sum())

    def _settings(self, step: Step) -> Any:
        objective = self.influence.objective
        sizes = [block.numel() for block in objective.blocks.values()]
        return joined(step.groups, [self.recording.group_of[name] for name in self._names], sizes)

    def _moved(self, step: int, theta: Tensor, memory: Memory, g: Tensor) -> tuple[Tensor, Memory]:
        """The optimiser's step by a gradient that has been clipped."""
        settings = self._settings(self.recording.steps[step])
        fixed = self.second_moment == "fixed"
        return self.recording.rule.move(theta, memory, g, settings, step + 1, fixed)

    def _ahead(self, step: int, theta: Tensor, memory: Memory, moved: Tensor | None = None) -> tuple[Tensor, Memory]:
        """θ and the memory after a step, without a graph."""
        leaf = theta.detach().clone().requires_grad_()
        g, _ = self._gradient(self.recording.steps[step], leaf, moved)
        with torch.no_grad():
            return self._moved(step, theta, memory, g.detach() * shrunk(g.detach(), self.recording.clip))

    def _segments(self) -> Iterator[tuple[int, int]]:
        """From state to state, the last first, as far back as `since`."""
        ends = sorted(self.recording.states)
        for start, stop in reversed(list(pairwise(ends))):
            if stop > self.since:
                yield start, stop

    def _values(self, measured: Objective, queries: Any, store: Any = None) -> tuple[NDArray[np.float64], float]:
        """The scores, and how much the adjoint grew."""
        work = {
            "through": self.recording.digest,
            "steps": [self.since, self.length],
            "second_moment": self.second_moment,
            "clip": self.recording.clip,
            "data": self.influence.examples.fingerprint(),
            "queries": queries.fingerprint(),
            "measure": measured.measure,
        }
        size = (1 + len(self.recording.rule.state)) * self.influence.objective.size + self.influence.n
        with kept_in(store, work, 2 * 8 * len(queries) * size) as kept:
            state = kept.begun(self.at_the_end(measured, queries), self.influence.system)
            with bar(
                state.step - self.since, "back through the training", self.influence.sweep.progress, unit="step"
            ) as done:
                for at in self.backwards(state):
                    done(state.step - at.step)
                    state = at
                    kept.passed(state)
            kept.ended(state)
        return state.values, state.growth

    @undisturbed()
    def at_the_end(self, measured: Objective, queries: Any) -> Going:
        """The adjoints of the last parameters: the gradients of the queries."""
        final, _ = self._begun(self.length)
        a = per_row.gradients(self.influence.sweep.over(measured.at(final), queries)).clone()
        b = [torch.zeros_like(a) for _ in self.recording.rule.state]
        return Going(self.length, a, b, np.zeros((len(a), self.influence.n)), a.norm(dim=1), 1.0, 1.0)

    def backwards(self, state: Going) -> Iterator[Going]:
        """What is known before every step, from where it is back to `since`; values are of the steps from there on."""
        for start, stop in self._segments():
            if start >= state.step:
                continue
            with undisturbed():
                path = self._path(start, stop)[: state.step - start]
            for step in reversed(range(max(start, self.since), min(stop, state.step))):
                with undisturbed():
                    a, b = self._back(step, *path.pop(), state.a, state.b, state.values)
                state = state.back(step, a, b)
                yield state

    def _path(self, start: int, stop: int) -> list[tuple[Tensor, Memory]]:
        """θ and the memory before every step from one kept state to the next.

        Raises:
            InvalidInput: if the steps lead elsewhere.
        """
        place, path = self._begun(start), []
        for step in range(start, stop):
            path.append(place)
            place = self._ahead(step, *place)
        (begun, _), (ended, _) = self._begun(start), self._begun(stop)
        missed, way = float((place[0] - ended).norm()), float((ended - begun).norm())
        rounded = _ROUNDINGS * (stop - start) * self.recording.rounding * float(ended.norm())
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

    def _back(
        self, step: int, theta: Tensor, memory: Memory, a: Tensor, b: list[Tensor], values: NDArray[np.float64]
    ) -> tuple[Tensor, list[Tensor]]:
        """The adjoints before a step from those after it; what the step adds to the scores goes to `values`."""
        leaf = theta.detach().clone().requires_grad_()
        g, weights = self._gradient(self.recording.steps[step], leaf)
        at = g.detach().clone().requires_grad_()
        shrinking = shrunk(at, self.recording.clip)
        (bent,) = (
            calculus.pulled([shrinking], [at], [torch.ones_like(shrinking)]) if shrinking.requires_grad else (None,)
        )
        share = shrinking.detach()
        inputs = [one.detach().clone().requires_grad_() for one in (theta, *memory, share * at)]
        with torch.enable_grad():
            after, remembered = self._moved(step, inputs[0], tuple(inputs[1:-1]), inputs[-1])
        own, *slots, onto = back_through(slopes([after, *remembered], inputs), [a, *b])
        onto = share * onto if bent is None else share * onto + (onto @ at.detach())[:, None] * bent
        rows = [u for _, u in weights]
        for query in range(len(a)):
            back, *by_row = calculus.pulled([g], [leaf, *rows], [onto[query]])
            own[query] += back
            for (numbers, _), part in zip(weights, by_row, strict=True):
                np.subtract.at(values[query], numbers, part.numpy())
        return own, slots

    @undisturbed()
    def checked(
        self, measured: Objective, queries: Any, values: NDArray[np.float64], growth: float, draws: int, seed: int
    ) -> Locality:
        """Trainings with all weights moved at random, beside what the values predict of them."""
        draw = np.random.default_rng(seed)
        signs = draw.choice([-1.0, 1.0], size=(draws, self.influence.n))
        predicted = -values @ signs.T  # (q, draws) for ε = 1
        correlation, slope = [], []
        for size in SIZES:
            actual = np.stack([self._difference(measured, queries, size * one) for one in signs], 1) / size
            correlation.append(correlation_of(predicted, actual))
            slope.append(float((predicted * actual).sum() / max((predicted**2).sum(), 1e-300)))
        return Locality(np.array(SIZES), np.array(correlation), np.array(slope), growth)

    def _difference(self, measured: Objective, queries: Any, moves: NDArray[np.float64]) -> NDArray[np.float64]:
        """(f(1 + moves) − f(1 − moves))/2 of trainings from `since` on."""
        sides = [self._ended(torch.from_numpy(1.0 + sign * moves)) for sign in (1.0, -1.0)]
        above, below = (per_row.measures(self.influence.sweep.over(measured.at(end), queries)) for end in sides)
        return (above - below) / 2

    def _ended(self, weights: Tensor) -> Tensor:
        """Where the training ends with other weights in the steps that are differentiated."""
        start = max(at for at in self.recording.states if at <= self.since)
        place = self._begun(start)
        for step in range(start, self.length):
            place = self._ahead(step, *place, weights if step >= self.since else None)
        return place[0]


def through(
    recording: Recording, *, since: int | None = None, second_moment: str = "fixed", **settings: Any
) -> Through:
    """Scores through a recorded training.

    Args:
        recording: the training, which has ended.
        since: the first step that is differentiated. None takes the first for SGD, and a third of the way for Adam and
            AdamW, whose second moment is almost empty before.
        second_moment: "fixed" takes Adam's second moment as it was; "through" differentiates it too, which is exact
            and mostly noise.
        settings: of the Influence that reads queries, such as progress or batch_size.

    Raises:
        InvalidInput: if nothing was recorded, or an option is another one.

    >>> import torch, upweight as uw
    >>> X, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with uw.Recording(model, optimizer, X, y, loss=torch.nn.functional.cross_entropy) as recording:
    ...     for rows in torch.arange(20).split(5):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
    ...         recording.batch(rows)
    ...         optimizer.step()
    >>> uw.through(recording).on_loss(X[:2], y[:2]).values.shape
    (2, 20)
    """
    length = len(recording.steps)
    if not length:
        message = (
            "The recording holds no step. Put the training inside `with recording:`, with recording.batch(rows) before "
            "every optimizer.step()."
        )
        raise InvalidInput(message)
    if second_moment not in ("fixed", "through"):
        message = f"second_moment={second_moment!r}. Pass 'fixed' or 'through'."
        raise InvalidInput(message)
    if since is None:
        since = length // 3 if len(recording.rule.state) > 1 else 0
    if not isinstance(since, int) or isinstance(since, bool) or not 0 <= since < length:
        message = f"since={since!r}. It is the number of a step, from 0 to {length - 1}."
        raise InvalidInput(message)
    influence = explain(
        recording.copied(),
        recording.X,
        recording.y,
        loss=recording.loss,
        penalty=recording.penalty,
        parameters=recording.moving,
        **{**recording.settings, **settings},
    )
    return Through(recording, influence, since, second_moment)
