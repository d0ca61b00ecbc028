"""The derivative of what a training found by the weight of every row in it, backwards through its own steps.

    values[q, i] = −∂f_q(θ_T)/∂uᵢ

is the predicted change of query q's measure had row i had no weight in this training: batches, their denominators D_t,
their order and the first parameters stay as they were. No minimum is assumed, and no curvature is inverted. The steps
and their adjoints are those of `backwards`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput, NotLocal, checked_count
from upweight.influence.certificate import Certificate
from upweight.influence.face import Influence
from upweight.influence.scores import Scores, naming
from upweight.model import per_row
from upweight.model.objective import Objective
from upweight.runs.progress import bar
from upweight.training.backwards import Backwards
from upweight.training.choosing import Choice, chosen
from upweight.training.going import kept_in
from upweight.training.locality import Locality, Moved, draws_for
from upweight.training.recording import Recording
from upweight.training.trajectory import Trajectory


@dataclass(frozen=True)
class Through:
    """Scores through a recorded training, made by `through`.

    Args:
        trajectory: the training.
        influence: the trained model on the same rows: who reads queries.
        since: the first step that is differentiated; weights in steps before it are taken to have no effect.
        second_moment: "fixed", or "through" for the derivative of Adam's second moment too.
        choice: how `since` was chosen; None if it was named.
    """

    trajectory: Trajectory = field(repr=False)
    influence: Influence
    since: int
    second_moment: str
    choice: Choice | None = None

    def on_loss(self, Xq: Any, yq: Any = None, *, check: bool = True, store: Any = None) -> Scores:
        """The change of each query's loss had a row had no weight in this training.

        Cost: the steps once more, and for each step and query one double backward pass of its batch; the check six
        trainings from `since` on, of fewer than twelve queries more: twelve pairs of changes are compared at least.
        Where `since` was chosen, twelve of those trainings are there already.

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
        return Moved(self.way, self.since, seed).compared(measured, queries, values, growth, draws)

    # ---- inner steps -------------------------------------------------------------------------------------------------

    @property
    def way(self) -> Backwards:
        """The way back."""
        return Backwards(self.trajectory, self.influence, self.second_moment == "fixed")

    def _scores(self, measured: Objective, queries: Any, check: bool, store: Any) -> Scores:
        values, growth = self._values(measured, queries, store)
        length = len(self.trajectory)
        told = f"derivative through steps {self.since} to {length} of {self.trajectory.optimiser}"
        told += ", second moment fixed" if self.second_moment == "fixed" and self.trajectory.adaptive else ""
        told += "" if self.choice is None else f"; {self.choice}"
        if check:
            moved = Moved(self.way, self.since) if self.choice is None else self.choice.moved
            found = moved.compared(measured, queries, values, growth, draws_for(len(queries)))
            if not found.holds:
                later = self.since + max(1, (length - self.since) // 2)
                message = (
                    f"The derivative through this training is not what small changes of the weights do: {found}. The "
                    "steps were too large or too many for it. Use scores at the end of training, uw.explain(model, …); "
                    f"later steps alone, uw.through(recording, since={later}); or on_loss(…, check=False) to see the "
                    "numbers."
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

    def _values(self, measured: Objective, queries: Any, store: Any = None) -> tuple[NDArray[np.float64], float]:
        """The scores, and how much the adjoint grew."""
        trajectory = self.trajectory
        work = {
            "through": trajectory.digest,
            "steps": [self.since, len(trajectory)],
            "second_moment": self.second_moment,
            "clip": trajectory.clip,
            "data": self.influence.examples.fingerprint(),
            "queries": queries.fingerprint(),
            "measure": measured.measure,
        }
        size = (1 + len(trajectory.rule.state)) * self.influence.objective.size + self.influence.n
        with kept_in(store, work, 2 * 8 * len(queries) * size) as kept:
            state = kept.begun(self.way.at_the_end(measured, queries), self.influence.system)
            with bar(
                state.step - self.since, "back through the training", self.influence.sweep.progress, unit="step"
            ) as done:
                for at in self.way.back(state, self.since):
                    done(state.step - at.step)
                    state = at
                    kept.passed(state)
            kept.ended(state)
        return state.values, state.growth


def through(
    recording: Recording | Trajectory, *, since: int | None = None, second_moment: str = "fixed", **settings: Any
) -> Through:
    """Scores through a recorded training.

    Args:
        recording: the training, which has ended: a Recording, or one of `recorded`.
        since: the first step that is differentiated. None takes the earliest of a few (the first, a twelfth of the way,
            …, two thirds) from which the derivative predicts what trainings with other weights really do to eight
            training rows, by the check of `Locality`, and the adjoint grows tenfold at most; the certificate says which
            and why. It costs the way back for eight rows and twelve trainings or more.
        second_moment: "fixed" takes Adam's second moment as it was; "through" differentiates it too, which is exact
            and mostly noise.
        settings: of the Influence that reads queries, such as progress or batch_size.

    Raises:
        InvalidInput: if nothing was recorded, or an option is another one.
        NotLocal: if `since` is None, and the derivative holds from no step on.

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
    trajectory = recording.trajectory if isinstance(recording, Recording) else recording
    length = len(trajectory)
    if not length:
        message = (
            "The recording holds no step. Put the training inside `with recording:`, with recording.batch(rows) before "
            "every optimizer.step()."
        )
        raise InvalidInput(message)
    if length not in trajectory.states:
        message = (
            f"The recording has made {length} steps and has not ended: its last parameters are not known. Leave "
            "`with recording:` first."
        )
        raise InvalidInput(message)
    if second_moment not in ("fixed", "through"):
        message = f"second_moment={second_moment!r}. Pass 'fixed' or 'through'."
        raise InvalidInput(message)
    if since is not None and (not isinstance(since, int) or isinstance(since, bool) or not 0 <= since < length):
        message = f"since={since!r}. It is the number of a step, from 0 to {length - 1}; None chooses one."
        raise InvalidInput(message)
    influence = trajectory.reading(**settings)
    choice = None
    if since is None:
        choice = chosen(Backwards(trajectory, influence, second_moment == "fixed"))
        since = choice.since
    return Through(trajectory, influence, since, second_moment, choice)
