"""A frozen network with a trained head: features once, closed forms, and derivatives through the whole network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import upweight as uw

N, Q = 60, 6


class Net(nn.Module):
    """A small convolutional extractor and a head."""

    def __init__(self, head, squeeze=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Softplus(), nn.Flatten()
        )
        self.head = head
        self.squeeze = squeeze
        self.passes = 0

    def forward(self, x):
        self.passes += len(x)
        out = self.head(self.body(x))
        return out.squeeze(-1) if self.squeeze else out


def bce(output, target):
    return F.binary_cross_entropy_with_logits(output.reshape(-1), target.double())


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N + Q, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = (x[:, 0, :4].mean((1, 2)) + 0.1 * torch.randn(N + Q, generator=generator) > x[:, 0, 4:].mean((1, 2))).long()
    return x[:N], y[:N], x[N:], y[N:]


def trained(net, x, y, penalty):
    """The head at its minimum, by scikit-learn."""
    with torch.no_grad():
        h = net.body(x).numpy()
    fit = LogisticRegression(C=1 / (len(x) * penalty), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(
        h, y.numpy()
    )
    with torch.no_grad():
        net.head.weight.copy_(torch.from_numpy(fit.coef_))
    return net


def net_with(head, seed=0, **settings):
    torch.manual_seed(seed)
    return Net(head(), **settings).double().eval()


@pytest.fixture
def binary(pictures):
    x, y, _, _ = pictures
    return trained(net_with(lambda: nn.Linear(24, 1, bias=False)), x, y, 0.01)


def explained(net, x, y, **settings):
    return uw.explain(net, x, y, loss=bce, penalty=0.01, parameters=["head.weight"], **settings)


def whole(net, x, y, **settings):
    """The same objective by hand, evaluated through the whole network."""

    def loss(params, example):
        out = torch.func.functional_call(net, params, (example[0][None],))
        return bce(out, example[1][None])

    params = {"head.weight": net.head.weight.detach()}
    objective = uw.Objective(loss, params, penalty=0.01, penalty_per_example=True)
    return uw.Influence(objective, (x, y), curvature=uw.operators.Hessian(), **settings)


def test_it_is_the_whole_network_s_influence(binary, pictures):
    x, y, xq, yq = pictures
    ours, slow = explained(binary, x, y), whole(binary, x, y, damping=0.0)
    assert ours.objective.linear is not None
    assert ours.objective.linear.loss is uw.losses.logistic
    assert list(ours.objective.blocks) == ["head.weight"]
    assert 0 < ours.objective.coverage < 1
    assert ours.damping == 0
    assert float(ours.risk_gradient.norm()) < 1e-6
    np.testing.assert_allclose(ours.on_loss(xq, yq).values, slow.on_loss(xq, yq).values, atol=1e-10)
    np.testing.assert_allclose(ours.of_self().values, slow.of_self().values, atol=1e-10)
    relabelled = ours.of_relabeling([3, 8], [1, 0], on=(xq, yq)).values
    np.testing.assert_allclose(relabelled, slow.of_relabeling([3, 8], [1, 0], on=(xq, yq)).values, atol=1e-10)
    replaced = ours.of_replacing([3], xq[:1], yq[:1], on=(xq, yq)).values
    np.testing.assert_allclose(replaced, slow.of_replacing([3], xq[:1], yq[:1], on=(xq, yq)).values, atol=1e-10)


def test_equation_5_goes_through_the_network(binary, pictures):
    x, y, xq, yq = pictures
    ours, slow = explained(binary, x, y), whole(binary, x, y, damping=0.0)
    moved = ours.of_perturbing([2, 9, 31], on=(xq, yq))
    assert moved.shape == (Q, 3, 1, 8, 8)
    np.testing.assert_allclose(moved, slow.of_perturbing([2, 9, 31], on=(xq, yq)), atol=1e-10)
    deltas = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours_moved = ours.on_params_of_perturbing([4, 5], deltas)
    np.testing.assert_allclose(ours_moved, slow.on_params_of_perturbing([4, 5], deltas), atol=1e-9)


def test_equation_5_is_what_a_real_refit_does(binary, pictures):
    x, y, xq, yq = pictures
    ours = uw.retrained(explained(binary, x, y))  # scikit-learn stops a little before the minimum
    gradient = ours.of_perturbing([9], on=(xq, yq))[:, 0]
    delta = 1e-4 * torch.from_numpy(np.sign(gradient[0]))
    before = ours.on_loss(xq, yq).query_values
    after = uw.retrained(uw.edited(ours, [9], x[9:10] + delta)).on_loss(xq, yq).query_values
    np.testing.assert_allclose(after - before, (gradient * delta.numpy()).sum((1, 2, 3)), rtol=2e-3, atol=1e-9)


def test_edited_rows_alone_run_through_the_network(binary, pictures):
    x, y, _, _ = pictures
    ours = explained(binary, x, y)
    binary.passes = 0
    changed = uw.edited(ours, [9, 10], x[:2])
    assert binary.passes == 2
    again = uw.retrained(changed)
    assert binary.passes == 2
    np.testing.assert_allclose(uw.features(again)[[9, 10]], uw.features(ours)[:2], atol=1e-12)
    moved = changed.of_perturbing([9], on=(x[:3], y[:3]))
    expected = explained(binary, x[[*range(9), 0, 1, *range(11, N)]], y).of_perturbing([9], on=(x[:3], y[:3]))
    np.testing.assert_allclose(moved, expected, atol=1e-10)


def test_features_are_computed_once(binary, pictures):
    x, y, xq, yq = pictures
    binary.passes = 0
    ours = explained(binary, x, y)
    made = binary.passes
    assert N <= made < 2 * N
    ours.on_loss(xq, yq)
    ours.of_self()
    ours.check()
    assert binary.passes - made <= 2 * Q
    np.testing.assert_allclose(uw.features(ours), binary.body(x).detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(uw.predict(ours, xq).outputs, binary(xq).detach().numpy(), atol=1e-12)
    assert uw.predict(ours, xq).labels.tolist() == (binary(xq)[:, 0] > 0).long().tolist()


def test_a_squeezed_output_bytes_and_float32(pictures):
    x, y, _, _ = pictures
    stored = (255 * x).round().to(torch.uint8)
    net = net_with(lambda: nn.Linear(24, 1), squeeze=True).float()
    net.body.insert(0, nn.Identity())
    loss = nn.BCEWithLogitsLoss()
    ours = uw.explain(net, stored, y.float(), loss=loss, penalty=0.1, parameters=lambda name: name.startswith("head"))
    floats = uw.explain(net, stored.float(), y.float(), loss=loss, penalty=0.1, parameters=["head.weight", "head.bias"])
    assert ours.objective.linear is not None
    assert ours.objective.linear.intercept
    asked = (stored[:3], y[:3].float())
    np.testing.assert_allclose(ours.on_loss(*asked).values, floats.on_loss(*asked).values, atol=1e-12)
    assert np.isfinite(ours.of_perturbing([1], on=asked)).all()


@pytest.mark.parametrize(
    ("head", "loss", "expected"),
    [
        (lambda: nn.Linear(24, 2), F.cross_entropy, "cross_entropy"),
        (lambda: nn.Linear(24, 2), nn.CrossEntropyLoss(label_smoothing=0.1), None),
        (lambda: nn.Linear(24, 1), lambda f, t: F.mse_loss(f[:, 0], t.double()), "squared"),
        (lambda: nn.Linear(24, 1), lambda f, t: F.huber_loss(f[:, 0], t.double()), None),
        (lambda: nn.Sequential(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 2)), F.cross_entropy, None),
    ],
    ids=["cross-entropy", "smoothed labels", "squared", "huber", "a head of two layers"],
)
def test_a_loss_is_recognised_by_its_values(pictures, head, loss, expected):
    x, y, xq, yq = pictures
    net = net_with(head)
    settings = {"loss": loss, "penalty": 0.1, "parameters": lambda name: name.startswith("head"), "damping": 0.1}
    ours = uw.explain(net, x, y, **settings)
    structure = ours.objective.linear
    assert (None if structure is None else structure.loss.name) == expected
    frozen = net_with(head)
    frozen.load_state_dict(net.state_dict())
    frozen.body.requires_grad_(False)
    also = uw.explain(frozen, x, y, loss=loss, penalty=0.1, damping=0.1)
    np.testing.assert_allclose(also.on_loss(xq, yq).values, ours.on_loss(xq, yq).values, atol=1e-10)
    full = uw.Objective.from_module(net, loss, penalty=0.1, parameters=lambda name: name.startswith("head"))
    slow = uw.Influence(full, (x, y), curvature=uw.operators.GaussNewton(), damping=0.1)
    reference = slow.on_loss(xq, yq).values
    np.testing.assert_allclose(ours.on_loss(xq, yq).values, reference, atol=1e-7 * np.abs(reference).max())


def test_a_head_that_is_not_the_end_is_explained_as_a_whole(pictures):
    x, y, _, _ = pictures
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    influence = uw.explain(net, x, y, loss=F.cross_entropy, penalty=0.1, parameters=["1.weight", "1.bias"])
    assert influence.examples.x.shape[1:] == (1, 8, 8)
    part = uw.explain(net, x, y, loss=F.cross_entropy, penalty=0.1, parameters=["3.weight"])
    assert part.objective.size == 10


def test_damping_of_a_head_that_was_not_trained_to_the_minimum(pictures):
    x, y, _, _ = pictures
    net = net_with(lambda: nn.Linear(24, 2))
    far = uw.explain(net, x, y, loss=F.cross_entropy, penalty=0.1, parameters=["head.weight", "head.bias"])
    assert far.damping > 0
    exact = uw.explain(
        net,
        x,
        y,
        loss=F.cross_entropy,
        penalty=0.1,
        parameters=["head.weight", "head.bias"],
        curvature=uw.operators.Hessian(),
    )
    assert exact.damping == 0


def test_the_module_is_left_as_it_was(binary, pictures):
    x, y, xq, yq = pictures
    before = {name: value.clone() for name, value in binary.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in binary.modules())
    influence = explained(binary, x, y)
    influence.of_perturbing([1], on=(xq, yq))
    assert sum(len(module._forward_pre_hooks) for module in binary.modules()) == hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in binary.state_dict().items())
    assert all(parameter.grad is None for parameter in binary.parameters())
    assert not binary.training
    binary.train()


def test_batch_statistics_are_refused(pictures):
    x, y, _, _ = pictures
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2)).double()
    with pytest.raises(uw.errors.UnsupportedModel, match="eval"):
        uw.explain(net, x, y, loss=F.cross_entropy, parameters=["2.weight", "2.bias"])


def test_a_head_tied_to_what_comes_before_it_is_explained_as_a_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4, bias=False)
            self.first = nn.Linear(4, 4, bias=False)
            self.first.weight = self.head.weight

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    net = Tied().double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 4, (20,))
    net.register_parameter("spare", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    settings = {"loss": F.cross_entropy, "penalty": 0.1, "damping": 0.1}
    ours = uw.explain(net, x, y, parameters=["head.weight"], **settings)
    assert ours.objective.linear is None
    params = {"head.weight": net.head.weight.detach()}

    def loss(params, example):
        w = params["head.weight"]
        return F.cross_entropy((torch.tanh(example[0] @ w.T) @ w.T)[None], example[1][None])

    objective = uw.Objective(loss, params, penalty=0.1, penalty_per_example=True)
    hand = uw.Influence(objective, (x, y), curvature=uw.operators.Identity(), damping=0.1)
    same = uw.explain(net, x, y, parameters=["head.weight"], curvature=uw.operators.Identity(), **settings)
    np.testing.assert_allclose(same.on_loss(x, y).values, hand.on_loss(x, y).values, atol=1e-10)


def test_something_behind_the_head_that_shows_on_few_rows(pictures):
    x, y, xq, yq = pictures

    class Clipped(Net):
        def forward(self, x):
            return Net.forward(self, x).clamp(max=self.limit)

    torch.manual_seed(0)
    net = Clipped(nn.Linear(24, 2)).double().eval()
    net.limit = float("inf")
    largest = net(x).detach().max(1).values
    net.limit = float(largest.sort().values[-2])  # one training row is clipped
    settings = {"loss": F.cross_entropy, "penalty": 0.1, "parameters": ["head.weight", "head.bias"]}
    assert uw.explain(net, x, y, **settings).objective.linear is None
    net.limit = float(largest.max()) + 1e-6
    influence = uw.explain(net, x, y, **settings)
    assert influence.objective.linear is not None
    far = 30 * xq
    assert float(net(far).detach().max()) >= net.limit
    with pytest.raises(uw.errors.UnsupportedModel, match="behind 'head'"):
        influence.on_loss(far, yq)


def test_words_cannot_be_moved_and_a_factory_does_not_take_features():
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.table(x).mean(1))

    x, y = torch.randint(0, 9, (20, 3)), torch.randint(0, 2, (20,))
    settings = {"loss": F.cross_entropy, "penalty": 0.1, "parameters": ["head.weight", "head.bias"]}
    influence = uw.explain(Words(), x, y, **settings)
    assert influence.objective.linear is not None
    with pytest.raises(uw.errors.InvalidInput, match="cannot be moved"):
        influence.of_perturbing([0], on=(x[:1], y[:1]))
    training = uw.StackedTraining(uw.minibatch.SGD(lr=0.1), uw.minibatch.Shuffled(4), epochs=1, factory=Words)
    with pytest.raises(uw.errors.UnsupportedModel, match="features"):
        uw.leave_one_out(influence, (x[:1], y[:1]), [0], training)
