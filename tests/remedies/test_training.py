"""What is said to type by upweight/training, typed."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.svm import SVC, LinearSVC
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from refusals import refused
from small import (
    NAMES,
    NAMESQ,
    XQ,
    YQ,
    ZQ,
    Items,
    N,
    X,
    Y,
    Z,
    changed,
    classifier,
    logistic,
    net,
    pairs,
    regressor,
    ridge,
    seeded,
)
from upweight import minibatch

THREE = np.arange(N) % 3
TIGHT = {"tol": 1e-10, "max_iter": 5000}
ONES = np.ones(N)
WITHOUT_3 = (np.arange(N) != 3).astype(float)
XT, YT = torch.from_numpy(X), torch.from_numpy(Y)


@cache
def network():
    """Shared, so never to be changed."""
    return classifier()


def coef(influence):
    return influence.objective.params["coef"].numpy().squeeze()


# ---- checkpoints.py ----------------------------------------------------------------------------------------------


def states():
    """Those of three steps of gradient descent, and the rates that the scheduler gave."""
    model, found, rates = net(), [], []
    descent = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(descent, 0.5)
    for _ in range(3):
        rates.append(schedule.get_last_lr())
        descent.zero_grad()
        cross_entropy(model(XT), YT).backward()
        descent.step()
        schedule.step()
        found.append(copy.deepcopy(model.state_dict()))
    return found, rates


def checkpoints(states, **settings):
    return uw.checkpoints(net(), states, X, Y, loss=cross_entropy, penalty=0.1, **settings)


def test_a_single_state_goes_into_a_list():
    state = net().state_dict()
    with refused("and checkpoints wants several state dicts", "Pass a list: [state] for a single one"):
        checkpoints(state)
    (member,) = checkpoints([state])
    assert torch.equal(member.objective.theta, network().objective.theta)


def test_a_generator_that_was_used_up_becomes_a_list():
    found = states()[0]
    used = iter(found)
    list(used)
    with refused("so there is nothing to explain", "Pass a list of what model.state_dict() gave"):
        checkpoints(used)
    assert len(checkpoints(found)) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_is_what_the_module_gave(whole):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    with refused("does not fit", "Pass what model.state_dict() gave during the training of this module"):
        checkpoints([saved if whole else saved["optimizer"]])
    (member,) = checkpoints([saved["model"]])
    assert torch.equal(member.objective.theta, classifier(model).objective.theta)


def test_rates_are_one_number_for_each_checkpoint():
    members = [network(), classifier()]
    with refused("are no numbers", "Pass one per checkpoint, such as "):
        uw.TracIn(members, 0.1)
    traced = uw.TracIn(members, [0.1] * 2).on_loss(XQ, YQ)
    np.testing.assert_allclose(traced.values, 2 * uw.TracIn(members[:1], [0.1]).on_loss(XQ, YQ).values)


def test_rates_are_those_of_the_scheduler_or_equal_ones():
    found, rates = states()
    members = checkpoints(found)
    with refused("learning_rates has shape", "Each needs the rate in force there"):
        uw.TracIn(members, rates)
    with refused("learning_rates has shape", "Each needs the rate in force there"):
        uw.TracIn(members, [])
    traced = uw.TracIn(members, [rate[0] for rate in rates])
    assert traced.learning_rates == (0.5, 0.25, 0.125)
    each = [uw.baselines.gradient_dot(member, XQ, YQ).values for member in members]
    np.testing.assert_allclose(traced.on_loss(XQ, YQ).values, 0.5 * each[0] + 0.25 * each[1] + 0.125 * each[2])
    np.testing.assert_allclose(uw.TracIn(members, [1.0] * 3).on_loss(XQ, YQ).values, sum(each))


# ---- counterfactuals.py ------------------------------------------------------------------------------------------


def fit_ridge(X, y):
    return Ridge(alpha=2.0).fit(X, y).coef_


def test_something_changes_in_an_edit():
    with refused("so nothing would change", "Pass new inputs, new labels, or both"):
        uw.edited(ridge(), [5])
    moved, other = changed(X, (5, 0), 3.0), changed(Z, 5, -4.0)
    for new, truth in (
        ({"X_new": moved[[5]]}, fit_ridge(moved, Z)),
        ({"y_new": other[[5]]}, fit_ridge(X, other)),
        ({"X_new": moved[[5]], "y_new": other[[5]]}, fit_ridge(moved, other)),
    ):
        np.testing.assert_allclose(coef(uw.retrained(uw.edited(ridge(), [5], **new))), truth)


def test_each_row_is_named_once():
    with refused("A row is named twice", "Name each row once"):
        uw.edited(ridge(), [5, 5], y_new=[1.0, 2.0])
    after = uw.retrained(uw.edited(ridge(), [5, 6], y_new=[1.0, 2.0]))
    np.testing.assert_allclose(coef(after), fit_ridge(X, changed(changed(Z, 5, 1.0), 6, 2.0)))


@pytest.mark.parametrize("weights", [np.ones(3), -ONES, 0 * ONES, np.nan * ONES])
def test_weights_are_a_factor_for_each_row(weights):
    with refused("weights has shape", "Pass one finite factor ≥ 0 for "):
        uw.retrained(ridge(), weights=weights)
    after = uw.retrained(ridge(), weights=1 + WITHOUT_3)
    np.testing.assert_allclose(coef(after), Ridge(alpha=2.0).fit(X, Z, sample_weight=1 + WITHOUT_3).coef_)


def test_some_rows_are_left():
    with refused("No row would be left to train on", "Leave out fewer rows"):
        uw.retrained(ridge(), without=range(N))
    after = uw.retrained(ridge(), without=range(N - 1))
    np.testing.assert_allclose(coef(after), fit_ridge(X[-1:], Z[-1:]), atol=1e-12)


def test_an_edit_is_trained_by_what_knows_of_it():
    labels = changed(NAMES, 3, "no" if NAMES[3] == "yes" else "yes")
    edited = uw.edited(logistic(), [3], y_new=labels[[3]])

    def train(weights, seed):
        return LogisticRegression(**TIGHT).fit(X, NAMES, sample_weight=weights)

    with refused("is given weights only", "Train on the edited rows yourself and explain() that model"):
        uw.retrained(edited, retrain=train)
    own = uw.explain(LogisticRegression(**TIGHT).fit(X, labels), X, labels)
    for retrain in (uw.Newton(), uw.LBFGS(rtol=1e-7), uw.Refit()):
        np.testing.assert_allclose(coef(uw.retrained(edited, retrain=retrain)), coef(own), atol=1e-6)


def test_a_lasso_without_a_row_is_measured_after_each_fit():
    fit = Lasso(alpha=0.3, tol=1e-10).fit(X, Z)
    influence = uw.explain(fit, X, Z)
    with refused("may choose other columns", "Use leave_one_out(influence, (Xq, yq), rows)"):
        uw.retrained(influence, without=[3])
    outcomes = uw.leave_one_out(influence, (XQ, ZQ), [3])
    again = Lasso(alpha=0.3, tol=1e-10).fit(np.delete(X, 3, 0), np.delete(Z, 3))
    losses = [(ZQ - model.predict(XQ)) ** 2 for model in (fit, again)]
    np.testing.assert_allclose(outcomes.actual[:, 0], losses[1] - losses[0], atol=1e-6)


def test_items_of_a_dataset_are_edited_whole():
    influence = uw.explain(net(), pairs(), loss=cross_entropy, penalty=0.1)
    with refused("The training rows are a Dataset, whose items are whole examples", "Pass y_new beside X_new"):
        uw.edited(influence, [3], XT[[3]] + 1)
    edited = uw.edited(influence, [3], XT[[3]] + 1, YT[[3]])
    torch.testing.assert_close(edited.risk_gradient, classifier(X=changed(X, 3, X[3] + 1)).risk_gradient)


@pytest.mark.parametrize("dataset", [True, False])
def test_each_row_becomes_one_new_example(dataset):
    influence = uw.explain(net(), pairs(), loss=cross_entropy, penalty=0.1) if dataset else network()
    with refused("rows are to become", "Pass one new example for each row"):
        uw.edited(influence, [3, 4], XT[[3]] + 1, YT[[3]])
    edited = uw.edited(influence, [3, 4], XT[[3, 4]] + 1, YT[[3, 4]])
    truth = classifier(X=changed(X, [3, 4], X[[3, 4]] + 1)).risk_gradient
    torch.testing.assert_close(edited.risk_gradient, truth)


# ---- ensembles.py ------------------------------------------------------------------------------------------------


@cache
def machine():
    """A hinge loss, whose name is not that of a smooth one."""
    model = LinearSVC(loss="hinge", C=0.1, tol=1e-10, max_iter=100_000, random_state=0).fit(X, NAMES)
    with pytest.warns(uw.errors.TheoryWarning):
        return uw.explain(model, X, NAMES, damping=0.01)


def test_members_of_two_losses_are_asked_for_one_measure():
    def decision(params, example):
        return params["coef"][0] @ example[0] + params["intercept"][0]

    members = [machine(), logistic()]
    with refused("Members measure different things", "Average models of the same loss, or name one measure"):
        uw.ensemble(members).on_loss(XQ, NAMESQ)
    models = [LogisticRegression(C=C, **TIGHT).fit(X, NAMES) for C in (0.5, 2.0)]
    alike = [uw.explain(model, X, NAMES) for model in models]
    found = uw.ensemble(alike).on_loss(XQ, NAMESQ).values
    np.testing.assert_allclose(found, np.mean([one.on_loss(XQ, NAMESQ).values for one in alike], 0))
    measured = uw.ensemble(members).on_measure(decision, XQ, NAMESQ)
    each = [uw.predict(member, XQ).outputs[:, 0] for member in members]
    np.testing.assert_allclose(measured.query_values, np.mean(each, 0))
    np.testing.assert_allclose(
        measured.values, np.mean([one.on_measure(decision, XQ, NAMESQ).values for one in members], 0)
    )


@pytest.mark.parametrize("count", [0, 2])
def test_members_are_influences(count):
    models = [Ridge(alpha=alpha).fit(X, Z) for alpha in (1.0, 2.0)]
    with refused("members holds", "They must be Influences: [uw.explain(model, X, y, …) for model in models]"):
        uw.ensemble(models[:count])
    explained = [uw.explain(model, X, Z) for model in models]
    now = uw.ensemble(explained).on_loss(XQ, ZQ).query_values
    np.testing.assert_allclose(now, np.mean([(model.predict(XQ) - ZQ) ** 2 for model in models], 0))
    assert len(uw.ensemble(checkpoints(states()[0]))) == 3


def explained_ridge(X, y, ids=None):
    return uw.explain(Ridge(alpha=2.0).fit(X, y), X, y, ids=ids)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (X[1:], Z[1:]),
        lambda: (X, changed(Z, 5, 9.0)),
        lambda: (changed(X, (5, 0), 9.0), Z),
        lambda: (X, Z, np.arange(N) + 1),
    ],
    ids=["count", "target", "input", "names"],
)
def test_members_see_the_same_rows(other):
    names = np.arange(N)
    with refused("was trained on other rows than member 0", "Explain every model with the same (X, y)"):
        uw.ensemble([ridge(ids=names), explained_ridge(*other())])
    without = Ridge(alpha=2.0).fit(np.delete(X, 3, 0), np.delete(Z, 3))
    members = [ridge(ids=names), uw.explain(without, X, Z, ids=names, sample_weight=WITHOUT_3)]
    values = uw.ensemble(members).on_loss(XQ, ZQ).values
    np.testing.assert_allclose(values[:, 3], members[0].on_loss(XQ, ZQ).values[:, 3] / 2)
    assert float(members[1].risk_gradient.norm()) < 1e-10


# ---- minibatch.py ------------------------------------------------------------------------------------------------


def training(optimizer=None, batches=None, epochs=2, factory=net, **settings):
    optimizer, batches = optimizer or minibatch.SGD(lr=0.1), batches or minibatch.Shuffled(8)
    return uw.StackedTraining(optimizer, batches, epochs, factory, **settings)


def one_step(optimizer):
    """What a whole batch does to θ̂, where the factory starts."""
    influence = network()
    return training(optimizer, minibatch.Placed(N), 1).bind(influence)(ONES) - influence.objective.theta


def test_a_momentum_is_below_one():
    with refused("with which no step is ever forgotten", "Use a number below 1"):
        minibatch.SGD(lr=0.1, momentum=1.0)
    assert minibatch.SGD(lr=0.1, momentum=0.9).damping(1000) == pytest.approx(0.001)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0), ("a", 0.9)])
def test_betas_are_two(betas):
    with refused("betas=", "Pass two numbers in [0, 1), as in torch.optim.Adam: (0.9, 0.999)"):
        minibatch.Adam(betas=betas)
    assert minibatch.Adam(betas=(0.9, 0.999)) == minibatch.Adam()


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"lr": "0.1"}, {"momentum": -0.5}, {"weight_decay": np.inf}])
def test_settings_are_numbers(wrong):
    with refused(" got ", "It is a finite int or float "):
        minibatch.SGD(**{"lr": 0.1} | wrong)
    step = -0.1 * network().risk_gradient
    torch.testing.assert_close(one_step(minibatch.SGD(lr=0.1, momentum=0.5)), step)


def test_a_step_is_above_zero():
    with refused("got lr=0, with which nothing is learned", "Use a step size > 0"):
        minibatch.SGD(lr=0)
    torch.testing.assert_close(one_step(minibatch.SGD(lr=1)), -network().risk_gradient)


# ---- predictions.py ----------------------------------------------------------------------------------------------


def test_classes_are_those_of_a_classifier():
    with refused("so there is none per class", "Pass the influence of a classifier"):
        uw.predict(ridge(), XQ).margins(ZQ)
    said = uw.predict(logistic(), XQ)
    np.testing.assert_array_equal(said.margins(NAMESQ) > 0, said.labels == NAMESQ)


def test_pairs_of_classes_give_way_to_a_logistic_regression():
    with pytest.warns(uw.errors.TheoryWarning):
        pairwise = uw.explain(SVC().fit(X, THREE), X, THREE)
    with refused("classes, one against one, and give no output per class", "Use LogisticRegression"):
        uw.predict(pairwise, XQ).margins(THREE[:4])
    model = LogisticRegression(**TIGHT).fit(X, THREE)
    said = uw.predict(uw.explain(model, X, THREE), X)
    np.testing.assert_array_equal(said.margins(THREE) > 0, model.predict(X) == THREE)


@pytest.mark.parametrize("y", [["maybe"] * 4, NAMES[:3], YQ])
def test_margins_are_of_one_class_for_each(y):
    said = uw.predict(logistic(), XQ)
    with refused("y has shape", "Pass one of the classes for each"):
        said.margins(y)
    np.testing.assert_allclose(said.margins(["yes"] * 4), said.outputs[:, 0])


def test_what_is_no_class_is_measured_by_its_loss():
    with refused("so they have no accuracy", "Use the loss: Scores.query_values"):
        uw.predict(ridge(), XQ).accuracy(ZQ)
    np.testing.assert_allclose(ridge().on_loss(XQ, ZQ).query_values, (uw.predict(ridge(), XQ).outputs[:, 0] - ZQ) ** 2)


def test_each_has_one_label():
    said = uw.predict(logistic(), XQ)
    with refused("labels. Pass", "Pass one label for each"):
        said.accuracy(NAMES)
    assert said.accuracy(NAMESQ) == np.mean(said.labels == NAMESQ)


def test_labels_stand_as_in_the_training_data():
    for influence, wrong, right in ((logistic(), Y, NAMES), (network(), NAMES, Y)):
        said = uw.predict(influence, X)
        with refused("labels in y, such as ", "Pass labels as they stand in the training data"):
            said.accuracy(wrong)
        assert said.accuracy(right) == np.mean(said.labels == right)


def test_a_loss_with_outputs_predicts():
    def f(params, example):
        return params @ example[0]

    def l(output, example):  # noqa: E743
        return (output - example[1]) ** 2

    theta = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    with refused("so there is nothing to predict with", "Pass Objective(..., outputs=f, output_loss=l)"):
        uw.predict(
            uw.Influence(uw.Objective(lambda params, example: l(f(params, example), example), theta), (X, Z)), XQ
        )
    objective = uw.Objective(
        lambda params, example: l(f(params, example), example), theta, outputs=f, output_loss=l, penalty=0.1
    )
    said = uw.predict(uw.Influence(objective, (X, Z)), XQ)
    np.testing.assert_allclose(said.outputs[:, 0], XQ @ theta.numpy())


class Both(nn.Module):
    """Two inputs, one head."""

    def __init__(self):
        nn.Module.__init__(self)
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def before(self, a, b):
        return torch.tanh(self.body(a) - self.body(b))

    def forward(self, a, b):
        return self.head(self.before(a, b))


def test_inputs_of_parts_have_the_features_before_the_head():
    model = seeded(Both).eval()
    items = Items(((x, x**2), y) for x, y in zip(XT, YT, strict=True))
    settings = {"loss": cross_entropy, "penalty": 0.1}
    with refused("which form no line of features", "Name the parameters of the head"):
        uw.features(uw.explain(model, items, **settings))
    found = uw.features(uw.explain(model, items, parameters=["head.weight", "head.bias"], **settings))
    np.testing.assert_allclose(found, model.before(XT, XT**2).detach().numpy(), atol=1e-12)


# ---- retrainers.py -----------------------------------------------------------------------------------------------


def refit(without, C=1.0):
    model = LogisticRegression(C=C, **TIGHT)
    return model.fit(np.delete(X, without, 0), np.delete(NAMES, without)).coef_[0]


def test_newton_takes_more_steps_or_accepts_less():
    with refused("Newton's method left", "Raise max_steps, or accept less with Newton(rtol=…)"):
        uw.retrained(logistic(), without=[3, 4], retrain=uw.Newton(max_steps=1))
    for retrain, tolerance in ((uw.Newton(max_steps=200), 1e-6), (uw.Newton(max_steps=1, rtol=0.1), 0.1)):
        after = uw.retrained(logistic(), without=[3, 4], retrain=retrain)
        np.testing.assert_allclose(coef(after), refit([3, 4]), atol=tolerance)
    after = uw.retrained(ridge(), without=range(2, N), retrain=uw.Newton(max_steps=1))
    np.testing.assert_allclose(coef(after), fit_ridge(X[:2], Z[:2]))


def test_rows_without_which_there_is_no_minimum_ask_for_a_penalty():
    odd = int(np.abs(X[:, 0]).argmax())
    y = changed(X[:, 0] > 0, odd, X[odd, 0] <= 0)
    free = uw.explain(LogisticRegression(C=np.inf, **TIGHT).fit(X, y), X, y)
    with refused("Newton's method left", "If the objective has no minimum without these rows, add a penalty"):
        uw.retrained(free, without=[odd], retrain=uw.Newton(max_steps=15))
    with refused(": the loss falls for ever as θ grows", "Fit with a penalty and explain that model"):
        uw.retrained(free, without=[odd], retrain=uw.Newton())
    held = uw.explain(LogisticRegression(C=1.0, **TIGHT).fit(X, y), X, y)
    after = uw.retrained(held, without=[odd], retrain=uw.Newton(max_steps=15))
    again = LogisticRegression(C=1.0, **TIGHT).fit(np.delete(X, odd, 0), np.delete(y, odd))
    np.testing.assert_allclose(coef(after), again.coef_[0], atol=1e-6)


def own(model, steps=5):
    """A training loop of one's own, by whole batches: (weights, seed) → module."""

    def train(weights, seed):
        trained = copy.deepcopy(model)
        descent = torch.optim.SGD(trained.train().parameters(), lr=0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(steps):
                descent.zero_grad()
                (torch.from_numpy(weights) @ cross_entropy(trained(XT), YT, reduction="none") / N).backward()
                descent.step()
        return trained.eval()

    return train


def trained_as(influence, train):
    """Whether the model that is explained after retraining is the one that was trained."""
    after = uw.retrained(influence, without=[3], retrain=train)
    np.testing.assert_allclose(
        uw.predict(after, XQ).outputs, train(WITHOUT_3, 0)(torch.from_numpy(XQ)).detach().numpy(), atol=1e-12
    )
    return True


@cache
def linear():
    """A softmax regression, away from its minimum; shared, so never to be changed."""
    return classifier(seeded(lambda: nn.Linear(3, 2).double()))


def minimum(influence):
    """Without row 3, by Newton's method."""
    return uw.retrained(influence, without=[3], retrain=uw.Newton()).objective.theta


def test_lbfgs_takes_more_steps_or_accepts_less():
    with refused("L-BFGS stopped with", "Raise max_steps, accept less with LBFGS(rtol=…), or pass your own retrain="):
        uw.retrained(linear(), without=[3], retrain=uw.LBFGS(max_steps=3))
    with refused("L-BFGS stopped with", "accept less with LBFGS(rtol=…)"):
        uw.retrained(linear(), without=[3], retrain=uw.LBFGS(rtol=1e-18))
    truth = minimum(linear())
    for settings, tolerance in (({"max_steps": 5000}, 1e-4), ({"max_steps": 3, "rtol": 1.0}, 1.0)):
        after = uw.retrained(linear(), without=[3], retrain=uw.LBFGS(**settings))
        torch.testing.assert_close(after.objective.theta, truth, rtol=0, atol=tolerance)
    assert trained_as(network(), own(net()))


def test_what_no_estimator_fits_is_minimised():
    with refused("Refit() runs the fit() of a scikit-learn estimator", "Use LBFGS(), Newton() for a linear predictor"):
        uw.retrained(linear(), without=[3], retrain=uw.Refit())
    for retrain in (uw.LBFGS(), uw.Newton()):
        assert float(uw.retrained(linear(), without=[3], retrain=retrain).risk_gradient.norm()) < 1e-5
    assert trained_as(network(), own(net()))


def test_a_network_away_from_a_minimum_is_no_case_for_newton():
    with refused("Newton's method needs a positive curvature", "Use retrain=LBFGS()"):
        uw.retrained(network(), without=[3], retrain=uw.Newton())
    after = uw.retrained(network(), without=[3], retrain=uw.LBFGS(rtol=0.01))
    assert float(after.risk_gradient.norm()) < 0.01 * float(network().risk_gradient.norm())


def test_a_retrainer_is_a_function_or_an_object():
    def function(weights, seed):
        model = LogisticRegression(**TIGHT).fit(X, NAMES, sample_weight=weights)
        return {"coef": model.coef_, "intercept": model.intercept_}

    wrong = ["newton", uw.Newton, uw.LBFGS, LogisticRegression()]
    for retrain, instead in zip(wrong, [function, uw.Newton(), uw.LBFGS(rtol=1e-7), uw.Refit()], strict=True):
        with refused("retrain is ", "Pass a function (weights, seed) → params, or an object: Newton() or LBFGS() or "):
            uw.retrained(logistic(), without=[3], retrain=retrain)
        after = uw.retrained(logistic(), without=[3], retrain=instead)
        np.testing.assert_allclose(coef(after), refit([3]), atol=1e-6)


# ---- stacked.py --------------------------------------------------------------------------------------------------


def test_an_optimizer_is_one_of_minibatch():
    gradient = network().risk_gradient
    with refused("optimizer=", "Pass minibatch.SGD(lr=…) or minibatch.Adam(…)"):
        training(torch.optim.Adam(net().parameters()))
    torch.testing.assert_close(one_step(minibatch.SGD(lr=0.2)), -0.2 * gradient)
    torch.testing.assert_close(one_step(minibatch.Adam(lr=0.01)), -0.01 * gradient / (gradient.abs() + 1e-8))


@pytest.mark.parametrize("batches", [8, minibatch.Shuffled, "shuffled"])
def test_batches_are_of_minibatch(batches):
    with refused("batches=", "Pass minibatch.Shuffled(batch_size) or minibatch.Placed(batch_size)"):
        training(batches=batches)
    found = [training(batches=known).bind(network())(ONES) for known in (minibatch.Shuffled(8), minibatch.Placed(8))]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("factory", [net(), "net", torch.ones(2)])
def test_a_factory_builds(factory):
    with refused("factory is a ", "Pass a function without arguments that builds the module"):
        training(factory=factory)
    (path,) = training(factory=net).bind(network()).checkpoints(ONES[None], [0], [0])
    torch.testing.assert_close(path[0], network().objective.theta)


def test_a_head_is_trained_through_its_objective():
    head = classifier(parameters=["2.weight", "2.bias"])
    with refused("are features, which the factory's module does not take", "Leave factory out"):
        training().bind(head)
    for start in (None, torch.zeros(10)):
        (path,) = training(factory=None, start=start).bind(head).checkpoints(ONES[None], [0], [0, 2])
        torch.testing.assert_close(path[0], head.objective.theta if start is None else start.double())
        assert not torch.equal(path[0], path[1])


@pytest.mark.parametrize("weights", [ONES, np.ones((2, N)), np.ones((1, 3))])
def test_a_line_of_weights_and_a_seed_for_each(weights):
    bound = training().bind(network())
    with refused("weights has shape", "Pass one line of n weights and one seed for each model"):
        bound.many(weights, [0])
    first, second = bound.many(np.stack([ONES, WITHOUT_3]), [0, 1])
    torch.testing.assert_close(first, bound(ONES, 0))
    torch.testing.assert_close(second, bound(WITHOUT_3, 1))


def test_a_model_has_a_row_to_train_on():
    bound = training(epochs=1).bind(classifier(penalty=None))
    with refused("A model has no row with weight to train on", "Leave it at least one"):
        bound(0 * ONES)
    alone = classifier(X=X[3:4], y=Y[3:4], penalty=None)
    moved = bound(1 - WITHOUT_3) - alone.objective.theta
    torch.testing.assert_close(moved, -0.1 * alone.risk_gradient)


def test_seeds_are_listed():
    bound = training().bind(network())
    with refused("seeds=", "Pass a list with one seed for each model, such as "):
        bound.many(ONES[None], 0)
    (theta,) = bound.many(ONES[None], list(range(1)))
    torch.testing.assert_close(theta, bound(ONES, 0))
    torch.testing.assert_close(bound.many(ONES[None], np.arange(1))[0], theta)


@pytest.mark.parametrize("epochs", [[2, 1], [1, 1], [3], [], [-1], 2, ["2"], [1.5], None])
def test_epochs_ascend(epochs):
    bound = training().bind(network())
    with refused("epochs=", "Pass a list of different whole numbers from 0 to "):
        bound.checkpoints(ONES[None], [0], epochs)
    (path,) = bound.checkpoints(ONES[None], [0], [0, 1, 2])
    torch.testing.assert_close(path[2], bound(ONES))
    torch.testing.assert_close(bound.checkpoints(ONES[None], [0], np.array([2]))[0][0], path[2])


def test_what_diverges_takes_smaller_steps():
    with refused("models diverged: their parameters are NaN or infinite", "Use a smaller step than lr="):
        training(minibatch.SGD(lr=1e30), epochs=5).bind(network())(ONES)
    theta = training(minibatch.SGD(lr=0.1), epochs=5).bind(network())(ONES)
    assert np.isfinite(theta.numpy()).all()


def with_a_fixed_end():
    """A layer that is drawn and not trained."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module[2].requires_grad_(requires_grad=False)
    return module


def test_what_is_not_trained_is_built_as_it_was():
    model = seeded(with_a_fixed_end).eval()
    influence = classifier(model)
    with refused("With the explained parameters the factory's module gives", "Let the factory build the same module"):
        training(factory=with_a_fixed_end).bind(influence)

    def factory():
        module = with_a_fixed_end()
        module.load_state_dict(model.state_dict())
        module[0].reset_parameters()
        return module

    bound = training(factory=factory).bind(influence)
    paths = bound.checkpoints(np.ones((2, N)), [0, 1], [0, 2])
    assert not torch.equal(paths[0][0], paths[1][0])
    assert len(paths[0][1]) == 16


class Noisy(nn.Linear):
    """Randomness in training that is no dropout."""

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y + torch.randn_like(y) if self.training else y


def noisy():
    return seeded(lambda: Noisy(3, 2).double())


def test_another_randomness_is_trained_by_a_function_of_ones_own():
    influence = classifier(noisy().eval())
    with refused("cannot be trained in a stack", "Pass your own retrain=(weights, seed) → θ"):
        training(factory=noisy).bind(influence)
    assert trained_as(influence, own(noisy()))


class Centred(nn.Module):
    """What batch normalisation does to means."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


def normalised(layer):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), copy.deepcopy(layer), nn.Tanh(), nn.Linear(4, 2)).double())


def test_a_batch_that_is_mixed_takes_a_groupnorm():
    influence = classifier(normalised(Centred()).eval())
    with refused("mixes the examples of a batch in training mode", "Use a GroupNorm, or pass your own retrain="):
        training(factory=lambda: normalised(Centred())).bind(influence)
    assert trained_as(influence, own(normalised(Centred())))
    found = [
        training(factory=lambda: normalised(nn.GroupNorm(1, 4))).bind(
            classifier(normalised(nn.GroupNorm(1, 4)).eval(), X=inputs)
        )(WITHOUT_3)
        for inputs in (X, changed(X, 3, 9.0))
    ]
    torch.testing.assert_close(*found)


def test_a_factory_needs_the_loss_apart():
    def outputs(params, example):
        return params["weight"] @ example[0] + params["bias"]

    def output_loss(output, example):
        return cross_entropy(output, example[1])

    def loss(params, example):
        return output_loss(outputs(params, example), example)

    def factory():
        return seeded(lambda: nn.Linear(3, 2).double())

    theta = {name: block.detach() for name, block in factory().named_parameters()}
    optimizer, batches = minibatch.SGD(lr=0.5), minibatch.Placed(8)
    one = uw.Influence(uw.Objective(loss, theta), (X, Y))
    with refused("is one function, and a factory's outputs need the loss apart", "Use explain(module, X, y, loss=…)"):
        training(optimizer, batches, factory=factory).bind(one)
    two = uw.Influence(uw.Objective(loss, theta, outputs=outputs, output_loss=output_loss), (X, Y))
    explained = uw.explain(factory(), X, Y, loss=cross_entropy)
    found = [training(optimizer, batches, factory=factory).bind(known)(ONES) for known in (explained, two)]
    found.append(training(optimizer, batches, factory=None).bind(one)(ONES))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_factory_builds_a_module():
    with refused("factory() returned a ", "It must build a torch module"):
        training(factory=lambda: net().state_dict()).bind(network())
    assert training(factory=lambda: net()).bind(network())(ONES).shape == (26,)


def test_a_factory_builds_what_is_explained():
    part = classifier(parameters=["0.weight", "0.bias"])
    for influence, factory in ((network(), lambda: net(outputs=3)), (part, net)):
        with refused("factory() builds a module that trains", "Build the same architecture, and explain all that was"):
            training(factory=factory).bind(influence)
        assert training(factory=net).bind(network())(ONES).shape == (26,)


@pytest.mark.parametrize(
    ("layer", "instead"),
    [(nn.BatchNorm1d(4), nn.GroupNorm(1, 4)), (nn.AlphaDropout(0.5), nn.Dropout(0.5))],
    ids=["statistics", "dropout"],
)
def test_running_statistics_and_odd_dropout_have_a_place_in_no_stack(layer, instead):
    influence = classifier(normalised(layer).eval())
    with refused("cannot be kept apart for stacked models", "Use a GroupNorm or plain Dropout, or pass your own"):
        training(factory=lambda: normalised(layer).train()).bind(influence)
    bound = training(factory=lambda: normalised(instead).train()).bind(classifier(normalised(instead).eval()))
    torch.testing.assert_close(bound.many(np.stack([ONES, WITHOUT_3]), [0, 1])[1], bound(WITHOUT_3, 1))
    assert trained_as(influence, own(normalised(layer)))


@pytest.mark.parametrize("start", [net(), [1.0], net(outputs=3).state_dict(), list(net().parameters())])
def test_a_start_has_the_parameters(start):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().requires_grad_())
    with refused("start does not have the parameters of the objective", "Pass model.state_dict() of the same architec"):
        training(start=start).bind(network())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    for known in (model.state_dict(), flat):
        (path,) = training(start=known).bind(network()).checkpoints(ONES[None], [0], [0])
        torch.testing.assert_close(path[0], flat)


# ---- trials.py ---------------------------------------------------------------------------------------------------


class Several:
    """Ridge regressions side by side; the first `left_out` of them are forgotten."""

    together = 3

    def __init__(self, left_out):
        self.left_out = left_out

    def __call__(self, weights, seed=0):
        return self.many([weights], [seed])[0]

    def many(self, weights, seeds):
        models = [Ridge(alpha=2.0).fit(X, Z, sample_weight=line) for line in weights][self.left_out :]
        return [np.r_[model.coef_, model.intercept_] for model in models]


def test_many_models_are_one_for_each_line():
    with refused("retrain.many returned", "Return one for each"):
        uw.leave_one_out(ridge(), (XQ, ZQ), [3, 4, 5], Several(1))
    outcomes = uw.leave_one_out(ridge(), (XQ, ZQ), [3, 4, 5], Several(0))
    np.testing.assert_allclose(outcomes.actual, uw.leave_one_out(ridge(), (XQ, ZQ), [3, 4, 5]).actual, atol=1e-10)


def batchnorm():
    return normalised(nn.BatchNorm1d(4))


def test_buffers_come_with_the_module_or_its_state():
    influence, train = classifier(batchnorm().eval()), own(batchnorm())
    with refused("which training changes too", "Return the trained module itself, or its state_dict()"):
        uw.retrained(
            influence, without=[3], retrain=lambda weights, seed: dict(train(weights, seed).named_parameters())
        )
    assert trained_as(influence, train)
    for form in (lambda model: model, lambda model: model.state_dict()):
        after = uw.retrained(
            influence, without=[3], retrain=lambda weights, seed, form=form: form(train(weights, seed))
        )
        truth = train(WITHOUT_3, 0)(torch.from_numpy(XQ)).detach().numpy()
        np.testing.assert_allclose(uw.predict(after, XQ).outputs, truth, atol=1e-12)


def test_what_is_before_a_head_stays_frozen():
    head = classifier(parameters=["2.weight", "2.bias"])
    with refused("such tensors before the head", "Keep what is before the head frozen, or explain the whole module"):
        uw.retrained(head, without=[3], retrain=own(net()))
    frozen = net()
    frozen[0].requires_grad_(requires_grad=False)
    assert trained_as(head, own(frozen))
    assert trained_as(network(), own(net()))


def test_buffers_are_those_of_the_same_architecture():
    influence, train = classifier(batchnorm().eval()), own(batchnorm())
    for mean in (torch.zeros(5), torch.full((4,), torch.nan)):
        state = train(ONES, 0).state_dict() | {"1.running_mean": mean}
        with refused("its values must be finite", "Return a model of the same architecture"):
            uw.retrained(influence, retrain=lambda weights, seed, state=state: state)
        assert trained_as(influence, train)


@cache
def forms():
    """A trained module, its state, its parameters by name, and one flat vector."""
    model = own(net())(ONES, 0)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return model, model.state_dict(), dict(model.named_parameters()), flat


def returning(value):
    return uw.retrained(network(), retrain=lambda weights, seed: value)


def test_parameters_have_their_names():
    with refused("retrain returned parameters without '", "Return the trained module, its state_dict(), a dict with"):
        returning({name.upper(): block for name, block in forms()[2].items()})
    for form in forms():
        torch.testing.assert_close(returning(form).objective.theta, forms()[-1])


@pytest.mark.parametrize("value", [None, "θ", LogisticRegression(), list(net().parameters())])
def test_parameters_are_numbers(value):
    with refused("retrain returned a ", "Return the trained module, its state_dict(), a dict with"):
        returning(value)
    for form in forms():
        torch.testing.assert_close(returning(form).objective.theta, forms()[-1])


def test_all_parameters_are_returned_in_order():
    model = Ridge(alpha=2.0).fit(X, Z, sample_weight=WITHOUT_3)
    with refused("numbers, and the objective has", "Return all of them, in this order"):
        uw.retrained(ridge(), retrain=lambda weights, seed: model.coef_)
    after = uw.retrained(ridge(), retrain=lambda weights, seed: np.r_[model.coef_, model.intercept_])
    np.testing.assert_allclose(uw.predict(after, XQ).outputs[:, 0], model.predict(XQ))


def test_what_diverged_is_trained_with_a_smaller_step():
    def train(rate):
        def descend(weights, seed):
            theta = np.zeros(4)
            ones = np.c_[X, ONES]
            for _ in range(300):
                theta = theta - rate * ones.T @ (weights * (ones @ theta - Z))
            return theta

        return descend

    influence = regressor(seeded(lambda: nn.Linear(3, 1).double()), penalty=None)
    with refused("retrain returned NaN or infinite parameters", "Use a smaller step"), np.errstate(all="ignore"):
        uw.retrained(influence, retrain=train(100.0))
    after = uw.retrained(influence, retrain=train(0.01))
    np.testing.assert_allclose(coef_of(after), np.linalg.lstsq(np.c_[X, ONES], Z, rcond=None)[0], atol=1e-6)


def coef_of(influence):
    return influence.objective.theta.numpy()


# ---- recording.py, moves.py, through.py ----------------------------------------------------------------------------


def stepping(optimizer=None, recording=None, *, batches=3, named=True, rows=None, **settings):
    """A small training with its recording; `optimizer` makes one from parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    made = (optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1)))(model.parameters())
    recording = uw.Recording(model, made, XT, YT, loss=cross_entropy, **settings) if recording is None else recording
    with recording:
        for batch in range(batches):
            some = torch.arange(8 * batch, 8 * batch + 8) % N
            made.zero_grad()
            cross_entropy(model(XT[some]), YT[some]).backward()
            if named:
                recording.batch(some if rows is None else rows)
            made.step()
    return recording


def through_values(recording, **settings):
    values = uw.through(recording, **settings).on_loss(XQ, YQ, check=False).values
    assert np.isfinite(values).all()
    return values


def test_an_optimiser_that_is_not_known():
    with refused("is not among the optimisers whose step is known here", "SGD, Adam and AdamW of torch.optim"):
        stepping(lambda parameters: torch.optim.RMSprop(parameters, lr=0.1))
    through_values(stepping(lambda parameters: torch.optim.AdamW(parameters, lr=0.1)))
    assert uw.explain(nn.Linear(3, 2).double(), XT, YT, loss=cross_entropy).n == N


def test_an_optimiser_with_a_setting_that_is_not_known():
    with refused("is not a step that is known here", "Leave it off"):
        stepping(lambda parameters: torch.optim.Adam(parameters, amsgrad=True))
    through_values(stepping(torch.optim.Adam))


def test_settings_that_are_no_numbers():
    def odd(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.param_groups[0]["weight_decay"] = "none"
        optimizer.step = lambda: None
        return optimizer

    from upweight.training.moves import rule_of, settings_of

    optimizer = odd(nn.Linear(3, 2).parameters())
    with refused("A parameter group has settings that are no numbers", "Use plain numbers"):
        settings_of(optimizer.param_groups[0], rule_of(optimizer)[1])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert settings_of(optimizer.param_groups[0], rule_of(optimizer)[1])["weight_decay"] == 0


def test_an_optimiser_of_another_module():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with refused("tensors that are no parameters of", "Pass the module whose parameters() were given to it"):
        uw.Recording(one, torch.optim.SGD(other.parameters(), lr=0.1), X, Y, loss=cross_entropy)
    assert uw.Recording(other, torch.optim.SGD(other.parameters(), lr=0.1), X, Y, loss=cross_entropy).steps == []


def test_a_recording_is_of_one_training():
    recording = stepping()
    with refused("This recording holds a training of", "Make another uw.Recording"), recording:
        pass
    assert len(stepping().steps) == 3


def test_a_recording_begins_with_the_training():
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    cross_entropy(model(XT), YT).backward()
    optimizer.step()
    late = uw.Recording(model, optimizer, XT, YT, loss=cross_entropy)
    with refused("The optimizer has made steps already", "Make a new optimizer"), late:
        pass
    fresh = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with uw.Recording(model, fresh, XT, YT, loss=cross_entropy) as recording:
        recording.batch([0, 1])
        fresh.step()
    assert len(recording.steps) == 1


def test_rows_of_a_step():
    with refused("Pass the numbers of the training rows of this batch", "such as [3, 17, 4]"):
        stepping(rows=[0.5])
    with refused("was made without the rows of its gradient", "recording.batch(rows) before every step"):
        stepping(named=False)
    assert stepping(rows=[3, 17, 4]).steps[0].parts[0].rows.tolist() == [3, 17, 4]


def test_a_recording_of_nothing():
    with refused("The recording holds no step", "recording.batch(rows)"):
        uw.through(stepping(batches=0))
    through_values(stepping())


def test_a_recording_that_has_not_ended():
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with uw.Recording(model, optimizer, XT, YT, loss=cross_entropy) as recording:
        cross_entropy(model(XT), YT).backward()
        recording.batch(np.arange(N))
        optimizer.step()
        with refused("and has not ended: its last parameters are not known", "Leave `with recording:` first"):
            uw.through(recording)
        assert len(recording.steps) == 1
    through_values(recording)


def test_options_of_a_derivative_through_steps():
    recording = stepping()
    with refused("second_moment=", "Pass 'fixed' or 'through'"):
        uw.through(recording, second_moment="detached")
    with refused("since=", "It is the number of a step, from 0 to"):
        uw.through(recording, since=3)
    for option in ("fixed", "through"):
        through_values(recording, second_moment=option, since=2)


def test_steps_that_lead_elsewhere():
    with refused("made again from the rows and settings that were recorded, end", "Correct what uw.Recording was told"):
        through_values(stepping(rows=[1, 2, 3]))
    with refused("made again from the rows and settings that were recorded, end", "Correct what uw.Recording was told"):
        through_values(stepping(clip=0.01))
    through_values(stepping())


def test_a_training_whose_derivative_is_no_prediction():
    def wild(rate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        recording = uw.Recording(model, optimizer, XT, YT, loss=cross_entropy)
        with recording:
            for step in range(120):
                some = torch.arange(8 * step, 8 * step + 8) % N
                optimizer.zero_grad()
                cross_entropy(model(XT[some]), YT[some]).backward()
                recording.batch(some)
                optimizer.step()
        return recording

    recording = wild(6.0)
    with refused("is not what small changes of the weights do: ", "Use scores at the end of training"):
        uw.through(recording, since=0).on_loss(XQ, YQ)
    with refused("is not what small changes of the weights do, from whatever step on", "Use scores at the end of"):
        uw.through(recording)
    assert uw.through(recording, since=60).on_loss(XQ, YQ, check=False).values.shape == (len(XQ), N)
    assert uw.explain(recording.model, XT, YT, loss=cross_entropy).on_loss(XQ, YQ).values.shape == (len(XQ), N)
    assert "slope" in str(uw.through(wild(0.05)).on_loss(XQ, YQ).certificate)


def test_a_stacked_training_with_dropout_is_not_recorded():
    def dropping():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).double()

    def training(factory):
        return uw.StackedTraining(minibatch.SGD(0.1), minibatch.Shuffled(8), 1, factory)

    influence = classifier(seeded(dropping).eval())
    with refused("is not recorded: the derivative would be of steps without it", "Let the factory build the module"):
        uw.recorded(training(dropping), influence)
    (run,) = uw.recorded(training(lambda: dropping().eval()), influence)
    through_values(run, since=0)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0], 0 * WITHOUT_3, -WITHOUT_3, np.nan * WITHOUT_3])
def test_weights_of_a_recorded_training(weights):
    influence, training = classifier(), uw.StackedTraining(minibatch.SGD(0.1), minibatch.Shuffled(8), 1)
    with refused("weights has shape", "Pass one finite factor ≥ 0 for "):
        uw.recorded(training, influence, weights=weights)
    (run,) = uw.recorded(training, influence, weights=WITHOUT_3)
    assert not through_values(run, since=0)[:, 3].any()


@pytest.mark.parametrize("seeds", [3, [], "12", [1.5]])
def test_seeds_of_a_recorded_training(seeds):
    influence, training = classifier(), uw.StackedTraining(minibatch.SGD(0.1), minibatch.Shuffled(8), 1)
    with refused("A training is recorded for each of a list of seeds", "such as [0, 1, 2]"):
        uw.recorded(training, influence, seeds)
    assert len(uw.recorded(training, influence, [0, 1, 2])) == 3


def folder_of(path, **settings):
    """The folder of a recorded training, and a model like the one that was trained."""
    assert stepping(store=path, **settings).steps
    return path, nn.Linear(3, 2).double()


def test_the_folder_of_a_recording(tmp_path):
    folder, model = folder_of(tmp_path / "whole")
    with refused("holds a training that was recorded to its end", "Go on with uw.Recording.open("):
        stepping(store=folder)
    expected = through_values(stepping(store=tmp_path / "other"), since=0)
    opened = uw.Recording.open(folder, model, XT, YT, loss=cross_entropy)
    np.testing.assert_array_equal(through_values(opened, since=0), expected)


def test_a_folder_without_a_recorded_training(tmp_path):
    model = nn.Linear(3, 2).double()
    with refused("holds no recorded training", "uw.Recording(model, optimizer, X, y, store=folder)"):
        uw.Recording.open(tmp_path / "nothing", model, XT, YT, loss=cross_entropy)
    (folder_of(tmp_path / "some")[0] / "steps.safetensors").unlink()
    with refused("has not ended: it was interrupted", "Run the script that records it again"):
        uw.Recording.open(tmp_path / "some", model, XT, YT, loss=cross_entropy)
    folder, model = folder_of(tmp_path / "some")
    through_values(uw.Recording.open(folder, model, XT, YT, loss=cross_entropy), since=0)


def test_a_recorded_training_of_another_model(tmp_path):
    folder, model = folder_of(tmp_path / "run")
    with refused("The recorded training found '", "Pass a model of the architecture that was trained"):
        uw.Recording.open(folder, nn.Linear(4, 2).double(), XT, YT, loss=cross_entropy)
    through_values(uw.Recording.open(folder, model, XT, YT, loss=cross_entropy), since=0)


def test_parameters_that_a_folder_cannot_keep(tmp_path):
    def train(dtype, store):
        model = nn.Linear(3, 2).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with uw.Recording(model, optimizer, XT.to(dtype), YT, loss=cross_entropy, store=store) as recording:
            cross_entropy(model(XT.to(dtype)), YT).backward()
            recording.batch(np.arange(N))
            optimizer.step()
        return recording

    with refused("are not kept in a folder: NumPy has no such numbers", "Train in float32, or leave store= out"):
        train(torch.bfloat16, tmp_path / "half")
    assert len(train(torch.float32, tmp_path / "single").steps) == len(train(torch.bfloat16, None).steps) == 1


def test_a_parameter_that_has_a_gradient_now_and_then():
    def train(recording, model, optimizer, parts):
        with recording:
            for part in parts:
                optimizer.zero_grad()
                cross_entropy(model(XT, part), YT).backward()
                recording.batch(np.arange(N))
                optimizer.step()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x, part="one"):
            return self.one(x) if part == "one" else self.one(x) + self.other(x)

    def made():
        torch.manual_seed(0)
        model = Two()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
        return uw.Recording(model, optimizer, XT, YT, loss=cross_entropy), model, optimizer

    with refused(" gradient in step ", "Let every step's loss use the same parameters"):
        train(*made(), ["one", "both"])
    with refused(" gradient in step ", "requires_grad_(False)"):
        train(*made(), ["both", "one"])
    recording, model, optimizer = made()
    train(recording, model, optimizer, ["one", "one"])  # `other` is never reached, and stays
    through_values(recording, since=0)
    assert recording.moving == ["one.weight", "one.bias"]
