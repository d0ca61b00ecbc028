"""Laws of averaged models: the members' mean exactly, their spread and certificates; TracIn by plain autograd."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.nn.functional import cross_entropy, softmax

import upweight as uw
from cases import make
from oracles import gradient
from small import XQ, YQ, ZQ, X, Y, Z, changed, classifier, fitted, net, pairs, refuses, ridge, row

NAMES = ("softmax", "ridge", "mlp", "cnn", "sklearn_logistic")
SEEDS = (0, 1, 2)


def members(name, count=3, **settings):
    """Influences of one case at different dampings, and for losses of one's own at different parameters too."""
    case = make(name, weighted=True)
    found = [case.influence(damping=0.01 * (c + 1), **settings) for c in range(count)]
    if case.model.estimator is None:
        draw = torch.Generator().manual_seed(1)
        examples = uw.Examples(case.X, case.y, sample_weight=case.problem.weights.numpy())
        for c in range(1, count):
            theta = case.theta + 0.01 * torch.randn(len(case.theta), generator=draw, dtype=torch.float64)
            given = {"curvature": uw.operators.EmpiricalFisher()} | settings
            found[c] = uw.Influence(case.objective(theta=theta), examples, damping=0.01 * (c + 1), **given)
    return case, found


def queries(case):
    return case.Xq.numpy(), case.yq.numpy()


def states_of_a_run(epochs=3):
    """A module, and its state dicts and learning rates while it trains."""
    model, states, rates = net(), [], [0.3, 0.2, 0.1][:epochs]
    inputs, labels = torch.tensor(X), torch.tensor(Y)
    for rate in rates:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model, states, rates


# ---- the mean ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_ensemble_is_the_mean_of_its_members(name):
    case, parts = members(name)
    both = uw.ensemble(parts)
    groups = [[0, 1, 2], [5, 7]]
    asked = [
        (both.on_loss(*queries(case)), [one.on_loss(*queries(case)) for one in parts]),
        (both.of_groups(groups, on=queries(case)), [one.of_groups(groups, on=queries(case)) for one in parts]),
        (both.of_self(), [one.of_self() for one in parts]),
        (both.of_self([4, 2]), [one.of_self([4, 2]) for one in parts]),
    ]
    for ours, theirs in asked:
        stacked = np.stack([one.values for one in theirs])
        assert ours.values == pytest.approx(stacked.mean(0), rel=1e-12, abs=1e-300)
        spread = stacked.std(0, ddof=1) / np.sqrt(len(parts))
        assert ours.standard_error == pytest.approx(spread, rel=1e-8, abs=1e-14 * np.abs(stacked).max())
        assert np.array_equal(ours.rows, theirs[0].rows)
    scores = asked[0][0]
    assert scores.query_values == pytest.approx(np.mean([one.query_values for one in asked[0][1]], 0))
    assert scores.derivative == pytest.approx(np.mean([one.derivative for one in asked[0][1]], 0), rel=1e-10)
    assert scores.counterfactual == "row removed"
    assert scores.n == both.n == case.n


def test_one_member_is_itself():
    case, parts = members("mlp", 1)
    ours, theirs = uw.ensemble(parts).on_loss(*queries(case)), parts[0].on_loss(*queries(case))
    assert np.array_equal(ours.values, theirs.values)
    assert ours.standard_error is None
    np.testing.assert_equal([asdict(one) for one in ours.certificate.members], [asdict(theirs.certificate)])


def test_a_measure_that_all_members_compute():
    parts = [classifier(seeded_net(seed)) for seed in SEEDS]

    def probability(params, example):
        hidden = torch.tanh(example[0] @ params["0.weight"].T + params["0.bias"])
        return softmax(hidden @ params["2.weight"].T + params["2.bias"], -1)[0]

    ours = uw.ensemble(parts).on_measure(probability, XQ, YQ)
    assert ours.values == pytest.approx(np.mean([one.on_measure(probability, XQ, YQ).values for one in parts], 0))
    assert ours.measure == "probability"


def test_newton_steps_are_averaged_with_their_errors():
    parts = [uw.explain(LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(X, Y), X, Y) for C in (0.3, 1.0)]
    ours = uw.ensemble(parts).of_removing([[0], [1]], on=(XQ, YQ))
    theirs = [one.of_removing([[0], [1]], on=(XQ, YQ)) for one in parts]
    assert ours.values == pytest.approx(np.mean([one.values for one in theirs], 0))
    assert ours.error == pytest.approx(np.mean([one.error for one in theirs], 0))
    assert isinstance(refuses(lambda: ours.derivative, ValueError, "no derivative"), uw.errors.Undefined)


def test_the_mean_predicts_the_mean_of_retrainings():
    """Leave-one-out of every member, averaged: the slope of actual on predicted is 1."""
    alphas = (1.0, 3.0, 10.0)
    parts = [uw.explain(Ridge(alpha=alpha).fit(X, Z), X, Z) for alpha in alphas]
    rows = np.arange(12)
    really = [uw.leave_one_out(one, (XQ, ZQ), rows) for one in parts]
    outcomes = replace(really[0], actual=np.mean([one.actual for one in really], 0), query_values=None)
    exact = uw.agreement(uw.ensemble(parts).of_removing(rows, on=(XQ, ZQ)), outcomes)
    assert exact.slope == pytest.approx(1, abs=1e-6)
    assert uw.agreement(uw.ensemble(parts).on_loss(XQ, ZQ), outcomes).pearson > 0.98


def test_an_ensemble_agrees_with_retrainings_of_one_member():
    """The members' mean loss is not that member's, and that is no reason to refuse."""
    parts = [uw.explain(Ridge(alpha=alpha).fit(X, Z), X, Z) for alpha in (1.0, 2.0)]
    outcomes = uw.leave_one_out(parts[0], (XQ, ZQ), [0, 3, 5])
    assert uw.agreement(uw.ensemble(parts).on_loss(XQ, ZQ), outcomes).pearson > 0.95
    other = uw.leave_one_out(parts[0], (XQ + 1, ZQ), [0, 3, 5])
    refuses(lambda: uw.agreement(parts[0].on_loss(XQ, ZQ), other), ValueError, "Pass the same queries")


def test_bagged_members_may_weigh_rows_differently():
    draw = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        weights = np.bincount(draw.integers(len(X), size=len(X)), minlength=len(X)).astype(float)
        model = Ridge(alpha=2.0).fit(X, Z, sample_weight=weights)
        parts.append(uw.explain(model, X, Z, sample_weight=weights))
    scores = uw.ensemble(parts).on_loss(XQ, ZQ)
    assert scores.values == pytest.approx(np.mean([one.on_loss(XQ, ZQ).values for one in parts], 0))
    refuses(lambda: scores.derivative, ValueError, "no change of one weight")
    refuses(lambda: uw.ensemble(parts).of_self().derivative, ValueError, "no change of one weight")


def test_members_may_see_the_rows_in_their_own_form():
    """Other scalers, other shapes of the same pictures, a Dataset beside arrays."""
    scaled = [make_pipeline(StandardScaler(with_std=std), Ridge()).fit(X, Z) for std in (True, False)]
    assert len(uw.ensemble([uw.explain(model, X, Z) for model in scaled])) == 2
    folded = nn.Sequential(nn.Flatten(), seeded_net(0)).double().eval()
    square = uw.explain(folded, X[:, None], Y, loss=cross_entropy, penalty=0.1)
    dataset = uw.explain(seeded_net(1), pairs(), loss=cross_entropy, penalty=0.1)
    assert len(uw.ensemble([classifier(), square, dataset])) == 3


# ---- certificates ------------------------------------------------------------------------------------------------


def test_every_member_keeps_its_certificate():
    case, parts = members("mlp", solver=uw.solvers.CG(rtol=1e-8))
    scores = uw.ensemble(parts).on_loss(*queries(case))
    theirs = [one.on_loss(*queries(case)).certificate for one in parts]
    joined = scores.certificate
    assert len(joined.members) == 3
    for ours, one in zip(joined.members, theirs, strict=True):
        assert repr(ours) == repr(one)
    assert joined.residual == pytest.approx(np.max([one.residual for one in theirs], 0))
    assert joined.drift == pytest.approx(np.mean([one.drift for one in theirs], 0))
    assert joined.damping == 0.03
    assert joined.gradient_norm == max(one.gradient_norm for one in theirs)
    assert joined.min_curvature == min(one.min_curvature for one in theirs)
    assert joined.sweeps == sum(one.sweeps for one in theirs)
    assert "mean of 3 models: Hessian() and EmpiricalFisher()" in repr(scores)


def test_the_least_coverage_is_the_ensembles():
    whole, part = (
        classifier(),
        uw.explain(net(), X, Y, loss=cross_entropy, penalty=0.1, parameters=["2.weight", "2.bias"]),
    )
    known = uw.ensemble([whole, part]).on_loss(XQ, YQ).certificate
    assert [one.coverage for one in known.members] == [1.0, part.objective.coverage]
    assert known.coverage == part.objective.coverage < 1


def test_saved_scores_hold_every_certificate(tmp_path):
    case, parts = members("mlp")
    scores = uw.ensemble(parts).on_loss(*queries(case))
    scores.save(tmp_path / "mean.safetensors")
    again = uw.Scores.load(tmp_path / "mean.safetensors")
    assert np.array_equal(again.values, scores.values)
    assert np.array_equal(again.standard_error, scores.standard_error)
    np.testing.assert_equal(asdict(again.certificate), asdict(scores.certificate))
    assert np.array_equal(again.certificate.members[2].residual, scores.certificate.members[2].residual)
    single = parts[0].on_loss(*queries(case))
    single.save(tmp_path / "one.safetensors")
    assert uw.Scores.load(tmp_path / "one.safetensors").certificate.members == ()


def test_blocks_of_queries_join_their_members():
    case, parts = members("mlp", 2)
    both = uw.ensemble(parts)
    whole = both.on_loss(*queries(case))
    blocks = [both.on_loss(case.Xq[part].numpy(), case.yq[part].numpy()) for part in (slice(0, 1), slice(1, 4))]
    joined = uw.Scores.joined(blocks)
    assert joined.values == pytest.approx(whole.values, rel=1e-9)
    assert [len(one.residual) for one in joined.certificate.members] == [4, 4]


# ---- checkpoints and TracIn --------------------------------------------------------------------------------------


def seeded_net(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def test_checkpoints_are_the_states_and_leave_the_module_alone():
    model, states, _ = states_of_a_run()
    states = states[::-1]  # the last one loaded is not the module's own
    before = copy.deepcopy(model.state_dict())
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    parts = uw.checkpoints(model, (state for state in states), X, Y, loss=cross_entropy, damping=0.1)
    for part, state in zip(parts, states, strict=True):
        assert torch.equal(part.objective.theta, torch.cat([state[name].flatten() for name in part.objective.blocks]))
        lone = net()
        lone.load_state_dict(state)
        alone = uw.explain(lone.eval(), X, Y, loss=cross_entropy, damping=0.1)
        assert np.array_equal(part.on_loss(XQ, YQ).values, alone.on_loss(XQ, YQ).values)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, grads[name])
    assert not model.training
    assert len(uw.ensemble(parts)) == 3


def test_buffers_belong_to_the_checkpoint():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    states = []
    for scale in (1.0, 5.0):
        model.train()(torch.tensor(X) * scale)
        states.append(copy.deepcopy(model.state_dict()))
    parts = uw.checkpoints(model.eval(), states, X, Y, loss=cross_entropy, damping=0.1)
    first, second = (part.on_loss(XQ, YQ).query_values for part in parts)
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize("weighted", [False, True])
def test_tracin_is_a_loop_of_autograd_gradients(weighted):
    model, states, rates = states_of_a_run()
    weights = np.linspace(0.5, 2, len(X)) if weighted else np.ones(len(X))
    parts = uw.checkpoints(model, states, X, Y, loss=cross_entropy, sample_weight=weights)
    traced = uw.TracIn(parts, rates)
    values, own = np.zeros((len(XQ), len(X))), np.zeros(len(X))
    for state, rate in zip(states, rates, strict=True):
        copied = net()
        copied.load_state_dict(state)

        def flat(x, y, copied=copied):
            copied.zero_grad()
            cross_entropy(copied(torch.tensor(x)[None]), torch.tensor(y)[None]).backward()
            return torch.cat([parameter.grad.flatten() for parameter in copied.parameters()]).numpy()

        rows = np.stack([flat(x, y) for x, y in zip(X, Y, strict=True)])
        asked = np.stack([flat(x, y) for x, y in zip(XQ, YQ, strict=True)])
        values += rate * asked @ rows.T * weights
        own += rate * (rows**2).sum(1) * weights
    scores = traced.on_loss(XQ, YQ)
    assert scores.values == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert traced.of_self().values == pytest.approx(own, rel=1e-9)
    assert traced.of_self([7, 2]).values == pytest.approx(own[[7, 2]], rel=1e-9)
    assert scores.query_values == pytest.approx(parts[-1].on_loss(XQ, YQ).query_values)
    refuses(lambda: scores.derivative, ValueError, "no derivative")
    refuses(lambda: traced.of_self().derivative, ValueError, "no derivative")
    assert "TracIn" in repr(traced.of_self())


def test_tracin_says_what_one_step_on_a_row_does():
    """Its unit by deed: a small step on row i alone changes the query's loss by −values of one checkpoint."""
    case = make("mlp")
    rate, moved = 1e-5, 4
    theta = case.theta + 0.1
    parts = [uw.Influence(case.objective(theta=theta), (case.X, case.y))]
    values = uw.TracIn(parts, [rate]).on_loss(*queries(case)).values[:, moved]
    step = rate * gradient(lambda t: case.problem.loss(t, case.X[moved], case.y[moved]), theta)
    fall = case.query_loss(theta) - case.query_loss(theta - step)
    assert values == pytest.approx(fall.numpy(), rel=1e-3, abs=1e-3 * float(fall.abs().max()))


def test_one_checkpoint_with_identity_curvature_is_tracin():
    influence = classifier(penalty=None, curvature=uw.operators.Identity(), damping=0.0)
    traced = uw.TracIn([influence], [0.5]).on_loss(XQ, YQ).values
    assert traced == pytest.approx(0.5 * influence.n * influence.on_loss(XQ, YQ).values, rel=1e-9, abs=1e-12)
    assert traced == pytest.approx(0.5 * uw.baselines.gradient_dot(influence, XQ, YQ).values)


def test_tracin_ranks_and_predicts_nothing(tmp_path):
    model, states, rates = states_of_a_run()
    parts = uw.checkpoints(model, states, X, Y, loss=cross_entropy)
    scores = uw.TracIn(parts, rates).on_loss(XQ, YQ)
    outcomes = uw.Outcomes(np.zeros((4, 2)), np.zeros(4), np.array([0, 1]))
    refuses(lambda: uw.agreement(scores, outcomes), ValueError, "Compare like with like")
    scores.save(tmp_path / "tracin.safetensors")
    again = uw.Scores.load(tmp_path / "tracin.safetensors")
    assert repr(again) == repr(scores)
    assert len(again.certificate.members) == 3


# ---- refusals ----------------------------------------------------------------------------------------------------


def ridges(X_other, Z_other):
    parts = [
        uw.explain(Ridge().fit(inputs, targets), inputs, targets) for inputs, targets in ((X, Z), (X_other, Z_other))
    ]
    return uw.ensemble([parts[0], *parts])


def networks(X_other):
    return uw.ensemble([classifier(), classifier(X=X_other)])


def of_two_losses():
    """A hinge loss that a smooth one stands for has a name of its own."""
    models = [
        LinearSVC(loss="hinge", C=0.1, tol=1e-10, max_iter=100_000, random_state=0),
        LogisticRegression(tol=1e-10),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uw.errors.TheoryWarning)
        parts = [uw.explain(model.fit(X, Y), X, Y, damping=0.01) for model in models]
    return uw.ensemble(parts).on_loss(X[:2], Y[:2])


def traced(rates):
    return uw.TracIn([classifier(), classifier()], rates)


def explained(*states):
    return uw.checkpoints(net(), states, X, Y, loss=cross_entropy)


def one_state():
    return uw.checkpoints(net(), net().state_dict(), X, Y, loss=cross_entropy)


@pytest.mark.parametrize(
    ("deed", "kind", "text"),
    [
        row("nobody", ValueError, "members holds nothing.*uw.checkpoints", lambda: uw.ensemble([])),
        row("a model", ValueError, "members holds a LogisticRegression", lambda: uw.ensemble([fitted()])),
        row("scores", ValueError, "members holds a Scores", lambda: uw.ensemble([ridge(), ridge().on_loss(XQ, ZQ)])),
        row("other n", ValueError, "Member 2 .* 39 rows, not 40.*sample_weight 0", lambda: ridges(X[1:], Z[1:])),
        row("other order", ValueError, "Member 2 .* target of row 0 differs", lambda: ridges(X[::-1], Z[::-1])),
        row("a label", ValueError, "target of row 5 differs .so do 1 in", lambda: ridges(X, changed(Z, 5, 9.0))),
        row("an input", ValueError, "input of row 0 differs by 1", lambda: ridges(changed(X, (0, 0), X[0, 0] + 1), Z)),
        row("a module's input", ValueError, "input of row 39 differs", lambda: networks(changed(X, (39, 2), 7.0))),
        row("two losses", ValueError, "Members measure different things.*on_measure", of_two_losses),
        row("no state", ValueError, "states holds 0 state dicts", explained),
        row("one state", ValueError, "states is one OrderedDict of 4 entries.*\\[state\\]", one_state),
        row(
            "a foreign state",
            ValueError,
            "State 0 does not fit Sequential.*0.weight",
            lambda: explained(net(inputs=5).state_dict()),
        ),
        row(
            "an optimizer's",
            ValueError,
            "State 1 does not fit.*optimizer",
            lambda: explained(net().state_dict(), {"state": {}}),
        ),
        row("no mapping", ValueError, "State 0 does not fit", lambda: explained(3)),
        row("a missing rate", ValueError, "shape \\(1,\\).* there are 2 checkpoints", lambda: traced([0.1])),
        row("a negative rate", ValueError, "from -0.1", lambda: traced([0.1, -0.1])),
        row("no rate above 0", ValueError, "not all 0", lambda: traced([0.0, 0.0])),
        row("an infinite rate", ValueError, "finite", lambda: traced([0.1, np.inf])),
        row("a word", ValueError, "are no numbers", lambda: traced("ab")),
        row("one number", ValueError, "are no numbers", lambda: traced(0.1)),
    ],
)
def test_refusals(deed, kind, text):
    refuses(deed, kind, text)
