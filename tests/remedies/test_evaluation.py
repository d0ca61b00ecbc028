"""What is said to type by upweight/evaluation, typed."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from torch.nn.functional import cross_entropy

import upweight as uw
from refusals import refused, warned
from small import XQ, YQ, ZQ, N, X, Y, Z, classifier, logistic, net, ridge

lds = partial(uw.lds, resamples=20)
ON = (XQ, ZQ)
MASKS = uw.random_subsets(N, 6, seed=3)
ROWS = [0, 9, 17, 33]


def height(params, example):
    return (params["coef"] @ example[0])[0]


@cache
def explained():
    return ridge()


@cache
def scored():
    return explained().on_loss(*ON)


@cache
def trained_on_subsets():
    return uw.subset_retraining(explained(), ON, MASKS)


@cache
def left_out():
    return uw.leave_one_out(explained(), ON, ROWS)


@cache
def curve():
    return uw.removal_curve(explained(), scored(), ON, counts=(1, 5))


# ---- curves.py -------------------------------------------------------------------------------------------------------


def test_a_regression_has_a_mean_change_and_no_flips():
    with refused("These outputs are no classes, so no prediction can flip", "Use `mean`"):
        curve().flips("scores")
    top = scored().helpful(1).rows
    really = uw.leave_one_out(explained(), ON, top[:, 0]).actual.diagonal()
    assert curve().mean("scores")[0] == pytest.approx(really.mean())


def test_a_curve_is_asked_for_by_its_name():
    with refused("There is no curve '", "name one of: ") as refusal:
        curve().mean("helpful")
    names = str(refusal.value).partition("one of: ")[2].rstrip(".").split(", ")
    assert names == ["scores", "random"]
    assert curve().mean(names[0])[1] > curve().mean(names[1])[1]


def test_a_removal_curve_is_of_the_queries_that_were_scored():
    on = (XQ + 1, ZQ)
    with warned("Are they other queries, or another model?", "Pass scores of these queries by this"):
        uw.removal_curve(explained(), scored(), on, counts=(5,))
    found = uw.removal_curve(explained(), explained().on_loss(*on), on, counts=(5,))
    assert found.mean("scores")[0] > found.mean("random")[0]


def test_a_removal_curve_is_of_the_model_that_was_scored():
    other = uw.explain(Ridge(alpha=20.0).fit(X, Z), X, Z)
    with warned("Are they other queries, or another model?", "Pass scores of these queries by this"):
        uw.removal_curve(other, scored(), ON, counts=(5,))
    found = uw.removal_curve(other, other.on_loss(*ON), ON, counts=(5,))
    assert found.mean("scores")[0] > found.mean("random")[0]


def test_a_share_of_the_rows_is_inspected():
    found = uw.mislabel_auc(np.arange(20.0), [19, 3])
    with refused("fraction=", "It is a share of the rows, such as 0.1"):
        found.found_in(10)
    assert found.found_in(0.1) == 0.5


def test_suspicion_of_some_rows_is_no_suspicion_of_all():
    influence, some = logistic(), [3, 11, 25, 39]
    own = influence.of_self(some)
    with refused("so row numbers of wrong labels cannot be placed", "Pass of_self() of all rows, or plain numbers"):
        uw.mislabel_auc(own, [11, 39])
    whole = influence.of_self()
    assert uw.mislabel_auc(whole, [11, 39]).auc == uw.mislabel_auc(whole.values, [11, 39]).auc
    before = [(own.values[wrong] > own.values[right]) for wrong in (1, 3) for right in (0, 2)]
    assert uw.mislabel_auc(own.values, [1, 3]).auc == np.mean(before)


@pytest.mark.parametrize("given", [np.array([0.3, np.nan, 0.1, 0.2]), np.ones((4, 1))], ids=["NaN", "a column"])
def test_suspicion_is_a_finite_number_for_each_row(given):
    with refused("or holds NaN", "Pass SelfScores of all rows or n finite numbers"):
        uw.mislabel_auc(given, [0])
    assert uw.mislabel_auc([0.3, 0.0, 0.1, 0.2], [0]).auc == 1
    assert 0 <= uw.mislabel_auc(logistic().of_self(), [0]).auc <= 1


def test_wrong_labels_stand_against_right_ones():
    with refused("An AUC compares some flipped rows with some clean ones", "pass only the rows whose label is wrong"):
        uw.mislabel_auc([0.9, 0.1, 0.8, 0.3], None)
    assert uw.mislabel_auc([0.9, 0.1, 0.8, 0.3], [0, 2]).auc == 1


@pytest.mark.parametrize("counts", [(5, 1), (0, 5), (1, N), (0.1, 0.5), ()], ids=str)
def test_counts_of_rows_to_remove(counts):
    with refused("counts=", "They are different numbers of rows to remove, ascending, from 1 to ") as refusal:
        uw.removal_curve(explained(), scored(), ON, counts=counts)
    last = int(str(refusal.value).rpartition(" ")[2].rstrip("."))
    influence = explained()
    found = uw.removal_curve(influence, scored(), ON, counts=(1, last), retrain=lambda *_: influence.objective.theta)
    assert found.counts.tolist() == [1, 39]


def test_ways_of_choosing_have_names_of_their_own():
    with refused("scores['", "Pass Scores with names of their own"):
        uw.removal_curve(explained(), {"random": scored()}, ON, counts=(5,))
    with refused("scores['", "Pass Scores with names of their own"):
        uw.removal_curve(explained(), {"influence": scored().values}, ON, counts=(5,))
    found = uw.removal_curve(explained(), {"influence": scored()}, ON, counts=(5,))
    assert set(found.changes) == {"influence", "random"}
    np.testing.assert_allclose(found.mean("influence"), curve().mean("scores")[1:])


def test_a_removal_curve_needs_every_row():
    some = explained().of_removing([[row] for row in range(10)], on=ON)
    with refused(" rows to remove", "Pass removal values of all rows for these queries, such as on_loss"):
        uw.removal_curve(explained(), some, ON, counts=(5,))
    flipped = explained().of_relabeling(range(N), Z, on=ON)
    with refused(" rows to remove", "Pass removal values of all rows for these queries, such as on_loss"):
        uw.removal_curve(explained(), flipped, ON, counts=(5,))
    found = uw.removal_curve(explained(), explained().on_loss(*ON), ON, counts=(5,))
    np.testing.assert_allclose(found.mean("scores"), curve().mean("scores")[1:])


# ---- lds.py ----------------------------------------------------------------------------------------------------------


def test_scores_come_first_and_outcomes_second():
    with refused("lds(scores, outcomes) got ", "Pass Scores of all rows and the SubsetOutcomes of subset_retraining"):
        lds(scored(), left_out())
    assert lds(scored(), trained_on_subsets()).value > 0.5
    with refused("lds(scores, outcomes) got ", "Pass Scores of all rows and the SubsetOutcomes of subset_retraining"):
        lds(scored().values, trained_on_subsets())
    assert lds(scored(), trained_on_subsets()).value > 0.5


def test_a_measure_is_compared_with_subsets_of_the_same_measure():
    of_height = explained().on_measure(height, *ON)
    with refused(" after rows were left out", "Compare like with like: on_loss, or on_measure with"):
        lds(of_height, trained_on_subsets())
    assert lds(explained().on_loss(*ON), trained_on_subsets()).value > 0.5
    measured = uw.subset_retraining(explained(), ON, MASKS, measure=height)
    assert lds(of_height, measured).value > 0.5


def test_a_subset_leaves_out_any_row():
    some = explained().of_removing([[row] for row in range(10)], on=ON)
    with refused("A subset's effect is a sum over all rows left out", "pass scores of the same queries and of every"):
        lds(some, trained_on_subsets())
    every = explained().of_removing(range(N), on=ON)
    assert lds(every, trained_on_subsets()).value > 0.5
    with refused("A subset's effect is a sum over all rows left out", "pass scores of the same queries and of every"):
        lds(explained().on_loss(XQ[:2], ZQ[:2]), trained_on_subsets())
    assert lds(explained().on_loss(*ON), trained_on_subsets()).value > 0.5


def test_subsets_are_of_the_queries_and_the_model_that_were_scored():
    other = uw.explain(Ridge(alpha=20.0).fit(X, Z), X, Z)
    with warned("Are they other queries, or another model?", "Pass scores of the same queries by the same"):
        lds(other.on_loss(*ON), trained_on_subsets())
    assert lds(other.on_loss(*ON), uw.subset_retraining(other, ON, MASKS)).value > 0.5
    with warned("Are they other queries, or another model?", "Pass scores of the same queries by the same"):
        lds(explained().on_loss(XQ + 1, ZQ), trained_on_subsets())
    assert lds(explained().on_loss(*ON), trained_on_subsets()).value > 0.5


def test_a_rank_correlation_needs_subsets():
    few = uw.subset_retraining(explained(), ON, MASKS[:2])
    with refused("a rank correlation needs at least 3", "Train on more: random_subsets("):
        lds(scored(), few)
    masks = uw.random_subsets(N, 100)
    found = lds(scored(), uw.SubsetOutcomes((scored().values @ ~masks.T)[:, :, None], masks))
    assert found.subsets == 100
    assert found.value == pytest.approx(1)


# ---- leave_one_out.py ------------------------------------------------------------------------------------------------


def briefly(weights, seed):
    """Twenty steps of gradient descent on weighted rows: a training procedure that ends at no minimum."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        losses = cross_entropy(module(torch.from_numpy(X)), torch.from_numpy(Y), reduction="none")
        (losses * torch.from_numpy(weights)).mean().backward()
        optimizer.step()
    return module.eval()


@cache
def unfinished():
    """A network that was trained a little, and the same where training would have ended."""
    influence = classifier(briefly(np.ones(N), 0), penalty=0.05)
    return influence, uw.retrained(influence)


@cache
def left_out_of_the_finished():
    return uw.leave_one_out(unfinished()[1], (XQ, YQ), ROWS)


def test_a_network_that_is_at_no_minimum_is_trained_as_it_was():
    influence, on = unfinished()[0], (XQ, YQ)
    with refused("and without retrain= every training goes on to one", "Pass the training procedure that made the"):
        uw.leave_one_out(influence, on, [9])
    by_function = uw.leave_one_out(influence, on, [9], retrain=briefly)
    np.testing.assert_allclose(by_function.control, 0, atol=1e-12)
    with_all, without = (
        cross_entropy(briefly(weights, 0)(torch.from_numpy(XQ)), torch.from_numpy(YQ), reduction="none").detach()
        for weights in (np.ones(N), (np.arange(N) != 9).astype(float))
    )
    np.testing.assert_allclose(by_function.actual[:, 0], without - with_all)
    recipe = uw.minibatch.SGD(lr=0.5, weight_decay=0.0), uw.minibatch.Placed(N)
    stacked = uw.leave_one_out(influence, on, [9], retrain=uw.StackedTraining(*recipe, epochs=20, factory=net))
    np.testing.assert_allclose(stacked.actual, by_function.actual, rtol=1e-6, atol=1e-12)


def test_or_is_taken_to_its_minimum():
    influence, on = unfinished()[0], (XQ, YQ)
    with refused("Pass the training procedure that made the model", "Or ask about the model that training goes"):
        uw.leave_one_out(influence, on, [9])
    again = left_out_of_the_finished()
    goes_on = uw.leave_one_out(influence, on, [9], retrain=uw.LBFGS())
    np.testing.assert_allclose(again.actual[:, [1]], goes_on.actual, rtol=1e-3, atol=1e-7)
    assert np.abs(again.control).max() < 1e-5 < np.abs(goes_on.control).max()


@cache
def one_of_a_class():
    y = np.where(np.arange(N) == 5, 1, 0)
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=5000).fit(X, y), X, y)


def test_rows_without_which_there_is_nothing_to_train():
    influence, on = one_of_a_class(), (XQ, YQ)
    with warned("gave nothing, and their changes are NaN", "To compare the others, pass rows without them"):
        found = uw.leave_one_out(influence, on, [4, 5, 6])
    assert np.isnan(found.actual).all(0).tolist() == [False, True, False]
    others = uw.leave_one_out(influence, on, [4, 6])
    np.testing.assert_array_equal(others.actual, found.actual[:, [0, 2]])
    assert uw.agreement(influence.on_loss(*on), others).pearson > 0.9


@pytest.mark.parametrize("level", [95, 0.0, 1.0], ids=str)
def test_a_level_is_a_fraction(level):
    with refused("level=", "It is a fraction such as 0.95"):
        lds(scored(), trained_on_subsets(), level=level)
    assert lds(scored(), trained_on_subsets(), level=0.95).level == 0.95
    with refused("level=", "It is a fraction such as 0.95"):
        uw.mislabel_auc([0.9, 0.1, 0.8], [0], level=level)
    assert uw.mislabel_auc([0.9, 0.1, 0.8], [0], level=0.95).level == 0.95


def test_agreement_takes_scores_and_outcomes():
    with refused("agreement(scores, outcomes) got ", "Pass the Scores of on_loss, and the Outcomes of leave_one_out"):
        uw.agreement(left_out(), scored())
    assert uw.agreement(explained().on_loss(*ON), uw.leave_one_out(explained(), ON, ROWS)).pearson > 0.99


def test_like_is_compared_with_like():
    influence = explained()
    with refused(" for rows removed one at a time", "Compare like with like: on_loss, on_measure with leave_one_out("):
        uw.agreement(influence.on_measure(height, *ON), left_out())
    assert uw.agreement(influence.on_loss(*ON), left_out()).pearson > 0.99
    of_height = uw.leave_one_out(influence, ON, ROWS, measure=height)
    assert uw.agreement(influence.on_measure(height, *ON), of_height).pearson > 0.99
    with refused(" for rows removed one at a time", "Compare like with like: on_loss, on_measure with leave_one_out("):
        uw.agreement(influence.of_groups([[row] for row in ROWS], on=ON), left_out())
    assert uw.agreement(influence.of_removing(ROWS, on=ON), left_out()).slope == pytest.approx(1, abs=1e-8)


def test_scores_and_outcomes_are_of_the_same_queries_and_the_same_model():
    with refused(", the outcomes of others (", "Pass the same queries to both, and ask the same influence"):
        uw.agreement(explained().on_loss(XQ + 1, ZQ), left_out())
    assert uw.agreement(explained().on_loss(*ON), left_out()).pearson > 0.99
    before, after = unfinished()
    with refused(", the outcomes of others (", "Pass the same queries to both, and ask the same influence"):
        uw.agreement(before.on_loss(XQ, YQ), left_out_of_the_finished())
    assert uw.agreement(after.on_loss(XQ, YQ), left_out_of_the_finished()).pearson > 0.99


def test_scores_and_outcomes_are_of_the_same_rows():
    some = explained().of_removing([0, 9], on=ON)
    with refused(" queries and rows such as ", "Compare scores and outcomes of the same queries and rows"):
        uw.agreement(some, left_out())
    assert uw.agreement(explained().of_removing(ROWS, on=ON), left_out()).pairs == 16
    with refused(", the outcomes ", "Compare scores and outcomes of the same queries and rows"):
        uw.agreement(explained().on_loss(XQ[:2], ZQ[:2]), left_out())
    assert uw.agreement(explained().on_loss(*ON), left_out()).pairs == 16
    assert uw.agreement(some, uw.leave_one_out(explained(), ON, [0, 9])).pairs == 8


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
def test_rows_without_a_value_are_left_out_of_the_comparison():
    one_of_its_kind = np.c_[X[:12], np.eye(12)[:, -1]]
    influence = uw.explain(LinearRegression().fit(one_of_its_kind, Z[:12]), one_of_its_kind, Z[:12])
    on = (one_of_its_kind[:3] + 0.1, Z[:3])
    scores = influence.of_removing(range(12), on=on)
    outcomes = uw.leave_one_out(influence, on, range(12), uw.Refit())
    with refused(" are NaN: without them the fit is not unique", "Leave those rows out of the outcomes"):
        uw.agreement(scores, outcomes)
    others = uw.leave_one_out(influence, on, range(11), uw.Refit())
    assert uw.agreement(scores, others).slope == pytest.approx(1, abs=1e-8)

    influence, on = one_of_a_class(), (XQ, YQ)
    with refused(" are NaN: without them the fit is not unique", "Leave those rows out of the outcomes"):
        uw.agreement(influence.on_loss(*on), uw.leave_one_out(influence, on, [4, 5, 6]))
    assert uw.agreement(influence.on_loss(*on), uw.leave_one_out(influence, on, [4, 6])).pearson > 0.9


def test_a_slope_needs_more_than_one_pair():
    one = (XQ[:1], ZQ[:1])
    scores = explained().on_loss(*one)
    with refused("a slope needs at least two different predictions", "Leave out more rows: leave_one_out("):
        uw.agreement(scores, uw.leave_one_out(explained(), one, [3]))
    assert uw.agreement(scores, uw.leave_one_out(explained(), one, [3, 4, 30])).pairs == 3


# ---- subsets.py ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.01, 50, "half"], ids=str)
def test_a_subset_keeps_a_share_of_the_rows(fraction):
    with refused("A subset keeps at least one row and not all", "use a fraction such as 0.5"):
        uw.random_subsets(N, 3, fraction)
    assert uw.random_subsets(N, 3, 0.5).sum(1).tolist() == [20, 20, 20]


def test_outcomes_of_subsets_have_three_axes():
    values = trained_on_subsets().values[:, :, 0]
    with refused("values has shape ", "Its axes are (query, subset, seed)"):
        uw.SubsetOutcomes(values, MASKS)
    made = uw.SubsetOutcomes(values[:, :, None], MASKS)
    assert lds(scored(), made).value == lds(scored(), trained_on_subsets()).value


def test_no_more_seeds_than_there_are():
    with refused("count=", "Ask for 1 to "):
        trained_on_subsets().with_seeds(2)
    assert np.array_equal(trained_on_subsets().with_seeds(1).values, trained_on_subsets().values)


def test_masks_are_of_the_training_rows():
    with refused("subsets has shape ", "Masks have one column for each") as refusal:
        uw.subset_retraining(explained(), ON, uw.random_subsets(10, 100))
    assert f"random_subsets({N}, 100)" in str(refusal.value)
    influence = explained()
    found = uw.subset_retraining(influence, ON, uw.random_subsets(N, 100), lambda *_: influence.objective.theta)
    assert found.values.shape == (4, 100, 1)


# ---- blends.py -----------------------------------------------------------------------------------------------------


def test_kinds_are_two_or_more():
    influence = ridge()
    exact = influence.on_loss(XQ, ZQ)
    with refused("kinds of scores were given", "Name two or more, each with its Scores or a list of them"):
        uw.blended({"exact": exact})
    dot = uw.baselines.gradient_dot(influence, XQ, ZQ)
    assert uw.blended({"exact": exact, "gradients": [dot, dot]}).values.shape == exact.values.shape


def test_kinds_are_of_the_same_queries():
    influence = ridge()
    exact = influence.on_loss(XQ, ZQ)
    with refused("or other queries or rows", "Pass scores of the same queries, rows and measure"):
        uw.blended({"exact": exact, "fewer": influence.on_loss(XQ[:1], ZQ[:1])})
    assert uw.blended({"exact": exact, "as many": influence.on_loss(XQ, ZQ)}).values.shape == exact.values.shape


def test_kinds_ask_the_same():
    influence = ridge()
    exact = influence.on_loss(XQ, ZQ)
    other = influence.of_relabeling(range(influence.n), np.zeros(influence.n), on=(XQ, ZQ))
    with refused("their signs mean different things", "Pass scores of one question: on_loss(Xq, yq) of each"):
        uw.blended({"exact": exact, "other labels": other})
    dot = uw.baselines.gradient_dot(influence, XQ, ZQ)
    assert uw.blended({"exact": exact, "gradients": dot}).values.shape == exact.values.shape


def test_weights_are_chosen_by_other_queries():
    influence = ridge()
    kinds = {
        "exact": influence.on_loss(XQ[:2], ZQ[:2]),
        "gradients": uw.baselines.gradient_dot(influence, XQ[:2], ZQ[:2]),
    }
    outcomes = uw.subset_retraining(influence, (XQ[:2], ZQ[:2]), MASKS)
    with refused(
        "the weights of each are chosen by at least two others", "uw.blended(kinds) weighs all kinds the same"
    ):
        uw.blended(kinds, outcomes)
    assert uw.blended(kinds).values.shape == (2, influence.n)
