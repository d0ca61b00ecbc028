"""The queue's statement about itself, against simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from made import labels
from scipy.optimize import minimize_scalar
from scipy.stats import chi2

from upweight.errors import InvalidInput
from upweight.explore import intervals
from upweight.explore.entries import Verdict
from upweight.explore.labels import Labels
from upweight.explore.queue import ORDERS, Planned, Queue, _first, planned, progress

n = 400


def rows_with_scores(seed: int = 0) -> Labels:
    draw = np.random.default_rng(seed)
    scores = {name: draw.random(n) for name in ("self-influence", "loss", "margin")}
    return Labels("w", (0, 1), np.zeros(n, np.int32), np.ones(n, np.int32), scores)


def said(rows, wrong, skipped=()):
    actions = {row: "skip" if row in skipped else "relabel" if wrong[row] else "keep" for row in rows}
    return {row: Verdict(row, action, 0, None, 1) for row, action in actions.items()}


@pytest.mark.parametrize("by", ORDERS)
def test_a_queue_shows_each_row_once_and_the_suspicious_in_their_order(by):
    known = rows_with_scores()
    plan = planned(Queue(by, 150, 0.3, seed=3), known)
    shown = plan.rows.tolist()
    assert len(set(shown)) == 150
    assert set(shown) <= set(plan.order.tolist()) | set(plan.draws.tolist())
    if by != "random":
        assert plan.order.tolist() == np.argsort(-known.scores[by])[: len(plan.order)].tolist()
    for place in range(151):
        first = set(shown[:place])
        assert set(plan.order[: plan.ranked[place]].tolist()) <= first
        assert set(plan.draws[: plan.drawn[place]].tolist()) <= first
        assert len(first) <= plan.ranked[place] + plan.drawn[place]
    again = planned(Queue(by, 150, 0.3, seed=3), known)
    assert again.rows.tolist() == shown
    assert planned(Queue(by, 400, 0.3), known).rows.tolist() != shown
    assert sorted(planned(Queue(by, 5000, 0.3), known).rows.tolist()) == list(range(n))


def test_the_place_of_a_row_does_not_tell_that_it_is_a_control():
    """Over many seeds, controls stand at every place equally often."""
    counts, known = np.zeros(60), rows_with_scores()
    for seed in range(300):
        plan = planned(Queue(budget=60, controls=0.25, seed=seed), known)
        counts += np.diff(plan.drawn)
    assert chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum() / 0.75, 59) > 1e-3
    assert abs(counts.mean() / 300 - 0.25) < 0.01


def test_what_is_said_is_counted_by_hand():
    known, wrong = rows_with_scores(), np.zeros(n, bool)
    plan = planned(Queue(budget=40, controls=0.25, seed=1), known)
    wrong[plan.order[:7]] = True
    verdicts = said(plan.rows.tolist(), wrong)
    told = progress(plan, verdicts, known)
    controls = plan.draws.tolist()
    assert (told.reached, told.looked, told.places) == (40, 40, 40)
    assert (told.queue.wrong, told.queue.decided) == (7, len(plan.order))
    assert (told.controls.wrong, told.controls.decided) == (int(wrong[controls].sum()), len(controls))
    assert told.low >= 7
    gap = int(plan.rows[11])
    del verdicts[gap]
    told = progress(plan, verdicts, known)
    assert (told.reached, told.looked) == (11, 39)
    assert told.controls.decided == plan.drawn[11]
    undone = verdicts | {gap: Verdict(gap, None, 0, None, 2)}
    assert progress(plan, undone, known).reached == 11
    skipped = said(plan.rows.tolist(), wrong, skipped={gap})
    told = progress(plan, skipped, known)
    assert told.reached == 40
    assert told.queue.skipped + told.controls.skipped >= 1
    assert "1 could not be told" in told.says()[-1]
    both = next(row for row in controls if row in plan.order.tolist())  # counts in both shares, and is one row
    told = progress(plan, said(plan.rows.tolist(), wrong, skipped={both}), known)
    assert (told.queue.skipped, told.controls.skipped, told.skipped) == (1, 1, 1)
    assert told.says()[-1].startswith("1 could not be told")


def test_nothing_is_said_before_something_is_known():
    told = progress(planned(Queue("loss", 10), labels()), {}, labels())
    assert told.says() == ["0 of 10 looked at."]
    assert (told.low, told.high) == (0, 20)
    assert (told.queue.low, told.queue.high) == (0, 1)


@pytest.mark.parametrize(("rate", "strength"), [(0.02, 0.0), (0.08, 3.0), (0.3, 1.0)])
def test_the_controls_cover_the_truth(rate, strength):
    """400 data sets with wrong labels that lead the queue more or less: the interval holds the true number in 95 %.

    Of these with rate 0.3 the suspicious rows are mostly wrong, and many of them are drawn as controls as well.
    """
    draw, hits, shares = np.random.default_rng(5), 0, []
    for seed in range(400):
        wrong = draw.random(n) < rate
        score = draw.normal(size=n) + strength * wrong
        zeros = np.zeros(n, np.int32)
        known = Labels("w", (0, 1), zeros, zeros, {"self-influence": score})
        plan = planned(Queue(budget=120, controls=0.3, seed=seed), known)
        told = progress(plan, said(plan.rows.tolist(), wrong), known)
        low, high = intervals.total(told.controls.wrong, told.controls.decided, n)
        hits += low <= wrong.sum() <= high
        shares.append(told.controls.wrong / told.controls.decided - wrong.mean())
        assert told.queue.wrong == wrong[plan.order].sum()
    assert hits / 400 > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 400)
    assert abs(np.mean(shares)) < 4 * np.std(shares) / np.sqrt(400)  # and without bias


def test_shares_cover_the_truth():
    """Exactly: the probability of the counts whose interval holds the share."""
    from scipy.stats import binom

    ends = [intervals.share(hits, 60) for hits in range(61)]
    for p in (0.0, 0.01, 0.2, 0.5, 0.97):
        assert sum(binom.pmf(hits, 60, p) for hits, (low, high) in enumerate(ends) if low <= p <= high) >= 0.95


def test_intervals_are_scipys():
    from scipy.stats import binomtest

    for hits, of in [(0, 1), (1, 1), (0, 30), (3, 30), (30, 30), (499, 1000), (1, 20_000)]:
        found = binomtest(hits, of).proportion_ci(0.95, "exact")
        assert intervals.share(hits, of) == pytest.approx((found.low, found.high), abs=1e-9)
    assert intervals.share(0, 0) == (0, 1)
    for gained, lost in [(0, 0), (1, 0), (5, 0), (7, 5), (5, 7), (40, 12), (900, 1000)]:
        expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert intervals.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-8)


def test_totals_of_a_million_rows_are_scipys():
    from scipy.stats import hypergeom

    low, high = intervals.total(7, 300, 1_000_000)
    assert hypergeom.sf(6, 1_000_000, low, 300) > 0.025 >= hypergeom.sf(6, 1_000_000, low - 1, 300)
    assert hypergeom.cdf(7, 1_000_000, high, 300) > 0.025 >= hypergeom.cdf(7, 1_000_000, high + 1, 300)


def test_totals_are_those_of_a_list_of_all_numbers():
    """By the definition: every number of hits is asked whether it would be rejected."""
    from scipy.stats import hypergeom

    for hits, drawn, rows in [(0, 5, 30), (2, 5, 30), (5, 5, 30), (3, 29, 30), (0, 0, 30), (30, 30, 30), (1, 12, 200)]:
        kept = [
            D
            for D in range(hits, rows - drawn + hits + 1)
            if hypergeom.sf(hits - 1, rows, D, drawn) > 0.025 and hypergeom.cdf(hits, rows, D, drawn) > 0.025
        ]
        assert intervals.total(hits, drawn, rows) == (kept[0], kept[-1])


def test_the_likeliest_share_of_losses_is_found_by_search_too():
    """Of q queries g gained and k lost, with shares p + Δ and p: the likelihood of three outcomes."""
    for g, k, q, delta in [(12, 2, 50, 0.1), (3, 9, 40, 0.2), (5, 5, 30, -0.1), (0, 4, 25, 0.05)]:

        def loss(p, g=g, k=k, q=q, delta=delta):
            return -(g * np.log(p + delta) + k * np.log(p) + (q - g - k) * np.log(1 - 2 * p - delta))

        low, high = max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9
        best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
        assert intervals.likeliest_lost(g, k, q, delta) == pytest.approx(best, abs=2e-6)


def test_differences_cover_the_truth_and_agree_with_mcnemar():
    draw = np.random.default_rng(2)
    for gain, loss in [(0.06, 0.02), (0.1, 0.1), (0.01, 0.03), (0.3, 0.05)]:
        counts = draw.multinomial(200, [gain, loss, 1 - gain - loss], size=400)
        inside = [
            low <= gain - loss <= high
            for low, high in (intervals.difference(int(g), int(k), 200) for g, k, _ in counts)
        ]
        assert np.mean(inside) > 0.92
    low, high = intervals.difference(12, 2, 50)
    assert (-high, -low) == pytest.approx(intervals.difference(2, 12, 50))
    for gained, lost in [(10, 2), (8, 2), (9, 2), (6, 6), (4, 0), (3, 0)]:
        z = (gained - lost) / np.sqrt(gained + lost)
        assert (intervals.difference(gained, lost, 500)[0] > 0) == (z > 1.959964)
    assert intervals.mcnemar(0, 0) == 1.0
    assert intervals.difference(5, 0, 5)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"by": "size"}, {"budget": 0}, {"controls": 1.0}, {"seed": -1}])
def test_queues_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidInput):
        Queue(**settings)


def test_an_order_that_the_run_lacks_is_refused():
    with pytest.raises(InvalidInput, match="holds no self-influence"):
        planned(Queue(), labels())
    assert isinstance(planned(Queue("loss"), labels()), Planned)


def test_the_first_of_many_are_those_of_a_stable_sort():
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 40, size=500).astype(float)
    keys[draw.choice(500, 100, replace=False)] = np.nan
    whole = np.argsort(keys, kind="stable")
    for count in (1, 7, 60, 399, 400, 401, 500, 900):
        found = _first(keys, count)
        assert len(found) >= min(count, 500)
        assert found.tolist() == whole[: len(found)].tolist()
