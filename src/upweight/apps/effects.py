"""What `mismatch` says about the features of rows, and about the sources rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from upweight.apps import notebook
from upweight.apps.names import listed, names_in_json
from upweight.errors import InvalidInput, checked_count

_NAMED = 5  # features in a sentence


@dataclass(frozen=True)
class Places:
    """A feature's place among all features by four readings; 1 is the first, None where a reading is not defined."""

    rising: int | None
    falling: int | None
    absolute: int | None
    held: int | None
    coefficient: int | None


@dataclass(frozen=True)
class FeatureEffects:
    """Equation 5 by feature, for the rows that stand out; the columns of a one-hot group are one feature.

    With g[i, j] the derivative of the queries' mean loss by column j of row i, in nats per unit of the column, NaN
    where the training rows do not determine the coefficient of the column:

    Args:
        names: (f,) of the features.
        columns: the columns of each feature.
        rows: (r,) the training rows whose features these are, harmful ones first.
        by_row: (r, f) signed: Σ g over the feature's columns; of a whole one-hot group that moves all its categories;
            `held_by_row` says more.
        absolute_by_row: (r, f) Σ |g| over the feature's columns.
        held_by_row: (r, f) Σ x·g over the feature's columns: of what the row really holds, which leaves out categories
            it does not have; x are the inputs that the derivatives are by, also before a frozen network; None where
            they are not at hand, as for some Datasets.
        coefficient: (f,) the largest |θ| of the feature's columns, the naive reading; None if the model is not linear
            in just these columns.
        widest: (f,) the column with the largest Σᵢ |g| in each feature.
        ids: (r,) names of the rows, None where they have none.

    >>> import numpy as np, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(8.0)[:, None], np.array([0, 1, 2, 3, 4, 5, 6, 0.0])
    >>> influence = uw.explain(Ridge(alpha=0.1).fit(X, y), X, y)
    >>> found = uw.apps.mismatch(influence, ([[7.0]], [7.0]), feature_names=["age"]).features
    >>> found.names, found.rows[:3], found.by_row[:3, 0].round(2)
    (['age'], array([7, 6, 5]), array([ 2.99, -0.33, -0.24]))
    """

    names: list[str] = field(repr=False)
    columns: list[NDArray[np.int64]] = field(repr=False)
    rows: Int[NDArray[np.int64], " r"]
    by_row: Float[NDArray[np.float64], "r f"] = field(repr=False)
    absolute_by_row: Float[NDArray[np.float64], "r f"] = field(repr=False)
    held_by_row: Float[NDArray[np.float64], "r f"] | None = field(repr=False)
    coefficient: Float[NDArray[np.float64], " f"] | None = field(repr=False)
    widest: list[str] = field(repr=False)
    ids: Shaped[NDArray[Any], " r"] | None = field(default=None, repr=False)

    @property
    def signed(self) -> Float[NDArray[np.float64], " f"]:
        """Σ over the rows of `by_row`; helpful and harmful rows may cancel."""
        return self.by_row.sum(0)

    @property
    def absolute(self) -> Float[NDArray[np.float64], " f"]:
        """Σ over the rows of `absolute_by_row`."""
        return self.absolute_by_row.sum(0)

    @property
    def held(self) -> Float[NDArray[np.float64], " f"] | None:
        """Σ over the rows of |`held_by_row`|."""
        return None if self.held_by_row is None else np.abs(self.held_by_row).sum(0)

    def of(self, rows: Any) -> FeatureEffects:
        """The same for some of the rows, such as one child.

        Raises:
            InvalidInput: if a row is none of them.
        """
        wanted = np.atleast_1d(np.asarray(rows))
        places = [int(np.flatnonzero(self.rows == row)[0]) for row in wanted if row in self.rows]
        if len(places) < len(wanted) or not places:
            message = f"rows={wanted.tolist()}, and features were computed for rows {self.rows.tolist()}. Name those."
            raise InvalidInput(message)
        held = None if self.held_by_row is None else self.held_by_row[places]
        return FeatureEffects(
            self.names,
            self.columns,
            self.rows[places],
            self.by_row[places],
            self.absolute_by_row[places],
            held,
            self.coefficient,
            self.widest,
            None if self.ids is None else self.ids[places],
        )

    def places(self, name: str) -> Places:
        """Where a feature comes among all: by signed effect from either end, in size, held, and by coefficient.

        Raises:
            InvalidInput: if there is no such feature.
        """
        if name not in self.names:
            message = f"There is no feature '{name}'; the first are {', '.join(self.names[:8])}. See .names."
            raise InvalidInput(message)
        j = self.names.index(name)

        def place(values: NDArray[np.float64]) -> int | None:
            return None if np.isnan(values[j]) else int((values > values[j]).sum()) + 1

        return Places(
            rising=place(self.signed),
            falling=place(-self.signed),
            absolute=place(self.absolute),
            held=None if self.held is None else place(self.held),
            coefficient=None if self.coefficient is None else place(self.coefficient),
        )

    @property
    def undetermined(self) -> list[int]:
        """The numbers of the features without a derivative: the training rows do not determine their coefficients."""
        return np.flatnonzero(np.isnan(self.absolute)).tolist()

    def top(self, k: int = 5) -> list[int]:
        """The numbers of the k features that matter most: by what the rows hold, or in size where that is unknown.

        Fewer, if fewer have a derivative.
        """
        keys = self.absolute if self.held is None else self.held
        order = np.argsort(-keys, kind="stable")[: checked_count(k, "k")]
        return order[~np.isnan(keys[order])].tolist()

    def _repr_html_(self) -> str:
        return notebook.shown(feature_table(self), said=_without(self))

    def to_dict(self) -> dict[str, Any]:
        """One entry per feature, in the order of `top`; last those that are `undetermined`."""
        held, coefficient = self.held, self.coefficient
        return {
            "rows": self.rows.tolist(),
            **names_in_json(self.ids, np.arange(len(self.rows))),
            "features": [
                {
                    "name": self.names[j],
                    "signed": float(self.signed[j]),
                    "absolute": float(self.absolute[j]),
                    "held": None if held is None else float(held[j]),
                    "coefficient": None if coefficient is None else float(coefficient[j]),
                }
                for j in [*self.top(len(self.names)), *self.undetermined]
            ],
        }


@dataclass(frozen=True)
class GroupEffects:
    """What removing all rows of a source would do to the queries' mean loss, the most harmful source first.

    Args:
        names: of the sources.
        sizes: (g,) numbers of rows.
        first_order: (g,) the sum over the rows' values.
        newton: (g,) by the group's own Newton step, NaN for sources that were left out for being weak and for those in
            `without`; None where no source has such a step.
        refused: why no source has a Newton step, "" where one has.
        without: source → why it has no Newton step while others have, such as that the rest does not determine the fit.

    >>> import numpy as np, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(8.0)[:, None], np.array([0, 1, 2, 3, 4, 5, 6, 0.0])
    >>> influence = uw.explain(Ridge(alpha=0.1).fit(X, y), X, y)
    >>> found = uw.apps.mismatch(influence, ([[7.0]], [7.0]), groups=["north"] * 6 + ["south"] * 2).groups
    >>> found.names, found.first_order.round(1), found.newton.round(1)
    (['south', 'north'], array([-5.4,  5.4]), array([-8.5, 33.7]))
    """

    names: list[Any]
    sizes: Int[NDArray[np.int64], " g"]
    first_order: Float[NDArray[np.float64], " g"]
    newton: Float[NDArray[np.float64], " g"] | None
    refused: str = ""
    without: Mapping[Any, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"GroupEffects({len(self.names)} sources)"

    def __str__(self) -> str:
        return "\n".join(group_lines(self))

    def _repr_html_(self) -> str:
        return notebook.shown(group_table(self), said=_no_steps(self))

    def to_dict(self) -> dict[str, Any]:
        """One entry per source."""
        steps = [float("nan")] * len(self.names) if self.newton is None else self.newton.tolist()
        return {
            "groups": [
                {"name": str(name), "size": int(size), "first_order": float(value), "newton": step}
                for name, size, value, step in zip(self.names, self.sizes, self.first_order, steps, strict=True)
            ],
            "refused": self.refused,
            "without": {str(name): why for name, why in self.without.items()},
        }


def feature_lines(effects: FeatureEffects) -> list[str]:
    """The features that matter most, in words."""
    held, coefficient = effects.held, effects.coefficient
    rows = effects.rows if effects.ids is None else np.arange(len(effects.rows))
    lines = [f"features of rows {listed(effects.ids, rows, 8)} (equation 5):"]
    for j in effects.top():
        own = "" if held is None else f"of what they hold {held[j]:.3g}; "
        signed = f"signed {effects.signed[j]:+.3g}, " if len(effects.columns[j]) == 1 else ""
        places = effects.places(effects.names[j])
        naive = "" if coefficient is None else f"; |θ| {coefficient[j]:.3g}, place {places.coefficient}"
        lines.append(f"  {effects.names[j]}: {own}{signed}absolute {effects.absolute[j]:.3g}{naive}")
    return [*lines, *(f"  {line}" for line in _without(effects))]


def feature_table(effects: FeatureEffects) -> str:
    """The features that matter most, as a table in HTML."""
    held, coefficient = effects.held, effects.coefficient
    rows = effects.rows if effects.ids is None else np.arange(len(effects.rows))
    lines = [
        [
            notebook.plain(effects.names[j]),
            notebook.NOTHING if held is None else notebook.plain(held[j], ".3g"),
            notebook.plain(effects.signed[j], "+.3g") if len(effects.columns[j]) == 1 else notebook.NOTHING,
            notebook.plain(effects.absolute[j], ".3g"),
            notebook.NOTHING if coefficient is None else notebook.plain(coefficient[j], ".3g"),
            notebook.plain(effects.places(effects.names[j]).coefficient or notebook.NOTHING),
        ]
        for j in effects.top(notebook.LINES)
    ]
    head = ["feature", "of what the rows hold", "signed", "absolute", "|θ|", "place by |θ|"]
    return notebook.table(f"Features of rows {listed(effects.ids, rows, 8)}, by equation 5", head, lines)


def _without(effects: FeatureEffects) -> list[str]:
    """Which features have no derivative, in a sentence; none if all have one."""
    without = [effects.names[j] for j in effects.undetermined]
    more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
    said = (
        f"left out: {', '.join(without[:_NAMED])}{more}. The columns repeat or add up to others in every training row, "
        "so nothing says what moving one alone would do. Drop one and fit again."
    )
    return [said] if without else []


def group_lines(groups: GroupEffects, k: int = 3) -> list[str]:
    """The k most harmful and the k most helpful sources, in words."""
    lines = ["sources (change of the loss without all their rows):"]
    shown = sorted({*range(min(k, len(groups.names))), *range(max(0, len(groups.names) - k), len(groups.names))})
    for g in shown:
        step = "" if groups.newton is None or np.isnan(groups.newton[g]) else f", Newton step {groups.newton[g]:+.3g}"
        lines.append(f"  {groups.names[g]} ({groups.sizes[g]} rows): first order {groups.first_order[g]:+.3g}{step}")
    return [*lines, *(f"  {line}" for line in _no_steps(groups))]


def group_table(groups: GroupEffects) -> str:
    """The most harmful sources, as a table in HTML."""
    steps = np.full(len(groups.names), np.nan) if groups.newton is None else groups.newton
    lines = [
        [
            notebook.plain(groups.names[g]),
            notebook.plain(groups.sizes[g], ","),
            notebook.signed(groups.first_order[g]),
            notebook.signed(steps[g]),
        ]
        for g in range(len(groups.names))
    ]
    head = ["source", "rows", "first order", "Newton step"]
    return notebook.table("Change of the loss without all rows of a source", head, lines)


def _no_steps(groups: GroupEffects) -> list[str]:
    """Which sources have no Newton step, and why."""
    lines = [f"no Newton step of {name}: {why}" for name, why in groups.without.items()]
    return [*lines, f"no Newton steps: {groups.refused}"] if groups.refused else lines
