"""Section 5.1: what a model's answer rests on: the rows that help and harm, how near they are, how few carry it.

For a query q and training row i, with v[q, i] the predicted change of the query's loss if the row is removed:

    distance        ‖x_q − x_i‖₂ in the inputs, and ‖h(x_q) − h(x_i)‖₂ in the features that the objective sees
    locality        Spearman's correlation of |v| and distance: −1 if influence fades with distance, 0 if it does not
    concentration   the smallest number of rows that hold half of Σᵢ |v[q, i]|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

import upweight as uw
from upweight.apps import notebook
from upweight.apps.distances import distances
from upweight.apps.names import called, name_in_text, names_in_json, plain
from upweight.apps.undetermined import left_out_line, undetermined
from upweight.errors import InvalidInput, RowOutOfRange, checked_count

_QUERIES = 3  # that are shown


@dataclass(frozen=True)
class Ranked:
    """The rows that help one query, or those that harm it, strongest first; rows whose value is 0 do neither.

    Args:
        rows: (k,) training rows.
        values: (k,) predicted change of the query's loss if the row is removed.
        labels: (k,) their labels, or None where targets are no classes.
        distances: (k,) from the query, in the inputs.
        feature_distances: (k,) from the query, in the features.
        ids: (k,) names of the rows, None where they have none.

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> import upweight as uw
    >>> X, y = load_iris(return_X_y=True)
    >>> influence = uw.explain(LogisticRegression(tol=1e-8, max_iter=1000).fit(X, y), X, y)
    >>> helpful = uw.apps.understand(influence, (X[70:71], y[70:71])).helpful(0)
    >>> helpful.rows[:3], helpful.labels[:3], helpful.values[:3].round(3)
    (array([70, 84, 85]), array([1, 1, 1]), array([0.089, 0.038, 0.036]))
    """

    rows: Int[NDArray[np.int64], " k"]
    values: Float[NDArray[np.float64], " k"]
    labels: Shaped[NDArray[Any], " k"] | None
    distances: Float[NDArray[np.float64], " k"]
    feature_distances: Float[NDArray[np.float64], " k"]
    ids: Shaped[NDArray[Any], " k"] | None = None


@dataclass(frozen=True)
class Understanding:
    """What a model's answers to some queries rest on.

    Queries that ask for what the training rows do not determine have no value: texts and `to_dict` leave them out.

    Args:
        scores: predicted change of each query's loss for every training row, NaN for a query without a value.
        distances: (q, n) Euclidean, between inputs as the user gave them.
        feature_distances: (q, n) Euclidean, between what the objective sees; the same where nothing lies between.
        labels: (n,) of the training rows, or None where targets are no classes.
        targets: (q,) true labels of the queries, or None.
        predicted: (q,) labels that the model gives them, or None.
        outputs: (q, K) the model's outputs for the queries; K = 0 where these are next tokens.
        k: how many rows of each kind `__str__` and `to_dict` show.
        describe: turns a training row into a few words for `__str__`, or None.
        no_distances: why distances are NaN, in a sentence, as for rows of named parts; "" where they are there.
    """

    scores: uw.Scores
    distances: Float[NDArray[np.float64], "q n"] = field(repr=False)
    feature_distances: Float[NDArray[np.float64], "q n"] = field(repr=False)
    labels: Shaped[NDArray[Any], " n"] | None = field(repr=False)
    targets: Shaped[NDArray[Any], " q"] | None = field(repr=False)
    predicted: Shaped[NDArray[Any], " q"] | None = field(repr=False)
    outputs: Float[NDArray[np.float64], "q K"] = field(repr=False)
    k: int = 5
    describe: Callable[[int], str] | None = field(default=None, repr=False)
    no_distances: str = field(default="", repr=False)

    @property
    def left_out(self) -> Int[NDArray[np.int64], " m"]:
        """The queries that have no value."""
        return undetermined(self.scores)

    def helpful(self, query: int = 0, k: int | None = None) -> Ranked:
        """The k rows that help a query most: its loss would rise without them. Fewer, if fewer have a value > 0."""
        return self._ranked(1, query, k)

    def harmful(self, query: int = 0, k: int | None = None) -> Ranked:
        """The k rows that harm a query most: its loss would fall without them. Fewer, if fewer have a value < 0."""
        return self._ranked(-1, query, k)

    @property
    def locality(self) -> Float[NDArray[np.float64], " q"]:
        """Spearman's correlation of |value| and distance in the inputs, for each query; NaN if either is constant."""
        return _rank_correlations(np.abs(self.scores.values), self.distances)

    @property
    def feature_locality(self) -> Float[NDArray[np.float64], " q"]:
        """The same in the features."""
        return _rank_correlations(np.abs(self.scores.values), self.feature_distances)

    @property
    def half(self) -> Int[NDArray[np.int64], " q"]:
        """The smallest number of rows that hold half of Σ|value|, for each query; 0 if all are 0, or NaN."""
        sizes = -np.sort(-np.abs(self.scores.values), 1)
        total = sizes.sum(1, keepdims=True)
        return np.where(total[:, 0] > 0, (np.cumsum(sizes, 1) < total / 2).sum(1) + 1, 0)

    def first_of_another_class(self, query: int = 0) -> int | None:
        """The rank (1 is the most helpful) of the first helpful row whose label is not the query's; None if none helps.

        Raises:
            InvalidInput: if targets are no classes.
        """
        if self.labels is None or self.targets is None:
            message = "Targets are no classes here, so no row is of another class. Look at helpful() and its values."
            raise InvalidInput(message)
        values = self.scores.values[self._place(query)]
        order = np.argsort(-values, kind="stable")
        other = np.flatnonzero((self.labels[order] != self.targets[query]) & (values[order] > 0))
        return int(other[0]) + 1 if other.size else None

    def same_class(self, query: int = 0, k: int = 20) -> tuple[float, float]:
        """The share of the query's own class among its k most helpful and its k most harmful rows, or as many as there
        are; NaN where there is none.

        Raises:
            InvalidInput: if targets are no classes.
        """
        helpful, harmful = self.helpful(query, k), self.harmful(query, k)
        if helpful.labels is None or harmful.labels is None or self.targets is None:
            message = "Targets are no classes here, so rows have no class. Look at helpful() and its values."
            raise InvalidInput(message)
        own = [ranked.labels == self.targets[query] for ranked in (helpful, harmful)]
        first, second = (float(same.mean()) if same.size else float("nan") for same in own)
        return first, second

    def __str__(self) -> str:
        known = self._known.tolist()
        more = [f"… and {len(known) - _QUERIES} more queries"] if len(known) > _QUERIES else []
        unknown = left_out_line(self.scores.values, self.scores.query_ids)
        without = [line for line in (unknown, self._distances_missing) if line]
        return "\n\n".join([*map(self._text, known[:_QUERIES]), *more, *without])

    def _repr_html_(self) -> str:
        known = self._known.tolist()
        more = f"… and {len(known) - _QUERIES} more queries" if len(known) > _QUERIES else ""
        unknown = left_out_line(self.scores.values, self.scores.query_ids)
        return notebook.shown(*map(self._table, known[:_QUERIES]), said=[more, unknown, self._distances_missing])

    def _table(self, query: int) -> str:
        """The rows of either kind behind one query, as a table in HTML."""
        lines = [
            [
                notebook.row(row, self.scores.ids),
                notebook.signed(ranked.values[place]),
                notebook.NOTHING if ranked.labels is None else notebook.plain(ranked.labels[place]),
                *(notebook.plain(_far(far[place])) for far in (ranked.distances, ranked.feature_distances)),
                *([] if self.describe is None else [notebook.plain(self.describe(row))]),
            ]
            for ranked in (self.helpful(query), self.harmful(query))
            for place, row in enumerate(ranked.rows.tolist())
        ]
        head = ["row", "value", "label", "distance", "in features", *([] if self.describe is None else [""])]
        title, carried = self._heads(query)
        return uw.markup.table(title, head, lines) + uw.markup.remark(carried)

    def to_dict(self) -> dict[str, Any]:
        """The numbers of every query that has a value, ready for JSON, and which have none."""
        return {
            "measure": self.scores.measure,
            "counterfactual": self.scores.counterfactual,
            "queries": [self._numbers(query) for query in self._known.tolist()],
            "left_out": self.left_out.tolist(),
            "no_distances": self.no_distances,
        }

    @property
    def _distances_missing(self) -> str:
        return f"no distances: {self.no_distances}" if self.no_distances else ""

    @property
    def _known(self) -> NDArray[np.int64]:
        """The queries that have a value."""
        return np.setdiff1d(np.arange(len(self.scores.values)), self.left_out)

    def _numbers(self, query: int) -> dict[str, Any]:
        def listed(ranked: Ranked) -> list[dict[str, Any]]:
            names = ["row", "value", "label", "distance", "feature_distance"]
            labels = [None] * len(ranked.rows) if ranked.labels is None else ranked.labels.tolist()
            columns = (ranked.rows.tolist(), ranked.values.tolist(), labels)
            columns += tuple(
                [None if np.isnan(far) else float(far) for far in apart]
                for apart in (ranked.distances, ranked.feature_distances)
            )
            if ranked.ids is not None:
                names, columns = [*names, "id"], (*columns, *names_in_json(self.scores.ids, ranked.rows).values())
            return [dict(zip(names, line, strict=True)) for line in zip(*columns, strict=True)]

        return {
            "query": query,
            **({} if self.scores.query_ids is None else {"id": plain(self.scores.query_ids[query])}),
            "label": None if self.targets is None else self.targets[query].item(),
            "predicted": None if self.predicted is None else self.predicted[query].item(),
            "locality": float(self.locality[query]),
            "feature_locality": float(self.feature_locality[query]),
            "rows_with_half_of_the_influence": int(self.half[query]),
            "helpful": listed(self.helpful(query)),
            "harmful": listed(self.harmful(query)),
        }

    def _heads(self, query: int) -> list[str]:
        """What is said of a query above its rows."""
        says = ""
        if self.predicted is not None and self.targets is not None:
            right = "rightly" if self.predicted[query] == self.targets[query] else "wrongly"
            says = f": {self.targets[query]}, {right} called {self.predicted[query]}"
        n = self.scores.values.shape[1]
        fading = (
            ""
            if np.isnan(self.distances[query]).all()
            else f"; rank correlation of |value| and distance {self.locality[query]:+.3f} in inputs, "
            f"{self.feature_locality[query]:+.3f} in features"
        )
        return [
            f"Query {called(self.scores.query_ids, query)}{says}",
            f"half of the influence is in {self.half[query]} of {n} rows{fading}",
        ]

    def _text(self, query: int) -> str:
        lines = self._heads(query)
        for kind, ranked in (("helpful", self.helpful(query)), ("harmful", self.harmful(query))):
            if not len(ranked.rows):
                lines.append(f"  most {kind}: no row has a value {'> 0' if kind == 'helpful' else '< 0'}")
                continue
            lines.append(f"  most {kind:<8} {'value':>12} {'label':>12} {'distance':>10} {'in features':>12}")
            for place, row in enumerate(ranked.rows):
                label = "" if ranked.labels is None else str(ranked.labels[place])
                words = name_in_text(self.scores.ids, row)
                words += "" if self.describe is None else f"  {self.describe(int(row))}"
                lines.append(
                    f"  row {row:>8}  {ranked.values[place]:>+12.4g} {label:>12} {_far(ranked.distances[place]):>10} "
                    f"{_far(ranked.feature_distances[place]):>12}{words}"
                )
        return "\n".join(lines)

    def _ranked(self, sign: int, query: int, k: int | None) -> Ranked:
        """At most k rows whose values have this sign, largest in size first."""
        count = checked_count(self.k if k is None else k, "k", hint="5 rows of each kind")
        keys = sign * self.scores.values[self._place(query)]
        rows = np.argsort(-keys, kind="stable")[:count]
        rows = rows[keys[rows] > 0]
        return Ranked(
            rows,
            self.scores.values[query, rows],
            None if self.labels is None else self.labels[rows],
            self.distances[query, rows],
            self.feature_distances[query, rows],
            None if self.scores.ids is None else self.scores.ids[rows],
        )

    def _place(self, query: int) -> int:
        if not 0 <= query < len(self.scores.values):
            message = f"Query {query} does not exist: there are {len(self.scores.values)}, numbered from 0."
            raise RowOutOfRange(message)
        return query


def understand(
    influence: uw.Influence,
    on: tuple[Any, ...] | uw.Examples,
    *,
    X: Any = None,
    Xq: Any = None,
    k: int = 5,
    describe: Callable[[int], str] | None = None,
) -> Understanding:
    """What a model's answers rest on: helpful and harmful rows, their class and distance, and how few carry it.

    Cost: `on_loss`, and q · n distances: 2·q·n·d flops in the inputs.

    Args:
        influence: of the model.
        on: (Xq, yq) or Examples, the queries.
        X: the training inputs as the model takes them, for distances between inputs; None takes what the objective sees
            (`upweight.features`) for both, which is the same unless a network, a kernel or a Pipeline lies between.
        Xq: the queries' inputs in the form of X; None takes those of `on`.
        k: how many rows of each kind are shown.
        describe: turns a training row into a few words.

    Raises:
        InvalidInput: if X does not have the training rows' number, or the inputs are no arrays.
        NotPositiveDefinite: if no query has a value, for the training rows do not determine what the model says there.

    References: Koh & Liang (2017), section 5.1 and figure 4.

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> influence = uw.explain(LogisticRegression(tol=1e-8, max_iter=1000).fit(X, y), X, y)
    >>> found = understand(influence, (X[70:71], y[70:71]))
    >>> int(found.predicted[0]), int(found.targets[0]), found.helpful().labels.tolist()
    (2, 1, [1, 1, 1, 1, 1])
    """
    checked_count(k, "k", hint="5 rows of each kind")
    queries = influence.queries(on)
    scores = influence.on_loss(queries)
    feature_distances, why = _feature_distances(influence, queries)
    apart = feature_distances if X is None else distances(_inputs(on) if Xq is None else Xq, X)
    if apart.shape != scores.values.shape:
        message = f"X and Xq hold {apart.shape[1]} rows and {apart.shape[0]} queries, and there are {influence.n} and "
        raise InvalidInput(message + f"{len(queries)}. Pass all training rows, and the queries, in one form.")
    labels = uw.training_labels(influence)
    several = labels is None and isinstance(influence.examples.batch([0])[0], Mapping)  # tokens: no answer of a row
    said = None if several else uw.predict(influence, queries)
    return Understanding(
        scores,
        apart,
        feature_distances,
        labels,
        uw.query_labels(influence, queries),
        None if said is None else said.labels,
        np.empty((len(queries), 0)) if said is None else said.outputs,
        min(k, influence.n),
        describe,
        why if X is None else "",
    )


def _feature_distances(influence: uw.Influence, queries: uw.Examples) -> tuple[NDArray[np.float64], str]:
    """(q, n), and why they are NaN where inputs are no lines of numbers, as rows of named parts."""
    first = influence.examples.batch([0])
    x = first[0] if isinstance(first, tuple | list) else first
    if not isinstance(x, Mapping):
        return distances(uw.features(influence, queries), uw.features(influence)), ""
    why = (
        f"rows are made of {', '.join(map(str, x))}, which form no line of numbers. Pass one for every row and query, "
        "such as embeddings of the texts: understand(…, X=…, Xq=…)."
    )
    return np.full((len(queries), influence.n), np.nan), why


@dataclass(frozen=True)
class SideBySide:
    """Two models' answers to the same queries, row by row.

    Args:
        names: of the two models.
        first, second: what each rests on.
    """

    names: tuple[str, str]
    first: Understanding
    second: Understanding

    @property
    def agreement(self) -> Float[NDArray[np.float64], " q"]:
        """Spearman's correlation of the two models' values over all rows, for each query."""
        return _rank_correlations(self.first.scores.values, self.second.scores.values)

    @property
    def _known(self) -> NDArray[np.int64]:
        """The queries that have a value with both models."""
        return np.intersect1d(self.first._known, self.second._known)

    def shared(self, k: int = 20) -> Float[NDArray[np.float64], " q"]:
        """The share of each query's k most helpful rows that both models have in common.

        Where fewer rows help, of as many as help with the model for which more do; NaN where none does with either.
        """
        shares = np.full(len(self.first.scores.values), np.nan)
        for query in range(len(shares)):
            a, b = (found.helpful(query, k).rows for found in (self.first, self.second))
            if len(a) + len(b):
                shares[query] = len(np.intersect1d(a, b)) / max(len(a), len(b))
        return shares

    def _repr_html_(self) -> str:
        known = self._known
        lines = [
            [
                notebook.plain(name),
                *(notebook.plain(_mean(fading), "+.3f") for fading in (found.locality, found.feature_locality)),
                notebook.plain(np.median(found.half[known]) if len(known) else np.nan, ".0f"),
            ]
            for name, found in zip(self.names, (self.first, self.second), strict=True)
        ]
        head = ["model", "locality in inputs", "in features", "rows with half of the influence"]
        return notebook.shown(notebook.table(self._asked, head, lines), said=[self._common])

    @property
    def _asked(self) -> str:
        """How many queries, and what is told of them."""
        known, asked = self._known, len(self.agreement)
        without = f" (of {asked}: the others have no value with one of the models)" if len(known) < asked else ""
        return f"{len(known)} queries{without}; means over them, of the number of rows the median"

    @property
    def _common(self) -> str:
        """What both models have in common, in a sentence."""
        k = min(20, self.first.scores.values.shape[1])
        shared = self.shared(k)
        common = "nothing helps" if np.isnan(shared).all() else f"{_mean(shared):.0%} are the same"
        return f"rank correlation of their values {_mean(self.agreement):+.3f}; of the {k} most helpful rows {common}"

    def __str__(self) -> str:
        width, known = max(len(name) for name in self.names), self._known
        lines = [
            f"{name:<{width}}  locality {_mean(found.locality):+.3f} in inputs, "
            f"{_mean(found.feature_locality):+.3f} in features; half of the influence in "
            f"{np.median(found.half[known]) if len(known) else float('nan'):.0f} rows"
            for name, found in zip(self.names, (self.first, self.second), strict=True)
        ]
        return "\n".join([self._asked, *lines, self._common])

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "agreement": self.agreement.tolist(),
            self.names[0]: self.first.to_dict(),
            self.names[1]: self.second.to_dict(),
        }


def side_by_side(found: Mapping[str, Understanding]) -> SideBySide:
    """Two models on the same queries: does the same data stand behind the same answer?

    Args:
        found: two understandings of the same queries and training rows, by the models' names.

    Raises:
        InvalidInput: if there are not two, or their queries or rows differ in number.
    """
    if len(found) != 2:
        message = f"found holds {len(found)} understandings. Pass two: side_by_side({{'SVM': a, 'network': b}})."
        raise InvalidInput(message)
    (one, a), (other, b) = found.items()
    if a.scores.values.shape != b.scores.values.shape:
        message = (
            f"{one} has {a.scores.values.shape} values and {other} {b.scores.values.shape}. Ask both models the same "
            "queries, on the same training rows."
        )
        raise InvalidInput(message)
    return SideBySide((one, other), a, b)


def _far(distance: float) -> str:
    return "–" if np.isnan(distance) else f"{distance:.4g}"


def _inputs(on: tuple[Any, ...] | uw.Examples) -> Any:
    """The queries' inputs as they were given."""
    return on.x if isinstance(on, uw.Examples) else on[0]


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of those that are defined; NaN if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _rank_correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> Float[NDArray[np.float64], " q"]:
    """Spearman's correlation of each pair of lines."""
    ranks = [scipy.stats.rankdata(values, axis=1) for values in (a, b)]
    x, y = (values - values.mean(1, keepdims=True) for values in ranks)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, (x * y).sum(1) / size, np.nan)
