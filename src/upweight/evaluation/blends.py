"""Scores of several kinds as one ranking: EKFAC, a certified solve, derivatives through trainings.

    z_k[q, i] = values_k[q, i] / √(mean over rows of values_k[q, ·]²),       values_k the mean over the runs of kind k
    values[q, i] = Σ_k w_k z_k[q, i],        Σ_k w_k = 1

Kinds err in different places, so that their mean may rank rows better than any of them. It is no predicted change of
anything: kinds differ in scale, and dividing by it loses the unit. Zero stays zero, and the sign keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.data.ids import same_names
from upweight.errors import InvalidInput
from upweight.evaluation.lds import LEFT_OUT, left_out_sums, spearman
from upweight.evaluation.subsets import SubsetOutcomes
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores

_STEPS = 10  # weights are tenths


def blended(kinds: Mapping[str, Scores | Sequence[Scores]], outcomes: SubsetOutcomes | None = None) -> Scores:
    """The weighted mean of scores of several kinds, each divided by its own size for every query.

    Without outcomes all kinds weigh the same. With them, the weights of a query are those tenths that give the other
    queries the highest LDS, never looking at the query itself; the certificate states their mean over queries.

    The standard error is the spread of all members around the mean, over the root of their number, each weighing its
    share. It says how far the mean of other runs would lie, where kinds have several.

    Args:
        kinds: for each name the scores of the same queries and rows, or a list of those of several runs, whose mean
            counts as one kind.
        outcomes: what training on subsets really did to these queries.

    Raises:
        InvalidInput: if there are fewer than two kinds, or they do not stand for the same queries and rows, or there
            are fewer than three queries to choose weights by, or the outcomes are of others.

    >>> import numpy as np, upweight as uw
    >>> X, y = np.arange(8.0)[:, None], np.arange(8.0) ** 1.2
    >>> from sklearn.linear_model import Ridge
    >>> influence = uw.explain(Ridge().fit(X, y), X, y)
    >>> exact, dot = influence.on_loss(X[:2], y[:2]), uw.baselines.gradient_dot(influence, X[:2], y[:2])
    >>> uw.blended({"exact": exact, "gradients": dot}).values.shape
    (2, 8)
    """
    runs = _checked(kinds)
    means = [_sized(np.mean([one.values for one in of_kind], 0)) for of_kind in runs.values()]
    if outcomes is None:
        weights = np.full((len(means[0]), len(means)), 1 / len(means))
        how = "equal weights"
    else:
        weights, how = _chosen(means, [of_kind[0] for of_kind in runs.values()], outcomes)
    values = np.einsum("qk,kqr->qr", weights, np.stack(means))
    first = next(iter(runs.values()))[0]
    told = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(runs, weights.mean(0), strict=True))
    parts = [one.certificate for of_kind in runs.values() for one in of_kind]
    return Scores(
        values,
        f"none: mean of standardised {' and '.join(runs)}",
        first.rows,
        first.n,
        Certificate.unsolved(
            len(values), min(part.coverage for part in parts), f"mean of standardised scores, {how}: {told}"
        ),
        measure=first.measure,
        standard_error=_spread(values, weights, list(runs.values())),
        ids=first.ids,
        query_ids=first.query_ids,
        axes=first.axes,
    )


def _checked(kinds: Any) -> dict[str, list[Scores]]:
    """The scores of every kind as a list, all of the same queries and rows.

    Raises:
        InvalidInput: if they are not.
    """
    listed = {
        str(name): [given] if isinstance(given, Scores) else list(given)
        for name, given in (kinds.items() if isinstance(kinds, Mapping) else ())
    }
    every = [one for of_kind in listed.values() for one in of_kind]
    if len(listed) < 2 or not all(listed.values()) or not all(isinstance(one, Scores) for one in every):
        message = (
            f"{len(listed)} kinds of scores were given. Name two or more, each with its Scores or a list of them: "
            "uw.blended({'EKFAC': influence.on_loss(X), 'training': [through.on_loss(X) for through in runs]})."
        )
        raise InvalidInput(message)
    first = every[0]
    for name, of_kind in listed.items():
        for one in of_kind:
            same = one.values.shape == first.values.shape and np.array_equal(one.rows, first.rows)
            named = one.query_ids is None or first.query_ids is None or same_names(one.query_ids, first.query_ids)
            if not same or not named or one.measure != first.measure or not same_names(one.ids, first.ids):
                message = (
                    f"'{name}' holds {one.values.shape[0]} queries × {one.values.shape[1]} rows of {one.measure}, and "
                    f"the first kind {first.values.shape[0]} × {first.values.shape[1]} of {first.measure}, or other "
                    "queries or rows. Pass scores of the same queries, rows and measure: on_loss(Xq, yq) of each."
                )
                raise InvalidInput(message)
            if _question(one) != _question(first):
                message = (
                    f"'{name}' tells of '{one.counterfactual}', and the first kind of '{first.counterfactual}': their "
                    "signs mean different things. Pass scores of one question: on_loss(Xq, yq) of each."
                )
                raise InvalidInput(message)
    return listed


def _question(scores: Scores) -> str:
    """What is asked: all that tells of leaving rows out is one question."""
    return LEFT_OUT[0] if scores.counterfactual.startswith(LEFT_OUT) else scores.counterfactual


def _sized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values over the root of their mean square, query by query; 0 where all are, NaN where one is."""
    size = np.sqrt((values**2).mean(1, keepdims=True))
    return np.divide(values, size, out=np.zeros_like(values), where=size != 0)


def _chosen(
    means: list[NDArray[np.float64]], like: list[Scores], outcomes: SubsetOutcomes
) -> tuple[NDArray[np.float64], str]:
    """(q, k) weights, each query's chosen by the others, and how that is told.

    Raises:
        InvalidInput: if there are fewer than three queries, or the outcomes are of others.
    """
    if len(means[0]) < 3:
        message = (
            f"There are {len(means[0])} queries, and the weights of each are chosen by at least two others. Pass "
            "scores and outcomes of more queries, or no outcomes: uw.blended(kinds) weighs all kinds the same."
        )
        raise InvalidInput(message)
    sums = [left_out_sums(replace(one, values=mean), outcomes) for one, mean in zip(like, means, strict=True)]
    grid = np.array(
        [
            np.bincount(picks, minlength=len(means)) / _STEPS
            for picks in combinations_with_replacement(range(len(means)), _STEPS)
        ]
    )
    stacked = np.stack(sums)  # (k, q, s)
    found = np.stack(
        [np.nan_to_num(spearman(np.einsum("k,kqs->qs", one, stacked), outcomes.mean)) for one in grid]
    )  # (grid, q)
    others = found.sum(1, keepdims=True) - found
    best = others.argmax(0)
    held_out = float(found[best, np.arange(found.shape[1])].mean())
    return grid[best], f"weights chosen by the other queries (LDS {held_out:.3f} on those left out)"


def _spread(values: NDArray[np.float64], weights: NDArray[np.float64], runs: list[list[Scores]]) -> NDArray[np.float64]:
    """√(m/(m − 1) Σ ω²(z − mean)²), over all m members, ω a member's share."""
    count = sum(map(len, runs))
    total = np.zeros_like(values)
    for kind, of_kind in enumerate(runs):
        for one in of_kind:
            share = weights[:, kind : kind + 1] / len(of_kind)
            total += (share * (_sized(one.values) - values)) ** 2
    return np.sqrt(count / (count - 1) * total)
