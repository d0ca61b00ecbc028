"""A module's buffers that training changes come along when it is trained again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw

torch.manual_seed(0)
X = torch.randn(80, 4) * 3 + 5
Y = X[:, :1] * 0.3 + torch.randn(80, 1) * 0.1
ON, EVERYONE = (X[:3], Y[:3]), np.ones(80)
MSE = nn.functional.mse_loss


def train(weights, seed=7):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    steps, kept = torch.optim.Adam(net.parameters(), 1e-2), torch.tensor(np.asarray(weights) > 0)
    for _ in range(40):
        steps.zero_grad()
        MSE(net(X[kept]), Y[kept]).backward()
        steps.step()
    return net.eval()


def losses(net):
    with torch.no_grad():
        return ((net(ON[0]) - ON[1]) ** 2)[:, 0].numpy()


RETURNS = {
    "the module": lambda net: net,
    "its state dict": lambda net: net.state_dict(),
    "parameters and buffers": lambda net: {**dict(net.named_parameters()), **dict(net.named_buffers())},
    "the module, in training mode": lambda net: net.train(),
}


@pytest.fixture(scope="module")
def influence():
    return uw.explain(train(EVERYONE, 0), X, Y, loss=MSE, damping=0.01)


def without(*rows):
    weights = EVERYONE.copy()
    weights[list(rows)] = 0
    return weights


@pytest.mark.parametrize("form", RETURNS.values(), ids=RETURNS)
def test_leave_one_out_is_retraining_by_hand(influence, form):
    out = uw.leave_one_out(influence, ON, [5, 9], lambda weights, seed: form(train(weights)))
    now, control = losses(train(EVERYONE, 0)), losses(train(EVERYONE))
    np.testing.assert_allclose(out.control, control - now, rtol=1e-4, atol=1e-6)
    for column, row in enumerate((5, 9)):
        np.testing.assert_allclose(out.actual[:, column], losses(train(without(row))) - control, rtol=1e-3, atol=1e-6)


def test_subsets_and_curves_and_retrained_too(influence):
    def retrain(weights, seed):
        return train(weights, 7)

    control = losses(train(EVERYONE))
    kept = np.arange(80)[None, ::2]
    outcomes = uw.subset_retraining(influence, ON, kept, retrain)
    really = losses(train(without(*range(1, 80, 2))))
    np.testing.assert_allclose(outcomes.values[:, 0, 0], really, rtol=1e-4, atol=1e-6)
    after = uw.retrained(influence, without=[5], retrain=retrain)
    np.testing.assert_allclose(uw.predict(after, X[:3]).outputs, train(without(5))(X[:3]).detach().numpy(), rtol=1e-4)
    curve = uw.removal_curve(influence, {"five": influence.on_loss(*ON)}, ON, counts=[1], retrain=retrain)
    first = int(influence.on_loss(*ON).helpful(1).rows[0, 0])
    expected = losses(train(without(first)))[0] - control[0]
    assert float(curve.changes["five"][0, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "bare",
    [
        lambda net: dict(net.named_parameters()),
        lambda net: torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
    ],
    ids=["parameters", "flat"],
)
def test_bare_parameters_are_refused_with_the_way_out(influence, bare):
    with pytest.raises(uw.errors.InvalidInput, match=r"'1.running_mean'.*module itself, or its state_dict"):
        uw.leave_one_out(influence, ON, [5], lambda weights, seed: bare(train(weights)))


def test_another_architecture_is_refused(influence):
    def retrain(weights, seed):
        state = train(weights).state_dict()
        return state | {"1.running_mean": torch.zeros(5)}

    with pytest.raises(uw.errors.InvalidInput, match="running_mean"):
        uw.leave_one_out(influence, ON, [5], retrain)


def test_a_module_without_moving_buffers_may_return_bare_parameters():
    net = nn.Linear(4, 1).eval()
    influence = uw.explain(net, X, Y, loss=MSE, penalty=0.1)
    out = uw.leave_one_out(influence, ON, [5], lambda weights, seed: dict(net.named_parameters()))
    assert np.abs(out.control).max() < 1e-6


def test_the_librarys_own_retrainer_keeps_the_buffers_as_they_are(influence):
    out = uw.retrained(influence, without=[5], retrain=uw.LBFGS(rtol=1.0, max_steps=20_000))
    assert out.objective.fixed["1.running_mean"].equal(influence.objective.fixed["1.running_mean"])


def test_parameters_that_are_not_differentiated_come_along():
    """The last layer is explained, the first one is trained again too."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Softplus())
    again = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Softplus())
    influence = uw.explain(net.eval(), X, Y, loss=MSE, damping=0.1, parameters=["2.weight", "2.bias"])
    out = uw.leave_one_out(influence, ON, [5], lambda weights, seed: again)
    np.testing.assert_allclose(out.control, losses(again) - losses(net), rtol=1e-4)


def test_a_body_that_was_trained_too_is_refused_where_only_its_head_is_explained():
    torch.manual_seed(1)
    net, again = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).eval() for _ in range(2))
    head = uw.explain(net, X, Y, loss=MSE, damping=0.1, parameters=["2.weight", "2.bias"])
    with pytest.raises(uw.errors.InvalidInput, match=r"another '0.weight' \(2 such tensors.*leave parameters= out"):
        uw.leave_one_out(head, ON, [5], lambda weights, seed: again)
    whole = uw.explain(net, X, Y, loss=MSE, damping=0.1)  # what it says to do
    out = uw.leave_one_out(whole, ON, [5], lambda weights, seed: again)
    np.testing.assert_allclose(out.control, losses(again) - losses(net), rtol=1e-4)
    frozen = {**net.state_dict(), "2.weight": again[2].weight, "2.bias": again[2].bias}
    out = uw.leave_one_out(head, ON, [5], lambda weights, seed: frozen)
    both = nn.Sequential(net[0], net[1], again[2])
    np.testing.assert_allclose(out.control, losses(both) - losses(net), rtol=1e-4, atol=1e-6)
