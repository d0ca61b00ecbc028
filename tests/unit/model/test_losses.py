"""Every closed form against autograd, also next to the kinks, and where numbers are large."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.autograd.functional import hessian, jacobian
from torch.distributions import Gamma
from torch.nn import functional

from small import refuses
from upweight import losses
from upweight.model.losses import Loss

TABLE = {
    "cross_entropy": (losses.cross_entropy, 4, [0, 3], lambda f, y: functional.cross_entropy(f, y)),
    "logistic": (
        losses.logistic,
        1,
        [0, 1],
        lambda f, y: functional.binary_cross_entropy_with_logits(f, y[None].double()),
    ),
    "squared": (losses.squared, 1, [0.3, -2.0], lambda f, y: functional.mse_loss(f, y[None])),
    "poisson": (losses.poisson, 1, [0, 5], lambda f, y: functional.poisson_nll_loss(f, y[None].double())),
    "huber": (losses.huber(1.0), 1, [0.3, -2.0], lambda f, y: functional.huber_loss(f, y[None])),
    "huber(0.2)": (losses.huber(0.2), 1, [0.3], lambda f, y: functional.huber_loss(f, y[None], delta=0.2)),
    "hinge": (losses.hinge, 1, [0, 1], lambda f, y: torch.relu(1 - (2 * y - 1) * f)[0]),
    "smooth_hinge": (
        losses.smooth_hinge(0.3),
        1,
        [0, 1],
        lambda f, y: functional.softplus(1 - (2 * y - 1) * f, beta=1 / 0.3)[0],
    ),
    "squared_hinge": (losses.squared_hinge, 1, [0, 1], lambda f, y: torch.relu(1 - (2 * y - 1) * f)[0] ** 2),
    "modified_huber": (
        losses.modified_huber,
        1,
        [0, 1],
        lambda f, y: (
            ((2 * y - 1) * f >= -1) * torch.relu(1 - (2 * y - 1) * f)[0] ** 2
            - ((2 * y - 1) * f < -1) * 4 * (2 * y - 1) * f[0]
        ),
    ),
    "epsilon_insensitive": (losses.epsilon_insensitive(0.3), 1, [0.3, -2.0], lambda f, y: svr(f, y)),
    "smooth_epsilon_insensitive": (
        losses.smooth_epsilon_insensitive(0.3, 0.2),
        1,
        [0.3, -2.0],
        lambda f, y: sum(functional.softplus(r - 0.3, beta=1 / 0.2)[0] for r in (f - y, y - f)),
    ),
    "squared_epsilon_insensitive": (
        losses.squared_epsilon_insensitive(0.3),
        1,
        [0.3, -2.0],
        lambda f, y: svr(f, y) ** 2,
    ),
    "gamma": (losses.gamma, 1, [0.4, 3.0], lambda f, y: -Gamma(1.0, torch.exp(-f)).log_prob(y.double())[0]),
    "tweedie(1)": (losses.tweedie(1), 1, [0, 5], lambda f, y: functional.poisson_nll_loss(f, y[None].double())),
    "tweedie(0)": (losses.tweedie(0), 1, [0.3, -2.0], lambda f, y: (f.exp() - y)[0] ** 2),
    "tweedie(1.5)": (losses.tweedie(1.5), 1, [0.0, 2.0], lambda f, y: half_deviance(y, f.exp(), 1.5)),
    "tweedie(2)": (losses.tweedie(2), 1, [0.4, 3.0], lambda f, y: (f + y * torch.exp(-f))[0]),
    "tweedie(3)": (losses.tweedie(3), 1, [0.4, 3.0], lambda f, y: half_deviance(y, f.exp(), 3.0)),
    "one_vs_one": (
        losses.one_vs_one(losses.smooth_hinge(0.3), 3),
        3,
        [0, 2],
        lambda f, y: sum(
            functional.softplus(1 - sign * f[pair], beta=1 / 0.3)
            for pair, sign in {0: [(0, 1), (1, 1)], 2: [(1, -1), (2, -1)]}[int(y)]
        ),
    ),
}


def svr(f, y):
    return torch.relu((f - y).abs() - 0.3)[0]


def half_deviance(y, mean, power):
    """sklearn's formula without the part that depends on y only."""
    return (mean ** (2 - power) / (2 - power) - y * mean ** (1 - power) / (1 - power))[0]


@pytest.fixture(params=TABLE)
def line(request):
    return TABLE[request.param]


def agrees(loss: Loss, eta, y, tolerance=1e-10):
    """slope and curvature of a batch of one are what autograd makes of the value."""
    slope, curvature = loss.slope(eta[None], y[None])[0], loss.curvature(eta[None], y[None])[0]
    assert torch.allclose(slope, jacobian(lambda e: loss(e, y), eta), atol=tolerance, rtol=tolerance)
    assert torch.allclose(curvature, hessian(lambda e: loss(e, y), eta), atol=tolerance, rtol=tolerance)


def test_value_is_torchs(line):
    loss, K, targets, theirs = line
    for y in map(torch.tensor, targets):
        for seed in range(5):
            eta = 2 * torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert torch.allclose(loss(eta, y), theirs(eta, y).double().reshape(()), rtol=1e-10)


@given(st.integers(0, 2**16), st.floats(0.01, 5))
def test_slope_and_curvature_are_autograds(seed, size):
    for loss, K, targets, _ in TABLE.values():
        eta = size * torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for y in map(torch.tensor, targets):
            agrees(loss, eta, y)


@pytest.mark.parametrize(
    ("loss", "kink", "y"),
    [
        (losses.hinge, 1.0, 1),
        (losses.hinge, -1.0, 0),
        (losses.huber(0.5), 2.5, 2.0),
        (losses.huber(0.5), 1.5, 2.0),
        (losses.smooth_hinge(1e-3), 1.0, 1),
        (losses.smooth_hinge(1e-3), -1.0, 0),
        (losses.squared_hinge, 1.0, 1),
        (losses.modified_huber, -1.0, 1),
        (losses.modified_huber, 1.0, 0),
        (losses.epsilon_insensitive(0.5), 2.5, 2.0),
        (losses.smooth_epsilon_insensitive(0.5, 1e-3), 1.5, 2.0),
        (losses.squared_epsilon_insensitive(0.5), 1.5, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [-1e-4, 1e-4, -1e-9, 1e-9])
def test_both_sides_of_a_kink(loss, kink, y, side):
    agrees(loss, torch.tensor([kink + side], dtype=torch.float64), torch.tensor(y), 1e-7)


def test_a_batch_is_its_examples(line):
    loss, K, targets, _ = line
    eta = torch.randn(len(targets), K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor(targets)
    assert loss.value(eta, y).shape == (len(targets),)
    assert loss.slope(eta, y).shape == eta.shape
    assert loss.curvature(eta, y).shape == (len(targets), K, K)
    for b in range(len(targets)):
        assert torch.equal(loss.value(eta, y)[b], loss(eta[b], y[b]))
        assert torch.equal(loss.slope(eta, y)[b], loss.slope(eta[b : b + 1], y[b : b + 1])[0])


def test_squared_sums_over_outputs():
    eta, y = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert losses.squared.value(eta, y).item() == 14
    agrees(losses.squared, eta[0].double(), y[0].double())


@pytest.mark.parametrize("margin", [-1e6, -50.0, 0.0, 1 - 1e-7, 1.0, 1 + 1e-7, 50.0, 1e6])
@pytest.mark.parametrize("t", [1e-6, 1e-3])
def test_smooth_hinge_is_stable_and_tends_to_the_hinge(t, margin):
    eta, y = torch.tensor([[margin]], dtype=torch.float64), torch.tensor([1])
    smooth, sharp = losses.smooth_hinge(t), losses.hinge
    assert 0 <= smooth.value(eta, y) - sharp.value(eta, y) <= t * np.log(2) * (1 + 1e-9)
    assert -1 <= smooth.slope(eta, y).item() <= 0
    assert 0 <= smooth.curvature(eta, y).item() <= 0.25 / t
    if abs(margin - 1) > 1:
        assert smooth.slope(eta, y).item() == sharp.slope(eta, y).item()
        assert smooth.curvature(eta, y).item() == 0


def test_the_curvature_of_smooth_hinge_is_a_bump_of_area_one():
    eta = torch.linspace(0.9, 1.1, 20_001, dtype=torch.float64)[:, None]
    curvature = losses.smooth_hinge(1e-3).curvature(eta, torch.ones(len(eta)))[:, 0, 0]
    assert torch.trapezoid(curvature, eta[:, 0]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("eta", [-800.0, 800.0])
def test_log_losses_do_not_overflow(eta):
    for loss, K in ((losses.logistic, 1), (losses.cross_entropy, 3)):
        f, y = torch.tensor([[eta] + [0.0] * (K - 1)], dtype=torch.float64), torch.tensor([1])
        for part in (loss.value, loss.slope, loss.curvature):
            assert torch.isfinite(part(f, y)).all()
    assert losses.logistic.value(torch.tensor([[-800.0]]), torch.tensor([1])).item() == 800
    assert losses.logistic.slope(torch.tensor([[-800.0]]), torch.tensor([1])).item() == -1


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), "1", None, True])
@pytest.mark.parametrize("make", [losses.huber, losses.smooth_hinge])
def test_a_width_must_be_positive(make, width):
    refused = refuses(lambda: make(width), ValueError, "positive number")
    assert str(width) in str(refused)


@pytest.mark.parametrize("residual", [-1e6, -1.0, -0.1, 0.0, 0.1 + 1e-7, 50.0, 1e6])
@pytest.mark.parametrize("t", [1e-6, 1e-3])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_smooth_epsilon_insensitive_is_stable_and_tends_to_its_limit(epsilon, t, residual):
    eta, y = torch.tensor([[2 + residual]], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    smooth = losses.smooth_epsilon_insensitive(epsilon, t)
    assert 0 <= smooth.value(eta, y) - smooth.limit.value(eta, y) <= 2 * t * np.log(2) * (1 + 1e-9)
    assert -1 <= smooth.slope(eta, y).item() <= 1
    assert 0 <= smooth.curvature(eta, y).item() <= 0.5 / t


@pytest.mark.parametrize("power", [-1.0, 0, 1, 1.5, 2, 3])
def test_tweedie_with_the_identity_link(power):
    loss = losses.tweedie(power, "identity")
    for mean in (0.5, 3.0):
        eta, y = torch.tensor([mean], dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
        agrees(loss, eta, y)
        assert torch.allclose(loss.slope(eta[None], y[None]) * mean, losses.tweedie(power).slope(eta[None].log(), y))
    assert loss.slope(torch.tensor([[1.7]]), torch.tensor([1.7])).abs() < 1e-6  # μ = y is the minimum


def test_one_vs_one_of_two_classes_is_its_margin_loss_with_the_sign_turned():
    eta, y = torch.tensor([[0.3], [-2.0]], dtype=torch.float64), torch.tensor([0, 1])
    pair = losses.one_vs_one(losses.logistic, 2)
    for part in ("value", "slope", "curvature"):
        assert torch.equal(getattr(pair, part)(eta, y), getattr(losses.logistic, part)(eta, 1 - y))
    assert losses.one_vs_one(losses.smooth_hinge(0.1), 3).limit.name == "hinge, one-vs-one"


def test_what_cannot_be_a_loss_is_refused():
    refuses(lambda: losses.epsilon_insensitive(-1.0), ValueError, "epsilon is -1.0")
    refuses(lambda: losses.squared_epsilon_insensitive(float("nan")), ValueError, "epsilon is nan")
    refuses(lambda: losses.smooth_epsilon_insensitive(0.1, 0), ValueError, "t is 0")
    refuses(lambda: losses.tweedie(0.5), ValueError, "power is 0.5")
    refuses(lambda: losses.tweedie(1, "logit"), ValueError, "link is 'logit'")
    refuses(lambda: losses.one_vs_one(losses.hinge, 1), ValueError, "n_classes=1")


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, np.int64, Fraction])
def test_any_real_number_is_taken(number):
    two = number(2)
    for make in (losses.huber, losses.smooth_hinge, losses.epsilon_insensitive, losses.squared_epsilon_insensitive):
        assert make(two).name == make(2.0).name
    assert losses.smooth_epsilon_insensitive(two, two).name == "smooth_epsilon_insensitive(2, 2)"
    assert losses.tweedie(two).name == "tweedie(2)"
    refuses(lambda: losses.tweedie(True), ValueError, "power is True")
    refuses(lambda: losses.epsilon_insensitive(True), ValueError, "epsilon is True")


def test_names_of_different_numbers_differ():
    assert losses.epsilon_insensitive(1 / 3).name == "epsilon_insensitive(0.3333333333333333)"
    assert losses.smooth_epsilon_insensitive(0.333333, 0.01).limit.name == "epsilon_insensitive(0.333333)"
    assert losses.tweedie(1.0000001).name != losses.tweedie(1).name


def test_names_tell_the_width():
    assert repr(losses.smooth_epsilon_insensitive(0.1, 1e-6)) == "smooth_epsilon_insensitive(0.1, 1e-06)"
    assert repr(losses.smooth_hinge(0.001)) == "smooth_hinge(0.001)"
    assert repr(losses.huber(2.0)) == "huber(2)"
    assert repr(losses.cross_entropy) == "cross_entropy"
