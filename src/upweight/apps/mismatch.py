"""Section 5.3: for errors of a model, the training rows and the features of them that are responsible.

rows       which rows' removal would change the queries' loss most, and by how much more than the next row's
features   which features of those rows (equation 5), beside the naive reading of the coefficients
groups     which sources the rows come from: what removing all rows of a source would do
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

import upweight as uw
from upweight.apps import notebook
from upweight.apps.columns import grouped_columns, one_hot_groups, unique
from upweight.apps.effects import FeatureEffects, GroupEffects, feature_lines, feature_table, group_lines, group_table
from upweight.apps.names import name_in_text, names_in_json
from upweight.apps.undetermined import left_out_line, undetermined
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel, UpweightError, checked_count, first_line

_SHOWN = 12  # rows of either kind in a text
_NUMBERS = 2**24  # of equation 5 at once: 128 MB


@dataclass(frozen=True)
class Side:
    """The rows that help, or those that harm, strongest first, and how many of them stand out.

    Args:
        rows: (k,) training rows.
        values: (k,) mean over the queries of the predicted change of the loss if the row is removed.
        ratios: (k,) how many times larger a value is than the next one of its sign; infinite where there is none.
        stand_out: how many rows come before the largest finite ratio.
        ids: (k,) names of the rows, None where they have none.

    >>> import numpy as np, upweight as uw
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(8.0)[:, None], np.array([0, 1, 2, 3, 4, 5, 6, 0.0])
    >>> y[6] = 1
    >>> influence = uw.explain(Ridge(alpha=0.1).fit(X, y), X, y)
    >>> harmful = uw.apps.mismatch(influence, ([[7.0]], [7.0])).harmful
    >>> harmful.rows[:3], harmful.stand_out, round(harmful.ratio, 1)
    (array([7, 6]), 1, 2.3)
    """

    rows: Int[NDArray[np.int64], " k"]
    values: Float[NDArray[np.float64], " k"]
    ratios: Float[NDArray[np.float64], " k"]
    stand_out: int
    ids: Shaped[NDArray[Any], " k"] | None = None

    @property
    def ratio(self) -> float:
        """How many times larger the last row that stands out is than the next; NaN where there are no rows."""
        return float(self.ratios[self.stand_out - 1]) if self.stand_out else float("nan")

    @property
    def responsible(self) -> Int[NDArray[np.int64], " m"]:
        """The rows that stand out."""
        return self.rows[: self.stand_out]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists."""
        return {
            "rows": self.rows.tolist(),
            "values": self.values.tolist(),
            "ratios": self.ratios.tolist(),
            "stand_out": self.stand_out,
            "ratio": self.ratio,
            **names_in_json(self.ids, np.arange(len(self.rows))),
        }


@dataclass(frozen=True)
class Mismatch:
    """Which training rows, which features of them and which sources are responsible for some errors.

    Queries that ask for what the training rows do not determine have no value; all means are over the others.

    Args:
        harmful: the rows whose removal would lower the queries' mean loss most.
        helpful: the rows whose removal would raise it most.
        loss: the queries' mean loss now.
        scores: the values of all rows on every query; `scores.harmful(5)` are the rows of each query. Those of a query
            without a value are NaN.
        features: of the rows that stand out; None where equation 5 is not defined, as for kernels and for texts.
        groups: of the metadata column, None if none was given.
        no_features: why features is None, in a sentence; "" where they are there, or no row stands out.
    """

    harmful: Side
    helpful: Side
    loss: float
    scores: uw.Scores = field(repr=False)
    features: FeatureEffects | None = field(repr=False)
    groups: GroupEffects | None = field(repr=False)
    no_features: str = field(default="", repr=False)

    @property
    def left_out(self) -> Int[NDArray[np.int64], " m"]:
        """The queries that have no value, which are left out of the means."""
        return undetermined(self.scores)

    @property
    def responsible(self) -> Int[NDArray[np.int64], " m"]:
        """The rows that stand out: harmful ones first, then helpful ones."""
        return np.concatenate([self.harmful.responsible, self.helpful.responsible])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and lists; of the features and sources all."""
        return {
            "queries": len(self.scores.values) - len(self.left_out),
            "left_out": self.left_out.tolist(),
            "loss": self.loss,
            "harmful": self.harmful.to_dict(),
            "helpful": self.helpful.to_dict(),
            "features": None if self.features is None else self.features.to_dict(),
            "no_features": self.no_features,
            "groups": None if self.groups is None else self.groups.to_dict(),
        }

    @property
    def _asked(self) -> list[str]:
        """The queries and their loss, and which of them are left out, in sentences."""
        q = len(self.scores.values) - len(self.left_out)
        without = left_out_line(self.scores.values, self.scores.query_ids)
        head = f"{'1 query' if q == 1 else f'{q} queries'}, mean {self.scores.measure} {self.loss:.4g}"
        return [head, without] if without else [head]

    def _repr_html_(self) -> str:
        first, *said = self._asked
        parts = []
        for name, verb, side in (("harmful", "fall", self.harmful), ("helpful", "rise", self.helpful)):
            if side.stand_out:
                said.append(f"most {name}: {_said(side, verb)}")
                parts.append(_table(f"Most {name} rows", side))
        if self.features is not None:
            parts.append(feature_table(self.features))
        elif self.no_features:
            said.append(f"no features: {self.no_features}")
        if self.groups is not None:
            parts.append(group_table(self.groups))
        return notebook.shown(uw.markup.remark(first), *parts, said=said)

    def __str__(self) -> str:
        lines = self._asked
        for name, verb, side in (("harmful", "fall", self.harmful), ("helpful", "rise", self.helpful)):
            if side.stand_out:
                lines += ["", f"most {name}: {_said(side, verb)}"]
                lines += [
                    f"  row {row:>7}  {value:+.4g}{name_in_text(side.ids, place)}"
                    for place, (row, value) in enumerate(zip(side.rows[:_SHOWN], side.values, strict=False))
                ]
                lines += [f"  … and {len(side.rows) - _SHOWN} more"] if len(side.rows) > _SHOWN else []
        if self.features is not None:
            lines += ["", *feature_lines(self.features)]
        elif self.no_features:
            lines += ["", f"no features: {self.no_features}"]
        if self.groups is not None:
            lines += ["", *group_lines(self.groups)]
        return "\n".join(lines)


def _table(caption: str, side: Side) -> str:
    """Rows of one kind, as a table in HTML; those that stand out say so."""
    lines = [
        [notebook.row(row, side.ids, place), notebook.signed(value), "stands out" if place < side.stand_out else ""]
        for place, (row, value) in enumerate(zip(side.rows, side.values, strict=True))
    ]
    return notebook.table(caption, ["row", "value", ""], lines)


def mismatch(
    influence: uw.Influence,
    on: Any,
    *,
    groups: Any = None,
    feature_names: Sequence[str] | None = None,
    feature_groups: Mapping[str, Sequence[Any]] | None = None,
    k: int = 10,
) -> Mismatch:
    """Which training rows, which of their features and which sources are responsible for errors of a model?

    Rows are ranked by the mean over the queries of values[q, i] = (wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇L(zᵢ), the predicted
    change of the loss if row i is removed. Those before the largest gap stand out, and their features are read with
    equation 5: g[i] = −(wᵢ/n) ∇L(z_q)ᵀ (C + λI)⁻¹ ∇ₓ∇L(zᵢ). Queries without a value (`Mismatch.left_out`) are left out.

    Cost: on_loss of the queries and, with the rows that stand out, of_perturbing; with groups their Newton steps too.

    Args:
        influence: of the model.
        on: (Xq, yq), the queries: normally predictions that were wrong.
        groups: a metadata column, n labels such as the source of each row; or a dict from name to rows.
        feature_names: one name per column of the input; None takes those of the Pipeline or DataFrame.
        feature_groups: name → columns (names or numbers) that are one feature; None finds one-hot columns by
            `one_hot_groups`, and {} keeps every column on its own.
        k: rows to list on either side, and sources whose Newton step is computed.

    Raises:
        InvalidInput: if the queries, names, groups or k cannot be used.
        NotPositiveDefinite: if no query has a value.

    References: Koh & Liang (2017), section 5.3.

    >>> import numpy as np
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.arange(8.0)[:, None], np.array([0, 1, 2, 3, 4, 5, 6, 0.0])
    >>> found = mismatch(uw.explain(Ridge(alpha=0.1).fit(X, y), X, y), ([[7.0]], [7.0]), k=3)
    >>> found.harmful.responsible.tolist(), found.features.names
    ([7], ['column 0'])
    """
    checked_count(k, "k", hint="10 rows on either side")
    queries = influence.queries(on)
    scores = influence.on_loss(queries)
    known = np.setdiff1d(np.arange(len(queries)), undetermined(scores))
    queries, values = queries.subset(known), scores.values[known].mean(0)
    harmful, helpful = _side(values, scores.ids, -1, k), _side(values, scores.ids, 1, k)
    rows = np.concatenate([harmful.responsible, helpful.responsible])
    assert scores.query_values is not None
    features, why = _features(influence, queries, rows, feature_names, feature_groups)
    return Mismatch(
        harmful,
        helpful,
        float(scores.query_values[known].mean()),
        scores,
        features,
        None if groups is None else _groups(influence, queries, _named(groups, influence.n), k),
        why,
    )


def _side(values: NDArray[np.float64], ids: NDArray[Any] | None, sign: int, k: int) -> Side:
    """The k rows whose values have this sign and the largest size."""
    order = np.argsort(-sign * values, kind="stable")[: k + 1]
    order = order[sign * values[order] > 0]
    size = np.abs(values[order])
    ratios = np.append(size[:-1] / size[1:], np.inf)[:k]
    finite = np.isfinite(ratios)
    stand_out = int(np.argmax(np.where(finite, ratios, -1))) + 1 if finite.any() else len(ratios[: len(order)])
    rows = order[:k]
    names = None if ids is None else ids[rows]
    return Side(rows, values[rows], ratios[: len(rows)], min(stand_out, len(rows)), names)


def _features(
    influence: uw.Influence,
    queries: uw.Examples,
    rows: NDArray[np.int64],
    names: Sequence[str] | None,
    groups: Mapping[str, Sequence[Any]] | None,
) -> tuple[FeatureEffects | None, str]:
    """Equation 5 of these rows by feature; None and why where it is not defined."""
    if not len(rows):
        return None, ""
    parts = _parts(influence)
    if parts:
        return None, f"rows are {parts}, which no small step moves, so equation 5 has no derivative by them."
    try:
        g = _derivatives(influence, queries, rows)
    except UnsupportedModel as error:
        return None, first_line(error)
    d = g.shape[1]
    named = names if names is not None else influence.feature_names
    named = [f"column {j}" for j in range(d)] if named is None else [str(name) for name in named]
    if len(named) != d:
        message = f"There are {len(named)} feature names, and an input has {d} columns. Pass one name per column."
        raise InvalidInput(message)
    x = _inputs(influence, rows, d)
    if groups is None:
        everything = _inputs(influence, None, d) if any("_" in name for name in named) else None
        groups = {} if everything is None else one_hot_groups(everything, named)
    columns = grouped_columns(groups, named)
    total = np.abs(g).sum(0)
    coefficient = _coefficients(influence, d)

    def summed(table: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([table[:, own].sum(1) for own in columns.values()], 1)

    found = FeatureEffects(
        list(columns),
        list(columns.values()),
        rows,
        summed(g),
        summed(np.abs(g)),
        None if x is None else summed(x.multiply(g).toarray() if scipy.sparse.issparse(x) else x * g),
        None if coefficient is None else np.array([coefficient[own].max() for own in columns.values()]),
        [unique(named)[own[int(np.argmax(total[own]))]] for own in columns.values()],
        None if influence.examples.ids is None else influence.examples.ids[rows],
    )
    return found, ""


def _parts(influence: uw.Influence) -> str:
    """What rows of named parts consist of, in words; "" for other rows."""
    first = influence.examples.batch([0])
    x = first[0] if isinstance(first, tuple | list) else first
    return f"made of {', '.join(map(str, x))}" if isinstance(x, Mapping) else ""


def _derivatives(
    influence: uw.Influence, queries: uw.Examples, rows: NDArray[np.int64]
) -> Float[NDArray[np.float64], "r d"]:
    """Equation 5 of these rows, mean over the queries.  Memory: a few queries'.

    Raises:
        UnsupportedModel: where it is not defined.
    """
    q = len(queries)
    total = influence.of_perturbing(rows, on=queries.subset(np.arange(1)))[0].reshape(len(rows), -1)
    if q > 1:
        for block in queries.subset(np.arange(1, q)).blocks(max(1, _NUMBERS // total.size)):
            total = total + influence.of_perturbing(rows, on=block).sum(0).reshape(total.shape)
    return total / q


def _inputs(influence: uw.Influence, rows: NDArray[np.int64] | None, d: int) -> Any:
    """The inputs of these training rows, (r, d), as equation 5 moves them; None where they are not at hand.

    Those of a frozen network are what goes into the network. A Dataset is read for a few rows, not as a whole.
    """
    own, whole = _moves_own_inputs(influence), getattr(influence.encoder, "original", influence.examples)
    if whole.x is not None:
        x: Any = influence.examples.x if own else uw.training_inputs(influence)
        x = x if rows is None else x[rows]
    elif own and rows is not None:
        batch = influence.examples.batch(rows)
        x = batch[0] if isinstance(batch, tuple | list) else batch
    else:
        return None
    if scipy.sparse.issparse(x):
        return x if x.shape[1] == d else None
    if not hasattr(x, "ndim") or x.ndim == 1:  # parts, or one number each
        return None
    x = x.detach().double().cpu().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)
    x = x.reshape(len(x), -1)
    return x if x.shape[1] == d else None  # a lasso's objective sees some of the columns


def _coefficients(influence: uw.Influence, d: int) -> NDArray[np.float64] | None:
    """The largest |θ| over the outputs of each of d columns; None unless they multiply just what equation 5 moves."""
    structure = influence.objective.linear
    if structure is None or structure.n_features != d or not _moves_own_inputs(influence):
        return None
    coef = influence.objective.theta.numpy()[: structure.n_outputs * d]
    return np.abs(coef).reshape(structure.n_outputs, d).max(0)


def _moves_own_inputs(influence: uw.Influence) -> bool:
    """Whether equation 5 moves what the objective sees, and not what a frozen network makes features of."""
    return getattr(influence.encoder, "original", None) is None


def _named(groups: Any, n: int) -> dict[Any, NDArray[np.int64]]:
    """Name → rows, from n labels or from such a dict.

    Raises:
        InvalidInput: if there are not n labels.
    """
    if isinstance(groups, Mapping):
        return dict(groups)
    labels = np.asarray(groups)
    if labels.shape != (n,):
        message = (
            f"groups has shape {labels.shape}, and there are {n} training rows. Pass one label for each row (the "
            "source it comes from), or a dict from name to rows."
        )
        raise InvalidInput(message)
    text = labels.astype(str) if labels.dtype == object else labels
    names, codes = np.unique(text, return_inverse=True)
    return {name: np.flatnonzero(codes == number) for number, name in enumerate(names.tolist())}


def _groups(influence: uw.Influence, queries: uw.Examples, members: dict[Any, Any], k: int) -> GroupEffects:
    """First order for every source, and the Newton step of the k largest."""
    rows = influence.examples.groups(members)
    sums = influence.of_groups(rows, on=queries).values.mean(0)
    strongest = np.argsort(-np.abs(sums), kind="stable")[:k]
    steps, refused, without = _newton_steps(influence, queries, rows, strongest.tolist())
    order, names = np.argsort(sums, kind="stable"), list(members)
    return GroupEffects(
        [names[g] for g in order],
        np.array([len(rows[g]) for g in order]),
        sums[order],
        None if refused else steps[order],
        refused,
        {names[g]: why for g, why in without.items()},
    )


def _newton_steps(
    influence: uw.Influence, queries: uw.Examples, groups: list[NDArray[np.int64]], chosen: list[int]
) -> tuple[NDArray[np.float64], str, dict[int, str]]:
    """The Newton steps of the chosen groups, why there is none, and the groups that cannot be removed, with the reason.

    All at once, which is faster; one by one if one of them cannot be removed.
    """
    steps = np.full(len(groups), np.nan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TheoryWarning)  # the reasons are told one by one
            steps[chosen] = influence.of_removing([groups[g] for g in chosen], on=queries).values.mean(0)
    except UnsupportedModel as error:  # of the model: no group has a step
        return steps, first_line(error), {}
    except UpweightError as error:
        if len(chosen) == 1:
            return steps, first_line(error), {}
    without = {}
    for g in [g for g in chosen if np.isnan(steps[g])]:
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", TheoryWarning)
                steps[g] = influence.of_removing([groups[g]], on=queries).values.mean()
        except UpweightError as error:
            without[g] = first_line(error)
        else:
            if np.isnan(steps[g]):  # some queries lean on what leaves with the group, which a warning has told
                without[g] = " ".join(str(warning.message) for warning in told)
    return (steps, "", without) if len(without) < len(chosen) else (steps, without[chosen[0]], without)


def _said(side: Side, verb: str) -> str:
    """How many rows stand out, in words."""
    number = "1 row stands" if side.stand_out == 1 else f"{side.stand_out} rows stand"
    gap = f", {side.ratio:.3g} times the next" if np.isfinite(side.ratio) else ""
    return f"{number} out{gap} (the loss would {verb} without them)"
