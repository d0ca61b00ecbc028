"""The checkpoints of one training run: an Influence for each, and TracIn, which follows the run without curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.adapters import explain
from upweight.errors import InvalidInput, first_line
from upweight.influence import baselines
from upweight.influence.certificate import Certificate
from upweight.influence.face import Influence
from upweight.influence.scores import Scores, SelfScores, called, naming
from upweight.model import layers, per_row
from upweight.training.ensembles import same_rows


@dataclass(frozen=True)
class TracIn:
    """Gradient products summed over the checkpoints of one training run, each times its learning rate.

        values[q, i] = Σ_c η_c wᵢ ∇L(z_q, θ_c) · ∇L(zᵢ, θ_c)

    The unit, here and nowhere else: one plain gradient step of size η on row i alone changes the query's loss by about
    −η ∇L_q · ∇Lᵢ, so `values` is the fall of the query's loss that one such step per checkpoint earns. Positive means
    that the row helped. It is no prediction of a retraining: no curvature carries a step to the end of the run, the
    steps were really shared by a batch of b rows (over b), taken several times between two checkpoints (times their
    number), and with momentum β worth 1/(1 − β) of plain ones. Whatever such factors the rates leave out, all rows
    share, so rankings do not see them and `agreement` refuses these scores.

    Cost: one sweep of a forward and a backward pass per checkpoint. Curvature and solver of the members are not used.

    Args:
        members: one Influence per checkpoint, as `checkpoints` makes them; the last is the trained model.
        learning_rates: η_c, one per checkpoint, the rate in force there.

    Raises:
        InvalidInput: if rows differ between members, or the rates are not one finite number ≥ 0 for each.

    References: Pruthi et al. (2020), TracInCP.
    """

    members: Sequence[Influence]
    learning_rates: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", same_rows(self.members))
        object.__setattr__(self, "learning_rates", _checked_rates(self.learning_rates, len(self.members)))

    def on_loss(self, Xq: Any, yq: Any = None) -> Scores:
        """The fall of each query's loss that is credited to each training row."""
        last = self.members[-1]
        total = np.zeros(())
        certificates = []
        for member, rate in zip(self.members, self.learning_rates, strict=True):
            queries = member.queries((Xq, yq))
            total = total + rate * baselines.dots(member.system, queries)
            certificates.append(self._certificate(member, len(queries)))
        queries = last.queries((Xq, yq))
        return Scores(
            total,
            self._counterfactual,
            np.arange(last.n),
            last.n,
            Certificate.averaged(certificates),
            measure=last.objective.measure,
            query_values=per_row.measures(last.sweep.over(last.objective, queries)),
            **naming(last.examples.names, queries.names),
        )

    def of_self(self, rows: Any = None) -> SelfScores:
        """Σ_c η_c wᵢ ‖∇L(zᵢ, θ_c)‖²: what each row earned on its own loss; large for mislabelled and rare rows."""
        last = self.members[-1]
        rows = last.examples.rows(rows)
        total = sum(
            rate * self._squares(member, rows) for member, rate in zip(self.members, self.learning_rates, strict=True)
        )
        known = Certificate.averaged([self._certificate(member, len(rows)) for member in self.members])
        names = None if last.examples.names is None else last.examples.names.take(rows)
        own = {"ids": None if names is None else names.values, "axis": called(names)}
        return SelfScores(np.asarray(total), rows, last.n, known, None, counterfactual=self._counterfactual, **own)

    @property
    def _counterfactual(self) -> str:
        return f"none: one step on the row alone left out at each of {len(self.members)} checkpoints (TracIn)"

    def _certificate(self, member: Influence, queries: int) -> Certificate:
        return Certificate.unsolved(queries, member.objective.coverage, "dot products of gradients times learning rate")

    @staticmethod
    def _squares(member: Influence, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        objective = member.objective
        return member.sweep.emit(
            lambda batch, weights: layers.squares(objective, batch).cpu() * weights,
            vectors=per_row.width(member.sweep),
            rows=rows,
            label="gradient norms",
        )


def checkpoints(
    model: torch.nn.Module, states: Iterable[Mapping[str, Any]], X: Any, y: Any = None, **settings: Any
) -> list[Influence]:
    """One Influence per state of a module: for `ensemble` or `TracIn`.

    The module itself is not changed: each state is loaded into a copy. Inputs are shared, weights are not.

    Args:
        model: the module, in the mode it should be explained in.
        states: state dicts of it; a generator that loads them one by one from disk will do.
        X: the training inputs, as for `explain`.
        y: the training targets.
        settings: the other arguments of `explain`: loss, penalty, curvature, solver, damping, …

    Raises:
        InvalidInput: if there is no state, or one does not fit the module.
    """
    if isinstance(states, Mapping):
        message = (
            f"states is one {type(states).__name__} of {len(states)} entries, and checkpoints wants several state "
            "dicts. Pass a list: [state] for a single one."
        )
        raise InvalidInput(message)
    members = list(_explained(model, states, X, y, settings))
    if not members:
        message = (
            f"states holds 0 state dicts of {type(model).__name__}, so there is nothing to explain. Was a generator "
            "used up? Pass a list of what model.state_dict() gave."
        )
        raise InvalidInput(message)
    return members


def _explained(
    model: torch.nn.Module, states: Iterable[Mapping[str, Any]], X: Any, y: Any, settings: Mapping[str, Any]
) -> Iterator[Influence]:
    """The influences, one state after the other.

    Raises:
        InvalidInput: if a state does not fit.
    """
    for number, state in enumerate(states):
        copy = deepcopy(model)
        try:
            copy.load_state_dict(state)
        except (RuntimeError, TypeError, KeyError, AttributeError) as error:
            reasons = " ".join(str(error).split())[:300] or first_line(error)
            message = (
                f"State {number} does not fit {type(model).__name__} ({reasons}). Pass what model.state_dict() gave "
                "during the training of this module, not an optimizer's state or a whole file's dict."
            )
            raise InvalidInput(message) from error
        yield explain(copy, X, y, **settings)


def _checked_rates(rates: Any, members: int) -> tuple[float, ...]:
    """One finite number ≥ 0 per checkpoint.

    Raises:
        InvalidInput: if they are anything else.
    """
    try:
        array = np.asarray(list(rates), dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"learning_rates={rates!r} are no numbers ({first_line(error)}). Pass one per checkpoint, such as "
        raise InvalidInput(message + f"[0.1] * {members}.") from error
    if array.shape != (members,) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        values = f" and values from {array.min():g} to {array.max():g}" if array.size else ""
        message = (
            f"learning_rates has shape {array.shape}{values}, and there are {members} checkpoints. Each needs the rate "
            "in force there, one number, finite, ≥ 0 and not all 0: the scheduler's get_last_lr()[0], or "
            f"[1.0] * {members} for equal ones."
        )
        raise InvalidInput(message)
    return tuple(float(rate) for rate in array)
