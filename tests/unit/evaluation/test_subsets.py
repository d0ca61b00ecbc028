"""Subsets, what is kept of them, the datamodeling score against SciPy, its ceiling against a simulation; curves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import upweight as uw
from small import XQ, YQ, ZQ, N, X, Y, Z, classifier, logistic, made, net, refuses, ridge, row
from upweight.evaluation.curves import MislabelCurve
from upweight.evaluation.lds import _bootstrap, _Ranks, ceilings, spearman

DRAW = np.random.default_rng(8)
MASKS = uw.random_subsets(N, 6, seed=3)
Q = len(XQ)


def scores(values=None, **fields):
    values = DRAW.normal(size=(Q, N)) if values is None else values
    settings = {"values": values, "rows": np.arange(N), "n": N, "scale": np.full(N, -1 / N), "query_values": None}
    return made(**settings | fields)


def outcomes(values=None, masks=MASKS, seeds=1):
    values = DRAW.normal(size=(Q, len(masks), seeds)) if values is None else values
    return uw.SubsetOutcomes(values, masks, tuple(range(values.shape[2])))


class Counting:
    """A retrainer that notes what it was asked, and moves θ̂ by what it was asked."""

    def __init__(self, influence, together=1):
        self.theta, self.asked, self.together = influence.objective.theta, [], together

    def __repr__(self):
        return "Counting()"

    def __call__(self, weights, seed=0):
        return self.many([weights], [seed])[0]

    def many(self, weights, seeds):
        self.asked += [(np.array(w), s) for w, s in zip(weights, seeds, strict=True)]
        return [
            self.theta * (1 + (w * np.arange(N)).sum() / 1e4 + 0.01 * s) for w, s in zip(weights, seeds, strict=True)
        ]


# ---- subsets ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 3))
def test_random_subsets_have_their_size_and_their_seed(n, count, seed):
    masks = uw.random_subsets(n, count, 0.5, seed)
    assert masks.shape == (count, n)
    assert masks.sum(1).tolist() == [round(n / 2)] * count
    assert np.array_equal(masks, uw.random_subsets(n, count, 0.5, seed))


def test_random_subsets_keep_every_row_equally_often():
    share = uw.random_subsets(50, 2000, 0.3).mean(0)
    assert share.mean() == pytest.approx(0.3)
    assert np.abs(share - 0.3).max() < 5 * np.sqrt(0.21 / 2000)


def test_masks_lists_and_tensors_are_the_same_subsets():
    influence = ridge()
    forms = [MASKS, torch.from_numpy(MASKS), [np.flatnonzero(m) for m in MASKS], [m.tolist() for m in MASKS]]
    found = [uw.subset_retraining(influence, (XQ, ZQ), form) for form in forms]
    for other in found[1:]:
        assert np.array_equal(other.values, found[0].values)
        assert np.array_equal(other.subsets, MASKS)


def test_weights_seeds_and_places():
    influence = ridge()
    train = Counting(influence, together=4)
    found = uw.subset_retraining(influence, (XQ, ZQ), MASKS, train, seed=5, seeds=2)
    assert [seed for _, seed in train.asked] == [5] * 6 + [6] * 6
    for (weights, _), mask in zip(train.asked, [*MASKS, *MASKS], strict=True):
        assert np.array_equal(weights, mask.astype(float))
    for k, seed in enumerate((5, 6)):
        for s, mask in enumerate(MASKS):
            theta = influence.objective.theta.numpy() * (1 + (mask * np.arange(N)).sum() / 1e4 + 0.01 * seed)
            np.testing.assert_allclose(found.values[:, s, k], (XQ @ theta[:3] + theta[3] - ZQ) ** 2, rtol=1e-9)
    assert found.seeds == (5, 6)
    assert found.measure == "loss"
    np.testing.assert_allclose(found.mean, found.values.mean(2))
    assert np.array_equal(found.with_seeds(1).values, found.values[:, :, :1])
    assert repr(found).startswith("SubsetOutcomes(4 queries × 6 subsets of 50% of 40 rows × 2 seeds: loss)")


def test_any_measure_of_the_queries():
    influence = ridge()

    def height(params, example):
        return (params["coef"] @ example[0])[0]

    found = uw.subset_retraining(influence, (XQ, ZQ), MASKS, measure=height)
    again = uw.Newton().bind(influence)(MASKS[2].astype(float)).numpy()
    np.testing.assert_allclose(found.values[:, 2, 0], XQ @ again[:3], rtol=1e-8)
    assert found.measure == "height"


def test_a_folder_resumes_and_takes_more_seeds(tmp_path):
    influence = ridge()
    whole = uw.subset_retraining(influence, (XQ, ZQ), MASKS, Counting(influence), seeds=3)

    class Stops(Counting):
        def __call__(self, weights, seed=0):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return Counting.__call__(self, weights, seed)

        def many(self, weights, seeds):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return Counting.many(self, weights, seeds)

    with pytest.raises(KeyboardInterrupt):
        uw.subset_retraining(influence, (XQ, ZQ), MASKS, Stops(influence), store=tmp_path / "run")
    go_on = rest = Counting(influence)
    found = uw.subset_retraining(influence, (XQ, ZQ), MASKS, go_on, store=tmp_path / "run")
    assert len(rest.asked) == 2
    assert np.array_equal(found.values, whole.values[:, :, :1])
    more = uw.subset_retraining(influence, (XQ, ZQ), MASKS, go_on, seeds=3, store=tmp_path / "run")
    assert len(rest.asked) == 2 + 12
    assert np.array_equal(more.values, whole.values)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"subsets": uw.random_subsets(N, 6, seed=4)}, "subsets: '6, "),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"on": (XQ + 1, ZQ)}, "queries: "),
        ({"influence": ridge(X=X[::-1].copy(), y=Z[::-1].copy())}, "data: "),
        ({"retrain": uw.LBFGS()}, "retrain: 'Newton.*there, 'LBFGS"),
        (
            {"measure": lambda params, example: (params["coef"] @ example[0])[0]},
            "measure: 'loss' there, '<lambda>' now",
        ),
    ],
    ids=["subsets", "seed", "queries", "data", "retrainer", "measure"],
)
def test_a_folder_of_other_work_is_refused(tmp_path, change, text):
    call = {"influence": ridge(), "on": (XQ, ZQ), "subsets": MASKS, "retrain": uw.Newton()}
    uw.subset_retraining(**call, store=tmp_path / "run")
    refuses(lambda: uw.subset_retraining(**call | change, store=tmp_path / "run"), ValueError, text)


def test_a_measure_of_the_same_name_is_told_apart_by_its_values(tmp_path):
    influence = ridge()

    def make(factor):
        def measure(params, example):
            return factor * (params["coef"] @ example[0])[0]

        return measure

    uw.subset_retraining(influence, (XQ, ZQ), MASKS, measure=make(1.0), store=tmp_path / "run")
    refuses(
        lambda: uw.subset_retraining(influence, (XQ, ZQ), MASKS, measure=make(2.0), store=tmp_path / "run"),
        ValueError,
        "query values differ",
    )


# ---- the score -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.booleans())
def test_spearman_is_scipys(seed, tied):
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(2, 3, 12))
    if tied:
        a, b = np.round(a), np.round(2 * b)
    truth = [scipy.stats.spearmanr(one, other)[0] for one, other in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), truth, rtol=1e-10)


def test_spearman_of_a_constant_is_not_defined():
    assert np.isnan(spearman(np.ones((1, 5)), np.arange(5.0)[None])).all()


@given(st.integers(0, 100), st.booleans())
def test_ranks_of_a_bootstrap_sample_are_those_of_the_sample_written_out(seed, tied):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(2, 9))
    values = np.round(values) if tied else values
    sample = draw.integers(9, size=9)
    counts = np.bincount(sample, minlength=9).astype(float)
    truth = scipy.stats.rankdata(values[:, sample], axis=1)
    np.testing.assert_allclose(_Ranks(values).weighted(counts)[:, sample], truth)


def test_the_bootstrap_is_the_one_written_out():
    a, b = DRAW.normal(size=(2, 5, 30))
    found = _bootstrap(a, b, 20, seed=1)
    draw = np.random.default_rng(1)
    for value in found:
        columns, lines = draw.integers(30, size=30), draw.integers(5, size=5)
        each = [scipy.stats.spearmanr(a[q, columns], b[q, columns])[0] for q in lines]
        assert value == pytest.approx(np.mean(each))


def test_the_prediction_is_the_sum_over_rows_that_are_left_out():
    given_scores, found = scores(), outcomes(seeds=1)
    result = uw.lds(given_scores, found)
    for q in range(Q):
        predicted = [sum(given_scores.values[q, i] for i in np.flatnonzero(~mask)) for mask in MASKS]
        truth = scipy.stats.spearmanr(predicted, found.values[q, :, 0])[0]
        assert result.per_query[q] == pytest.approx(truth)
    assert result.value == pytest.approx(result.per_query.mean())
    assert np.isnan(result.ceiling)
    assert result.one_seed == pytest.approx(result.value)
    assert (result.subsets, result.seeds, result.level) == (6, 1, 0.95)


def test_rows_are_matched_by_number_not_by_place():
    one = scores()
    order = DRAW.permutation(N)
    other = replace(one, values=one.values[:, order], rows=order)
    found = outcomes()
    np.testing.assert_allclose(uw.lds(other, found).per_query, uw.lds(one, found).per_query)


def test_only_ranks_count():
    one = scores()
    found = outcomes(seeds=2)
    same, negative = uw.lds(one, found), uw.lds(replace(one, values=-one.values), found)
    scaled = uw.lds(replace(one, values=1e5 * one.values), replace(found, values=np.exp(found.values)).with_seeds(1))
    np.testing.assert_allclose(scaled.per_query, uw.lds(one, found.with_seeds(1)).per_query)
    assert negative.value == pytest.approx(-same.value)


def simulated(subsets=400, seeds=4, noise=1.5, queries=30, seed=0):
    """Outcomes that are linear in the rows left out, with normal noise of known size."""
    draw = np.random.default_rng(seed)
    masks = uw.random_subsets(N, subsets, seed=seed)
    values = draw.normal(size=(queries, N))
    signal = values @ (~masks).T
    signal_noise = noise * signal.std(1)[:, None, None] * draw.normal(size=(queries, subsets, seeds))
    return scores(values), uw.SubsetOutcomes(signal[:, :, None] + signal_noise, masks, tuple(range(seeds)))


@pytest.mark.parametrize("seeds", [2, 3, 4, 9])
@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_the_ceiling_is_what_a_perfect_prediction_reaches(noise, seeds):
    perfect, found = simulated(noise=noise, seeds=seeds)
    result = uw.lds(perfect, found, resamples=50)
    assert result.ceiling == pytest.approx(result.value, abs=0.015)
    assert result.one_seed_ceiling == pytest.approx(result.one_seed, abs=0.015)
    # ranks of normal variables correlate a little less than the variables: 6/π arcsin(ρ/2)
    pearson = 1 / np.sqrt(1 + noise**2 / seeds)
    assert result.value == pytest.approx(6 / np.pi * np.arcsin(pearson / 2), abs=0.015)


def test_noise_alone_has_the_ceiling_zero():
    nothing = uw.SubsetOutcomes(DRAW.normal(size=(50, 300, 4)), uw.random_subsets(N, 300), tuple(range(4)))
    assert ceilings(nothing)[0].mean() < 0.2


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = uw.lds(*simulated(subsets=3000, seeds=1, queries=200, seed=99), resamples=1).value
    hits = 0
    for seed in range(60):
        result = uw.lds(*simulated(subsets=60, seeds=1, queries=20, seed=seed), resamples=200, level=0.9)
        hits += result.low <= truth <= result.high
        assert result.low < result.value < result.high
    assert hits >= 0.75 * 60


def test_a_query_that_nothing_moves_counts_as_zero():
    found = outcomes()
    still = found.values.copy()
    still[1] = 0.3
    result = uw.lds(scores(), replace(found, values=still))
    assert np.isnan(result.per_query[1])
    assert result.value == pytest.approx(np.nansum(result.per_query) / Q)


def test_baselines_are_ranked_too():
    one, found = scores(), outcomes()
    other = replace(one, counterfactual="none: dot product")
    assert uw.lds(other, found).value == uw.lds(one, found).value


def test_texts():
    one = str(uw.lds(scores(), outcomes()))
    assert "ceiling unknown, one seed" in one
    assert "over 4 queries × 6 subsets × 1 seed(s)" in one
    assert "; ceiling 0." in str(uw.lds(*simulated(subsets=50, seeds=2), resamples=10))


BAD = [
    row("n of nothing", ValueError, "n=0", lambda: uw.random_subsets(0, 3)),
    row("all rows", ValueError, "keeps 10 of them", lambda: uw.random_subsets(10, 3, 1.0)),
    row("no rows", ValueError, "keeps 0 of them", lambda: uw.random_subsets(10, 3, 0.01)),
    row("no fraction", ValueError, "fraction=half", lambda: uw.random_subsets(10, 3, "half")),
    row("no seeds", ValueError, "seeds=0", lambda: uw.subset_retraining(ridge(), (XQ, ZQ), MASKS, seeds=0)),
    row(
        "masks of other rows",
        ValueError,
        "one column for each training row",
        lambda: uw.subset_retraining(ridge(), (XQ, ZQ), MASKS[:, :9]),
    ),
    row("an empty subset", ValueError, "rows has shape", lambda: uw.subset_retraining(ridge(), (XQ, ZQ), [[]])),
    row("no subsets", ValueError, "groups is empty", lambda: uw.subset_retraining(ridge(), (XQ, ZQ), [])),
    row("a row that is not there", IndexError, "Row 40", lambda: uw.subset_retraining(ridge(), (XQ, ZQ), [[40]])),
    row("a row twice", ValueError, "names a row twice", lambda: uw.subset_retraining(ridge(), (XQ, ZQ), [[1, 1]])),
    row("outcomes first", ValueError, r"lds\(scores, outcomes\) got", lambda: uw.lds(outcomes(), scores())),
    row("too few rows", ValueError, "4 queries × 5 rows", lambda: uw.lds(five(), outcomes())),
    row("other queries", ValueError, "3 queries × 40 rows", lambda: uw.lds(scores(np.ones((3, N))), outcomes())),
    row("rows twice", ValueError, "every training row", lambda: uw.lds(scores(rows=np.zeros(N, int)), outcomes())),
    row("other measure", ValueError, "Compare like", lambda: uw.lds(scores(measure="margin"), outcomes())),
    row("other deed", ValueError, "Compare like", lambda: uw.lds(scores(counterfactual="example added"), outcomes())),
    row("two subsets", ValueError, "2 subsets", lambda: uw.lds(scores(), outcomes(masks=MASKS[:2]))),
    row("no level", ValueError, "level=95", lambda: uw.lds(scores(), outcomes(), level=95)),
    row("wrong axes", ValueError, "Its axes are", lambda: uw.SubsetOutcomes(np.ones((4, 6)), MASKS)),
    row("too many seeds", ValueError, "count=2, and there are 1", lambda: outcomes().with_seeds(2)),
    row("no counts", ValueError, "counts=", lambda: uw.removal_curve(ridge(), scores(), (XQ, ZQ), counts=[])),
    row("too many", ValueError, "counts=", lambda: uw.removal_curve(ridge(), scores(), (XQ, ZQ), counts=[1, N])),
    row(
        "scores of others",
        ValueError,
        "scores holds 3 queries",
        lambda: uw.removal_curve(ridge(), scores(np.ones((3, N))), (XQ, ZQ), counts=[1]),
    ),
    row("no scores", ValueError, "is a int", lambda: uw.removal_curve(ridge(), {"mine": 3}, (XQ, ZQ), counts=[1])),
    row("nothing wrong", ValueError, "rows has shape", lambda: uw.mislabel_auc(np.arange(5.0), [])),
    row("all wrong", ValueError, "5 of 5 rows are flipped", lambda: uw.mislabel_auc(np.arange(5.0), range(5))),
    row("nan", ValueError, "NaN", lambda: uw.mislabel_auc([np.nan, 1.0], [0])),
    row("no such row", IndexError, "Row 7", lambda: uw.mislabel_auc(np.arange(5.0), [7])),
    row("no fraction", ValueError, "fraction=2", lambda: uw.mislabel_auc(np.arange(5.0), [1]).found_in(2)),
    row("no curve", ValueError, "no curve 'x'", lambda: curve().mean("x")),
]


def five():
    return made(values=DRAW.normal(size=(Q, 5)), rows=np.arange(5), scale=None, query_values=None)


@pytest.mark.parametrize(("deed", "kind", "text"), BAD)
def test_what_is_refused(deed, kind, text):
    refuses(deed, kind, text)


# ---- curves ----------------------------------------------------------------------------------------------------------


def curve(**settings):
    influence = logistic()
    on = (X[:5], np.array(["no", "yes"])[Y[:5]])
    return uw.removal_curve(influence, influence.on_loss(*on), on, **{"counts": (1, 4, 10)} | settings)


def test_removing_helpful_rows_is_scikit_learns_refit_without_them():
    influence = logistic()
    names = np.array(["no", "yes"])[Y]
    found = curve()
    top = influence.on_loss(X[:5], names[:5]).helpful(10).rows
    before = LogisticRegression(tol=1e-10, max_iter=5000).fit(X, names)
    loss = -before.predict_log_proba(X[:5])[np.arange(5), Y[:5]]
    np.testing.assert_allclose(found.control, loss, rtol=1e-5)
    for c, k in enumerate((1, 4, 10)):
        for q in range(5):
            keep = np.setdiff1d(np.arange(N), top[q, :k])
            again = LogisticRegression(tol=1e-10, max_iter=5000).fit(X[keep], names[keep])
            changed = -again.predict_log_proba(X[q : q + 1])[0, Y[q]] - loss[q]
            assert found.changes["scores"][c, q] == pytest.approx(changed, rel=1e-4, abs=1e-6)
            flipped = again.predict(X[q : q + 1]) != before.predict(X[q : q + 1])
            assert found.flipped["scores"][c, q] == float(flipped[0])
    assert (found.mean("scores") > found.mean("random")).all()
    assert (np.diff(found.mean("scores")) > 0).all()
    assert "scores: +" in str(found)
    assert "flipped" in str(found)


def test_several_ways_and_seeds_are_compared():
    influence = logistic()
    on = (X[:2], np.array(["no", "yes"])[Y[:2]])
    ways = {"influence": influence.on_loss(*on), "noise": scores(DRAW.normal(size=(2, N)))}
    found = uw.removal_curve(influence, ways, on, counts=(2,), seeds=2)
    assert set(found.changes) == {"influence", "noise", "random"}
    assert found.mean("influence")[0] > found.mean("noise")[0]
    assert found.standard_error("influence").shape == (1,)


def test_regressions_do_not_flip():
    influence = ridge()
    found = uw.removal_curve(influence, influence.on_loss(XQ, ZQ), (XQ, ZQ), counts=(3,))
    assert found.flipped is None
    refuses(lambda: found.flips("scores"), ValueError, "no prediction can flip")


def test_networks_flip_by_their_largest_output():
    influence = classifier(net())
    elsewhere = -influence.objective.theta

    def train(weights, seed):
        return influence.objective.theta if weights.all() else elsewhere

    found = uw.removal_curve(influence, influence.on_loss(XQ, YQ), (XQ, YQ), counts=(1,), retrain=train)
    model = net()
    before = model(torch.from_numpy(XQ)).argmax(1)
    torch.nn.utils.vector_to_parameters(elsewhere, model.parameters())
    flipped = (model(torch.from_numpy(XQ)).argmax(1) != before).double().numpy()
    np.testing.assert_array_equal(found.flipped["scores"][0], flipped)


@given(st.integers(0, 200), st.booleans())
def test_auc_is_scikit_learns(seed, tied):
    draw = np.random.default_rng(seed)
    wrong = draw.random(60) < 0.2
    wrong[:2] = [True, False]
    values = draw.normal(size=60) + wrong
    values = np.round(values) if tied else values
    found = uw.mislabel_auc(values, wrong)
    assert found.auc == pytest.approx(roc_auc_score(wrong, values))
    assert 0 <= found.low <= found.auc <= found.high <= 1
    assert found.mislabelled == wrong.sum()


def test_the_interval_covers_the_truth():
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    draw = np.random.default_rng(2)
    wrong = np.arange(200) < 40
    hits = 0
    for _ in range(400):
        found = uw.mislabel_auc(draw.normal(size=200) + wrong, wrong, level=0.9)
        hits += found.low <= truth <= found.high
    assert 0.85 < hits / 400 < 0.95


def test_what_is_found_early():
    wrong = np.array([3, 7])
    suspicion = -np.abs(np.arange(20) - 3.0)
    found = uw.mislabel_auc(suspicion, wrong)
    assert isinstance(found, MislabelCurve)
    assert found.found_in(0.0) == 0
    assert found.found_in(0.05) == 0.5
    assert found.found_in(0.5) == 1
    assert "of 2 wrong labels 50% found in the first 10 %" in str(found)


def test_self_scores_are_taken_by_row_number():
    influence = logistic()
    own = influence.of_self()
    order = DRAW.permutation(N)
    shuffled = replace(own, values=own.values[order], rows=order)
    wrong = [1, 5, 9]
    assert uw.mislabel_auc(own, wrong).auc == uw.mislabel_auc(shuffled, wrong).auc
    assert uw.mislabel_auc(own.values, wrong).auc == uw.mislabel_auc(own, wrong).auc
