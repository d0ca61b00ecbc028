"""Several models of the same rows, explained as one: independent trainings, or the checkpoints of one training run.

    values = (1/m) Σ_c values of member c            change of the members' mean measure, row removed

One network is one draw of its training's chance, and so are its scores: the mean over several ranks rows better than
any of them. The spread over members says how much of a score was chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters.estimators.inputs import AsGiven
from upweight.data import markup
from upweight.data.arrays import as_tensor
from upweight.data.examples import PROBE_ROWS
from upweight.data.ids import same_names
from upweight.data.trees import leaves
from upweight.errors import InvalidInput
from upweight.influence.certificate import Certificate
from upweight.influence.face import Influence
from upweight.influence.scores import Scores, SelfScores


@dataclass(frozen=True)
class Ensemble:
    """The mean of several influences over the same training rows: predicted change of the members' mean measure.

        values = (1/m) Σ_c values_c,    standard_error = std over members / √m

    The standard error is the spread of the members: how far the mean over m other models would lie. It is not the
    error of the estimate against retraining. `certificate.members` holds one certificate per member, coverage and
    damping included; the certificate itself is the worst of them. Sample weights may differ, as in bagging; scores then
    have no `derivative`.

    Cost: the members', one after the other; memory for two (q, n) arrays, and what each member keeps prepared.

    Args:
        members: Influences of the same rows in the same order.

    Raises:
        InvalidInput: if there is none, or their rows differ.

    References: Søgaard et al. (2021); Park et al. (2023), on averaging over independently trained models.
    """

    members: Sequence[Influence]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", same_rows(self.members))

    @property
    def n(self) -> int:
        """The number of training rows."""
        return self.members[0].n

    def __len__(self) -> int:
        return len(self.members)

    def _repr_html_(self) -> str:
        members = [("members" if not place else "", repr(member)) for place, member in enumerate(self.members[:5])]
        more = f"… and {len(self) - 5} more" if len(self) > 5 else ""
        return markup.facts(f"Mean of {len(self)} models", [("rows", f"{self.n:,}"), *members], note=more)

    def __repr__(self) -> str:
        return f"Ensemble({len(self)} members, n={self.n}: {self.members[0]!r}, …)"

    def on_loss(self, Xq: Any, yq: Any = None) -> Scores:
        """The change of each query's loss, mean over the members, if a training row is removed; as `on_loss` of one."""
        return _mean(member.on_loss(Xq, yq) for member in self.members)

    def on_measure(self, measure: Callable[[Any, Any], Tensor], Xq: Any, yq: Any = None) -> Scores:
        """The same for any scalar measure(params, example) that every member can compute."""
        return _mean(member.on_measure(measure, Xq, yq) for member in self.members)

    def of_groups(self, groups: Any, *, on: Any) -> Scores:
        """The change of each query's loss if a whole group of rows is removed, to first order."""
        groups = groups if isinstance(groups, Mapping) else list(groups)
        return _mean(member.of_groups(groups, on=on) for member in self.members)

    def of_removing(self, groups: Any, *, on: Any) -> Scores:
        """The change of each query's loss by the removal's own Newton step; members need linear predictors."""
        groups = groups if isinstance(groups, Mapping) else list(groups)
        return _mean(member.of_removing(groups, on=on) for member in self.members)

    def of_self(self, rows: Any = None) -> SelfScores:
        """Each row's removal, measured on its own loss."""
        return _own(member.of_self(rows) for member in self.members)


def ensemble(members: Iterable[Influence]) -> Ensemble:
    """Several influences over the same training rows as one: scores are averaged, certificates kept; see Ensemble.

    Args:
        members: Influences of independently trained models, or of `checkpoints` of one run.

    >>> import upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = [[0.0], [1.0], [2.0]], [0.0, 2.0, 2.0]
    >>> members = [uw.explain(Ridge(alpha=alpha).fit(X, y), X, y) for alpha in (1.0, 2.0)]
    >>> ensemble(members).on_loss([[3.0]], [3.0]).values.round(3)
    array([[0.167, 0.222, 0.093]])
    """
    return Ensemble(list(members))


def _mean(parts: Iterable[Scores]) -> Scores:
    """The mean of members' scores and their spread, one member in memory at a time."""
    mean = Running()
    kept: list[Scores] = []
    for part in parts:
        if kept and (part.measure, part.counterfactual) != (kept[0].measure, kept[0].counterfactual):
            message = (
                f"Members measure different things: '{kept[0].measure}', {kept[0].counterfactual}, and "
                f"'{part.measure}', {part.counterfactual}. Average models of the same loss, or name one measure: "
                "on_measure(…)."
            )
            raise InvalidInput(message)
        mean.add(part.values, part.error)
        kept.append(replace(part, values=part.values[:0], standard_error=None, error=None))
    first = kept[0]
    now = [part.query_values for part in kept if part.query_values is not None]
    scales = [part.scale for part in kept]
    same = all(scale is not None and np.array_equal(scale, first.scale) for scale in scales)  # type: ignore[arg-type]
    return replace(
        first,
        values=mean.value,
        scale=first.scale if same else None,
        certificate=Certificate.averaged([part.certificate for part in kept]),
        query_values=np.mean(now, 0) if len(now) == len(kept) else None,
        standard_error=mean.standard_error(),
        error=mean.error,
    )


def _own(parts: Iterable[SelfScores]) -> SelfScores:
    mean = Running()
    kept = []
    for part in parts:
        mean.add(part.values)
        kept.append(part)
    scale = kept[0].scale
    same = all(part.scale is not None and np.array_equal(part.scale, scale) for part in kept)  # type: ignore[arg-type]
    return replace(
        kept[0],
        values=mean.value,
        scale=scale if same else None,
        certificate=Certificate.averaged([part.certificate for part in kept]),
        standard_error=mean.standard_error(),
    )


class Running:
    """Mean and spread of arrays that are seen one at a time (Welford), and the mean of their error estimates."""

    def __init__(self) -> None:
        self.count = 0
        self.value: NDArray[np.float64] = np.zeros(())
        self.squares: NDArray[np.float64] = np.zeros(())
        self.error: NDArray[np.float64] | None = np.zeros(())

    def add(self, values: NDArray[np.float64], error: NDArray[np.float64] | None = None) -> None:
        """One more array."""
        self.count += 1
        gap = values - self.value
        self.value = self.value + gap / self.count
        self.squares = self.squares + gap * (values - self.value)
        if error is None or self.error is None:
            self.error = None
        else:
            self.error = self.error + (error - self.error) / self.count

    def standard_error(self) -> NDArray[np.float64] | None:
        """std / √m; None for a single array."""
        return None if self.count < 2 else np.sqrt(self.squares / (self.count - 1) / self.count)


def same_rows(members: Any) -> tuple[Influence, ...]:
    """Influences over the same rows.

    Raises:
        InvalidInput: if there are none, one is something else, or its rows are others.
    """
    listed = list(members) if isinstance(members, Iterable) else [members]
    wrong = [type(member).__name__ for member in listed if not isinstance(member, Influence)]
    if not listed or wrong:
        what = f"a {wrong[0]}" if wrong else "nothing"
        message = (
            f"members holds {what} (of {len(listed)}). They must be Influences: [uw.explain(model, X, y, …) for model "
            "in models], or uw.checkpoints(model, states, X, y, …)."
        )
        raise InvalidInput(message)
    for number, member in enumerate(listed[1:], 1):
        difference = _difference(listed[0], member)
        if difference:
            message = (
                f"Member {number} was trained on other rows than member 0: {difference}. Row i must be the same "
                "example for all of them. Explain every model with the same (X, y); a row that a model did not see has "
                "sample_weight 0."
            )
            raise InvalidInput(message)
    return tuple(listed)


def _difference(first: Influence, other: Influence) -> str:
    """How the training rows of two influences differ, in words; empty if they do not.

    Sample weights may differ. Inputs are compared on a few rows, and only where both members see them as given.
    """
    a, b = first.examples, other.examples
    if len(a) != len(b):
        return f"{len(b)} rows, not {len(a)}"
    if a.ids is not None and b.ids is not None and not same_names(a.ids, b.ids):
        pairs = zip(a.ids.tolist(), b.ids.tolist(), strict=True)
        row, ours, theirs = next((row, one, other) for row, (one, other) in enumerate(pairs) if one != other)
        return f"the name of row {row} is {theirs!r}, not {ours!r}"
    if a.y is not None and b.y is not None and a.y.shape == b.y.shape:
        differs = (as_tensor(a.y).double() != as_tensor(b.y).double()).flatten(1 if a.y.ndim > 1 else 0)
        rows = torch.nonzero(differs.any(1) if differs.ndim > 1 else differs).flatten()
        if len(rows):
            return f"the target of row {int(rows[0])} differs (so do {len(rows)} in all)"
    if _as_given(first) and _as_given(other):
        rows = a.spread(PROBE_ROWS)
        given = [getattr(one.encoder, "original", one.examples).batch(rows) for one in (first, other)]  # before a body
        for ours, theirs in zip(leaves(given[0]), leaves(given[1]), strict=False):
            if ours.shape != theirs.shape:
                continue  # the same pictures as pixels in a row, or in a square
            dense = [torch.as_tensor(x.toarray() if hasattr(x, "toarray") else x).double() for x in (ours, theirs)]
            gap = (dense[0] - dense[1]).abs().flatten(1) if dense[0].ndim > 1 else (dense[0] - dense[1]).abs()[:, None]
            row = int(gap.amax(1).argmax())
            if float(gap[row].max()) > 1e-6 * (1 + float(dense[0].abs().max())):
                return f"the input of row {int(rows[row])} differs by {float(gap[row].max()):.3g}"
    return ""


def _as_given(influence: Influence) -> bool:
    """Whether the objective's inputs are the user's own: no Pipeline, no kernel, no selected columns."""
    built = getattr(influence.encoder, "built", None)
    whole = built is None or isinstance(built.inputs, AsGiven)
    return whole and getattr(influence.encoder, "transformers", None) is None
