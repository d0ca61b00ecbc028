"""Losses that compare rows, and objects around a module: refused by what they are, with what to type instead."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw
from upweight.errors import InvalidInput, TheoryWarning, UnsupportedModel
from upweight.model import transforms

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=DRAW, dtype=torch.float64)
TIME = torch.rand(40, generator=DRAW, dtype=torch.float64) + 0.1
EVENT = (torch.rand(40, generator=DRAW) > 0.3).double()
Y = torch.stack([TIME, EVENT], 1)


def model(outputs=1):
    torch.manual_seed(0)
    return nn.Linear(3, outputs).double()


def cox(risk, target):
    order = torch.argsort(target[:, 0], descending=True)
    risk = risk[order, 0]
    return -((risk - torch.logcumsumexp(risk, 0)) * target[order, 1]).sum() / len(risk)


def later(target):
    return (target[:, 0][:, None] > target[:, 0][None]).double()


def ranking(score, target):
    return (F.softplus(score.T - score) * later(target)).sum() / later(target).sum()


def ranking_of_all_pairs(score, target):
    return (F.softplus(score.T - score) * later(target)).mean()


def contrastive(z, _target):
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def triplet(z, _target):
    return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0))


def correlation(output, target):
    return 1 - torch.corrcoef(torch.stack([output[:, 0], target[:, 0]]))[0, 1]


@pytest.mark.filterwarnings("ignore:cov")
@pytest.mark.parametrize("loss", [cox, ranking, ranking_of_all_pairs, contrastive, triplet, correlation])
def test_a_loss_that_compares_rows_is_called_that(loss):
    net = model(2 if loss in {contrastive, triplet} else 1)
    with pytest.raises(InvalidInput, match=f"{loss.__name__} compares the rows of a batch"):
        uw.explain(net, X, Y, loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda z, t: F.cross_entropy(z, t),
    ],
)
def test_a_loss_of_single_rows_is_not(loss):
    uw.explain(model(2), X, (TIME.median() < TIME).long(), loss=loss)


def test_the_ways_out_of_comparing():
    pairs = [(i, j) for i in range(8) for j in range(8) if TIME[i] > TIME[j]]
    differences = torch.stack([torch.stack([X[i], X[j]]) for i, j in pairs])

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = model()

        def forward(self, both):
            return self.score(both[:, 0]) - self.score(both[:, 1])

    dataset = torch.utils.data.TensorDataset(differences, torch.ones(len(pairs), 1, dtype=torch.float64))
    influence = uw.explain(Pair(), dataset, loss=lambda gap, _: F.softplus(-gap).mean(), penalty=0.1)
    assert np.isfinite(influence.on_loss(torch.utils.data.Subset(dataset, range(2))).values).all()

    def survival(risk, target):
        return (torch.exp(risk[:, 0]) * target[:, 0] - target[:, 1] * risk[:, 0]).mean()

    influence = uw.explain(model(), X, Y, loss=survival, penalty=0.1)
    assert np.isfinite(influence.on_loss(X[:2], Y[:2]).values).all()


class Net:
    """As skorch's NeuralNetClassifier after fit(): parameters of an estimator, a module, a criterion."""

    def __init__(self):
        self.criterion_ = nn.NLLLoss()
        self.module_ = nn.Sequential(model(2), nn.Softmax(-1))

    def get_params(self):
        return {}

    def fit(self):
        return self


def test_a_wrapper_names_the_module_inside_and_what_it_does_to_its_loss():
    labels = (TIME > 0.5).long()
    with pytest.raises(UnsupportedModel, match=r"explain\(model.module_, X, y, loss=…\). skorch gives NLLLoss the log"):
        uw.explain(Net(), X, labels)
    net = Net()
    ours = uw.explain(net.module_, X, labels, loss=lambda p, y: F.nll_loss(p.log(), y), penalty=0.1)
    plain = uw.explain(net.module_[0], X, labels, loss=F.cross_entropy, penalty=0.1)
    values, expected = (influence.on_loss(X[:2], labels[:2]).values for influence in (ours, plain))
    np.testing.assert_allclose(values, expected, rtol=1e-8)


def test_a_training_loop_names_its_network_and_not_its_loss():
    class Loop:
        def __init__(self):
            self.criterion, self.network = nn.MSELoss(), model()

    with pytest.raises(UnsupportedModel, match=r"explain\(model.network, X, y, loss=…\)\."):
        uw.explain(Loop(), X, TIME)


def test_a_module_without_forward_names_the_network_inside():
    class LightningModule(nn.Module):
        def forward(self, *args):
            return super().forward(*args)

    class Trained(LightningModule):
        def __init__(self):
            super().__init__()
            self.loss, self.net = nn.MSELoss(), model()

        def training_step(self, batch):
            return self.loss(self.net(batch[0]), batch[1])

    with pytest.raises(UnsupportedModel, match=r"explain\(model.net, X, y, loss=…\)"):
        uw.explain(Trained(), X, TIME[:, None], loss=F.mse_loss)
    uw.explain(Trained().net, X, TIME[:, None], loss=F.mse_loss)


class Halfway(torch.autograd.Function):
    """x², whose backward leaves the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x.detach()


class Whole(Halfway):
    """x², differentiable as often as one likes."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


@pytest.mark.parametrize("inner", [nn.Identity(), nn.Tanh(), nn.LeakyReLU(0.5)])
def test_second_derivatives_that_leave_a_part_out_are_refused(inner):
    def objective(function):
        def loss(theta, example):
            return (function.apply(inner(theta @ example[0])) - example[1]) ** 2

        return uw.Objective(loss, torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64))

    with pytest.raises(UnsupportedModel, match="second derivatives of loss are not the slope of its first"):
        uw.Influence(objective(Halfway), (X, TIME))
    uw.Influence(objective(Whole), (X, TIME))


def test_a_kink_at_theta_is_no_half_derivative():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    uw.explain(net, X, TIME[:, None], loss=F.mse_loss)


@pytest.mark.parametrize("activation", [nn.ELU(), nn.CELU(), nn.SELU()])
def test_a_kink_of_the_slope_at_theta_is_none_either(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1)).double()
    nn.init.zeros_(net[0].bias)
    half = X * (torch.arange(40)[:, None] % 2)  # every second row meets the kink
    uw.explain(net, half, TIME[:, None], loss=F.mse_loss)


def test_labels_at_the_edge_of_a_criterion_are_no_half_derivatives():
    net = model()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    uw.explain(net, X, 2 * EVENT[:, None] - 1, loss=nn.HuberLoss(delta=1.0), damping=0.1)


def test_a_forward_of_ones_own_on_the_instance_is_one():
    holder = nn.Module()
    holder.inner = model()
    holder.forward = lambda x: holder.inner(x)
    uw.explain(holder, X, TIME[:, None], loss=F.mse_loss)


def test_torchs_warnings_of_missing_rules_are_hidden_and_check_says_them():
    inside, entered = threading.Event(), threading.Event()

    def longer():
        with transforms.quietly():
            entered.set()
            inside.wait(10)

    thread = threading.Thread(target=longer)  # is quiet before and after another is
    with transforms.quietly():
        thread.start()
        entered.wait(10)
    inside.set()
    thread.join()

    def towards(z, target):
        return F.triplet_margin_loss(z, target[:, :2], target[:, 2:], margin=3.0)

    targets = torch.randn(40, 4, generator=DRAW, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence = uw.explain(model(2), X, targets, loss=towards, penalty=1.0, damping=1.0)
        values = influence.on_loss(X[:2], targets[:2]).values
        report = influence.check()
    assert np.isfinite(values).all()
    assert "aten::triplet_margin_loss row by row, for torch has no batching rule" in str(report)


def test_a_label_that_a_function_ignores_is_still_called_that():
    labels = (TIME > 0.5).long()
    labels[3] = -100
    with pytest.raises(InvalidInput, match="ignore_index"):
        uw.explain(model(2), X, labels, loss=lambda z, t: F.cross_entropy(z, t))
    with pytest.warns(TheoryWarning, match=r"does not count row\(s\) 3"):
        uw.explain(model(2), X, labels, loss=F.cross_entropy)
