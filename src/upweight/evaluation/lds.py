"""How well scores predict what training on random subsets does: the linear datamodeling score, and its noise ceiling.

    predicted[q, s] = Σ_{i not in subset s} values[q, i]        the change of query q's measure when those rows go
    actual[q, s]    = mean over m seeds of the measure after training on subset s
    LDS             = mean over queries of Spearman's correlation over subsets of predicted and actual

`values` are removal values: they rise where the row helps, and so does the measure of a model that was trained without
it. Only ranks count, so scores in any unit can be compared, and so can baselines and TracIn, whose values are positive
where the row helps: then the measure has to be one that rises when the model gets worse, like the loss.

The ceiling says how much of `actual` is there to be predicted at all. With r the correlation over subsets between the
mean of h seeds and the mean of h others (averaged over splits and queries), the reliability of one seed is

    ρ₁ = r / (h − (h − 1) r),       of the mean of m seeds ρ_m = m ρ₁ / (1 + (m − 1) ρ₁)        (Spearman–Brown)

and a perfect prediction of the expected outcome correlates √ρ_m with the mean of m seeds, √ρ₁ with a single one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from upweight.data import markup
from upweight.errors import InvalidInput, TheoryWarning, checked_count
from upweight.evaluation.leave_one_out import checked_level, of_others
from upweight.evaluation.subsets import SubsetOutcomes
from upweight.influence.scores import Scores

LEFT_OUT = ("row removed", "row without weight", "none: ")  # how counterfactuals begin that tell of leaving rows out
_SPLITS = 64  # halvings of the seeds that a ceiling averages over, at most


@dataclass(frozen=True)
class LDS:
    """The linear datamodeling score of some scores, with its confidence interval and noise ceiling.

    Args:
        value: mean over queries of Spearman's correlation between predicted and actual (mean over seeds).
        low, high: bootstrap interval of `value`, percentiles around it; both queries and subsets are resampled, seeds
            are not.
        per_query: (q,) the correlations; NaN where prediction or outcome is the same for all subsets, counted as 0.
        ceiling: what a perfect prediction would reach, √ρ_m of the mean agreement; NaN with a single seed.
        one_seed: the same score against single seeds, averaged over them: the ground truth of a single retraining.
        one_seed_ceiling: what a perfect prediction would reach there, √ρ₁.
        subsets: how many subsets were compared.
        seeds: how many seeds `actual` is the mean of.
        level: of the interval.
    """

    value: float
    low: float
    high: float
    per_query: Float[NDArray[np.float64], " q"]
    ceiling: float
    one_seed: float
    one_seed_ceiling: float
    subsets: int
    seeds: int
    level: float = 0.95

    def _repr_html_(self) -> str:
        known = self.seeds > 1
        ceiling = f"{self.ceiling:.3f}, what a perfect prediction would reach" if known else "unknown, one seed"
        pairs = [
            ("value", f"{self.value:.3f}, {self.level:.0%} interval {self.low:.3f} to {self.high:.3f}"),
            ("ceiling", ceiling),
            ("against one seed", f"{self.one_seed:.3f}" + (f", ceiling {self.one_seed_ceiling:.3f}" if known else "")),
            ("compared", f"{len(self.per_query)} queries × {self.subsets} subsets × {self.seeds} seed(s)"),
        ]
        return markup.facts("Linear datamodeling score", pairs, note="Mean over queries of Spearman's correlation.")

    def __str__(self) -> str:
        text = f"LDS {self.value:.3f} ({self.level:.0%} interval {self.low:.3f} to {self.high:.3f}"
        ceiling = f"; ceiling {self.ceiling:.3f}" if self.seeds > 1 else "; ceiling unknown, one seed"
        return f"{text}{ceiling}) over {len(self.per_query)} queries × {self.subsets} subsets × {self.seeds} seed(s)"

    def __repr__(self) -> str:
        return f"LDS({str(self)[4:]})"


def lds(
    scores: Scores,
    outcomes: SubsetOutcomes,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LDS:
    """The linear datamodeling score: how well removal values rank what training on subsets really does.

    Cost: resamples × q × s numbers, a second or two for 1,000 × 500 × 100.

    Args:
        scores: removal values of all n rows, for the queries of the outcomes: from on_loss, on_measure, an ensemble, a
            baseline or TracIn. For the last two the outcomes' measure must rise when the model gets worse.
        outcomes: from `subset_retraining`.
        level: of the bootstrap interval.
        resamples: how many bootstrap samples; queries and subsets are drawn with replacement in each.
        seed: of the bootstrap and of the halvings behind the ceiling.

    Raises:
        InvalidInput: if scores and outcomes do not hold the same queries, rows and measure, or there are fewer than
            three subsets.

    References: Park et al., TRAK (2023); Ilyas et al., Datamodels (2022); Spearman (1910) and Brown (1910).
    """
    checked_count(resamples, "resamples")
    checked_level(level)
    predicted = left_out_sums(scores, outcomes)
    actual = outcomes.mean
    m = len(outcomes.seeds)
    per_query = spearman(predicted, actual)
    single = [np.nan_to_num(spearman(predicted, outcomes.values[:, :, k])).mean() for k in range(m)]
    value = float(np.nan_to_num(per_query).mean())
    resampled = _bootstrap(predicted, actual, resamples, seed)
    resampled += value - resampled.mean()  # subsets that are drawn twice lower a rank correlation a little
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    top, top_one = _pooled_ceilings(outcomes, seed)
    return LDS(
        value,
        float(low),
        float(high),
        per_query,
        top,
        float(np.mean(single)),
        top_one,
        actual.shape[1],
        m,
        level,
    )


def ceilings(
    outcomes: SubsetOutcomes, *, seed: int = 0
) -> tuple[Float[NDArray[np.float64], " q"], Float[NDArray[np.float64], " q"]]:
    """√ρ_m and √ρ₁ of every query: what a perfect prediction reaches against the mean of all seeds, and against one.

    NaN with a single seed. A query whose seeds do not agree at all (r ≤ 0) has the ceiling 0.
    """
    return _roots(_agreement_of_halves(outcomes, seed), len(outcomes.seeds))


def _pooled_ceilings(outcomes: SubsetOutcomes, seed: int) -> tuple[float, float]:
    """The same from the mean agreement over queries: the root of a noisy r, query by query, would be biased."""
    top, top_one = _roots(_agreement_of_halves(outcomes, seed).mean(keepdims=True), len(outcomes.seeds))
    return float(top[0]), float(top_one[0])


def _agreement_of_halves(outcomes: SubsetOutcomes, seed: int) -> NDArray[np.float64]:
    """Spearman's r between the means of two halves of the seeds, over all halvings, for every query."""
    q, _, m = outcomes.values.shape
    if m < 2:
        return np.full(q, np.nan)
    r = np.zeros(q)
    splits = _splits(m, m // 2, seed)
    for one, other in splits:
        halves = (outcomes.values[:, :, part].mean(2) for part in (one, other))
        r += np.nan_to_num(spearman(*halves)) / len(splits)
    return r


def _roots(r: NDArray[np.float64], m: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spearman and Brown: the reliability of m seeds and of one, from that of m // 2; and their roots."""
    h = max(1, m // 2)
    r = np.clip(r, 0, 1)
    one_seed = r / (h - (h - 1) * r)
    whole = m * one_seed / (1 + (m - 1) * one_seed)
    return np.sqrt(whole), np.sqrt(one_seed)


def spearman(a: Float[NDArray[np.float64], "q s"], b: Float[NDArray[np.float64], "q s"]) -> NDArray[np.float64]:
    """Spearman's rank correlation of every line of a with that of b, ties at their middle rank; NaN for constants."""
    counts = np.ones(a.shape[1])
    return _correlation(_Ranks(a).weighted(counts), _Ranks(b).weighted(counts), counts)


class _Ranks:
    """The middle ranks of every line when column s occurs counts[s] times: a bootstrap sample without sorting again."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.order = np.argsort(values, axis=1, kind="stable")
        line = np.take_along_axis(values, self.order, 1)
        q, s = line.shape
        new = np.concatenate([np.ones((q, 1), bool), line[:, 1:] != line[:, :-1]], 1)  # where a group of ties begins
        place = np.arange(s)
        self.first = np.maximum.accumulate(np.where(new, place, 0), 1)
        ends = np.concatenate([new[:, 1:], np.ones((q, 1), bool)], 1)
        self.last = np.minimum.accumulate(np.where(ends, place, s)[:, ::-1], 1)[:, ::-1]

    def weighted(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """(q, s) ranks, from (number below + 1) to (number not above) in the middle."""
        upto = np.cumsum(counts[self.order], 1)
        before = upto - counts[self.order]
        middle = (np.take_along_axis(before, self.first, 1) + np.take_along_axis(upto, self.last, 1) + 1) / 2
        ranks = np.empty_like(middle)
        np.put_along_axis(ranks, self.order, middle, 1)
        return ranks


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    total = counts.sum()
    a = a - (a @ counts / total)[:, None]
    b = b - (b @ counts / total)[:, None]
    both, one, other = (a * b) @ counts, (a * a) @ counts, (b * b) @ counts
    constant = np.minimum(one, other) <= 1e-9 * total
    return np.where(constant, np.nan, both / np.sqrt(np.where(constant, 1, one * other)))


def _bootstrap(a: NDArray[np.float64], b: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    draw = np.random.default_rng(seed)
    q, s = a.shape
    one, other = _Ranks(a), _Ranks(b)
    means = np.empty(resamples)
    for k in range(resamples):
        counts = np.bincount(draw.integers(s, size=s), minlength=s).astype(np.float64)
        lines = np.bincount(draw.integers(q, size=q), minlength=q)
        means[k] = np.nan_to_num(_correlation(one.weighted(counts), other.weighted(counts), counts)) @ lines / q
    return means


def _splits(m: int, h: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of disjoint sets of h seeds: all of them, or 64 random ones."""
    if m <= 6:
        return [
            (list(one), list(other))
            for one in combinations(range(m), h)
            for other in combinations([k for k in range(m) if k not in one], h)
            if one < other
        ]
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(m).tolist() for _ in range(_SPLITS)]
    return [(order[:h], order[h : 2 * h]) for order in orders]


def left_out_sums(scores: Scores, outcomes: SubsetOutcomes) -> NDArray[np.float64]:
    """(q, s) the sum of the values of the rows that each subset leaves out.

    Raises:
        InvalidInput: if scores and outcomes do not belong together.
    """
    if not isinstance(scores, Scores) or not isinstance(outcomes, SubsetOutcomes):
        message = (
            f"lds(scores, outcomes) got {type(scores).__name__}, {type(outcomes).__name__}. Pass Scores of all rows "
            "and the SubsetOutcomes of subset_retraining."
        )
        raise InvalidInput(message)
    if not scores.counterfactual.startswith(LEFT_OUT) or scores.measure != outcomes.measure:
        message = (
            f"The scores predict the change of {scores.measure} for '{scores.counterfactual}'; the outcomes are "
            f"{outcomes.measure} after rows were left out. Compare like with like: on_loss, or on_measure with "
            "subset_retraining(…, measure=…)."
        )
        raise InvalidInput(message)
    q, s, _ = outcomes.values.shape
    n = outcomes.subsets.shape[1]
    if scores.values.shape != (q, n) or not np.array_equal(np.sort(scores.rows), np.arange(n)):
        message = (
            f"The scores hold {scores.values.shape[0]} queries × {scores.values.shape[1]} rows, the outcomes {q} "
            f"queries × subsets of {n} rows. A subset's effect is a sum over all rows left out: pass scores of the "
            "same queries and of every training row."
        )
        raise InvalidInput(message)
    if others := of_others(scores, outcomes.query_values):
        message = (
            f"{others} Are they other queries, or another model? Pass scores of the same queries by the same influence "
            "to both."
        )
        warnings.warn(message, TheoryWarning, stacklevel=3)
    if s < 3:
        message = (
            f"There are {s} subsets, and a rank correlation needs at least 3. Train on more: random_subsets({n}, 100) "
            "gives a usable interval."
        )
        raise InvalidInput(message)
    return scores.values @ (~outcomes.subsets[:, scores.rows]).astype(np.float64).T
