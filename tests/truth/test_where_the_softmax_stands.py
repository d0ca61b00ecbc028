"""Scores do not depend on where a user cuts model from criterion, and predict what refitting from scratch gives."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import upweight as uw

PENALTY = 0.1
DATA, LABELS = load_digits(return_X_y=True)
N = 400
X, Y = torch.as_tensor(DATA[:N] / 16), torch.as_tensor(LABELS[:N] % 4)
XQ, YQ = torch.as_tensor(DATA[N : N + 5] / 16), torch.as_tensor(LABELS[N : N + 5] % 4)


class Last(nn.Module):
    """A core and a function behind it, which is no module."""

    def __init__(self, core, last):
        super().__init__()
        self.core, self.last = core, last

    def forward(self, x):
        return self.last(self.core(x))


def several(y):
    return torch.stack([y % 2, (y > 1).long()], 1).double()


def counts(y):
    return y.double()[:, None]


# family: (outputs, targets of labels, {name: (what stands behind the core, criterion)}), the first is the fused form
FAMILIES = {
    "cross-entropy": (
        4,
        lambda y: y,
        {
            "fused": (None, F.cross_entropy),
            "LogSoftmax module, nll_loss": (nn.LogSoftmax(1), F.nll_loss),
            "log_softmax in forward, NLLLoss": (lambda z: z.log_softmax(-1), nn.NLLLoss()),
            "log_softmax, and functions that have nothing to do": (
                lambda z: z.contiguous().log_softmax(-1).contiguous().double(),
                F.nll_loss,
            ),
            "log_softmax in the criterion": (None, lambda z, y: F.nll_loss(F.log_softmax(z, 1), y)),
            "Softmax module, log in the criterion": (nn.Softmax(1), lambda p, y: F.nll_loss(p.log(), y)),
            "softmax, clamp and log in forward": (
                lambda z: torch.log(torch.softmax(z, 1).clamp(min=1e-30)),
                F.nll_loss,
            ),
        },
    ),
    "logistic": (
        2,
        several,
        {
            "fused": (None, F.binary_cross_entropy_with_logits),
            "Sigmoid module, BCELoss": (nn.Sigmoid(), nn.BCELoss()),
            "sigmoid in forward": (torch.sigmoid, F.binary_cross_entropy),
            "sigmoid in the criterion": (None, lambda z, y: F.binary_cross_entropy(z.sigmoid(), y)),
            "logsigmoid, of both signs": (
                nn.LogSigmoid(),
                lambda s, y: -(y * s + (1 - y) * torch.log1p(-s.exp())).mean(),
            ),
        },
    ),
    "counts": (
        1,
        counts,
        {
            "fused": (None, nn.PoissonNLLLoss()),
            "exp in forward": (torch.exp, nn.PoissonNLLLoss(log_input=False, eps=0)),
        },
    ),
    "squares of probabilities": (
        4,
        lambda y: F.one_hot(y, 4).double(),
        {
            "Softmax module": (nn.Softmax(1), F.mse_loss),
            "softmax in the criterion": (None, lambda z, y: F.mse_loss(z.softmax(1), y)),
        },
    ),
}
PAIRS = [(family, name) for family, (*_, ways) in FAMILIES.items() for name in list(ways)[1:]]


def fitted(family, way, keep=slice(None)):
    """The script: full-batch training from zeros of this model with this criterion on the rows that are kept."""
    K, of_labels, ways = FAMILIES[family]
    behind, criterion = ways[way]
    core = nn.Linear(64, K).double()
    for parameter in core.parameters():
        nn.init.zeros_(parameter)
    model = (
        core if behind is None else nn.Sequential(core, behind) if isinstance(behind, nn.Module) else Last(core, behind)
    )
    steps = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )
    inputs, targets = X[keep], of_labels(Y)[keep]

    def closure():
        steps.zero_grad()
        value = criterion(model(inputs), targets) + PENALTY / 2 * sum((p**2).sum() for p in model.parameters())
        value.backward()
        return value

    steps.step(closure)
    return model.eval(), criterion, of_labels


def losses(model, criterion, of_labels):
    with torch.no_grad():
        return np.array([float(criterion(model(x[None]), y[None])) for x, y in zip(XQ, of_labels(YQ), strict=True)])


def scores(model, criterion, of_labels, **settings):
    influence = uw.explain(model, X, of_labels(Y), loss=criterion, penalty=PENALTY, **settings)
    return influence.on_loss(XQ, of_labels(YQ)).values


@pytest.mark.parametrize(
    "curvature",
    [
        None,
        uw.operators.KFAC(),
        uw.operators.EKFAC(),
        uw.operators.Nystroem(30),
        uw.operators.Dense(uw.operators.GaussNewton()),
    ],
    ids=lambda spec: type(spec).__name__,
)
@pytest.mark.parametrize(("family", "way"), PAIRS)
def test_equal_values(family, way, curvature):
    first = next(iter(FAMILIES[family][2]))
    fused, criterion, of_labels = fitted(family, first)
    model, other, _ = fitted(family, way)
    theta = dict(zip(dict(model.named_parameters()), fused.parameters(), strict=True))
    model.load_state_dict({name: value.detach() for name, value in theta.items()})
    expected = scores(fused, criterion, of_labels, curvature=curvature, damping=0.01)
    np.testing.assert_allclose(
        scores(model, other, of_labels, curvature=curvature, damping=0.01),
        expected,
        rtol=1e-8,
        atol=1e-8 * np.abs(expected).max(),
    )


@pytest.mark.parametrize(("family", "way"), [pair for pair in PAIRS if pair[0] != "squares of probabilities"])
def test_slope_against_the_script_run_again(family, way):
    model, criterion, of_labels = fitted(family, way)
    predicted = scores(model, criterion, of_labels)
    rows = [*np.argsort(-np.abs(predicted).max(0), kind="stable")[:6].tolist(), 0, 100, 200, 300]
    now = losses(model, criterion, of_labels)
    really = [losses(*fitted(family, way, np.delete(np.arange(N), row))) - now for row in rows]
    slope, _ = np.polyfit(predicted[:, rows].T.ravel(), np.ravel(really), 1)
    assert 0.9 < slope < 1.1


FLAT = {
    "absolute error": F.l1_loss,
    "absolute error, object": nn.L1Loss(),
    "hinge": lambda f, y: F.relu(1 - (2 * y - 1) * f).mean(),
    "pinball": lambda f, y: torch.maximum(0.3 * (y - f), -0.7 * (y - f)).mean(),
}
BENDING = {
    "huber": F.huber_loss,
    "smooth l1": F.smooth_l1_loss,
    "hinge with a softplus": lambda f, y: 0.1 * F.softplus((1 - (2 * y - 1) * f) / 0.1).mean(),
    "pinball with a softplus": lambda f, y: (0.3 * (y - f) + 0.1 * F.softplus((f - y) / 0.1)).mean(),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()


@pytest.mark.parametrize(
    "curvature", [None, uw.operators.KFAC(), uw.operators.EKFAC(), uw.operators.Hessian(), uw.operators.Nystroem(5)]
)
@pytest.mark.parametrize("criterion", FLAT.values(), ids=FLAT)
def test_a_criterion_without_curvature_is_refused(criterion, curvature):
    influence = uw.explain(network(), X, several(Y), loss=criterion, penalty=0.01, curvature=curvature)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"no curvature.*huber_loss.*softplus.*EmpiricalFisher"):
        influence.on_loss(XQ, several(YQ))


@pytest.mark.parametrize("criterion", FLAT.values(), ids=FLAT)
def test_the_named_way_out_by_slopes_works(criterion):
    fisher = uw.operators.EmpiricalFisher()
    values = uw.explain(network(), X, several(Y), loss=criterion, curvature=fisher).on_loss(XQ, several(YQ)).values
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0


@pytest.mark.parametrize("criterion", BENDING.values(), ids=BENDING)
def test_the_named_stand_ins_work(criterion):
    values = uw.explain(network(), X, several(Y), loss=criterion).on_loss(XQ, several(YQ)).values
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0


def test_no_floor_takes_the_place_of_a_missing_curvature():
    """A loss that bends down has no mean eigenvalue to be damped by; what the message says to type is enough."""
    settings = {"loss": lambda f, y: -((f - y) ** 2).mean(), "curvature": uw.operators.GaussNewton()}
    influence = uw.explain(network(), X, several(Y), **settings)
    with pytest.raises(uw.errors.NotPositiveDefinite, match=r"damping=influence\.check\(\)\.suggested_damping"):
        influence.on_loss(XQ, several(YQ))
    report = influence.check()
    assert not report.ok
    typed = uw.explain(network(), X, several(Y), damping=report.suggested_damping, **settings)
    assert float(torch.linalg.eigvalsh(typed.operator.matrix()).min()) + typed.damping > 0
    assert typed.on_loss(XQ, several(YQ)).certificate.converged


def test_rows_that_are_fitted_exactly_have_no_empirical_fisher():
    model = network()
    with torch.no_grad():
        targets = model(X)
    settings = {"loss": F.mse_loss, "curvature": uw.operators.EmpiricalFisher()}
    with pytest.raises(uw.errors.NotPositiveDefinite, match=r"damping=0\.1"):
        uw.explain(model, X, targets, **settings).on_loss(XQ, several(YQ))
    values = uw.explain(model, X, targets, damping=0.1, **settings).on_loss(XQ, several(YQ)).values
    assert not values.any()  # no row has a gradient


def test_predictions_stay_those_of_the_module():
    model, criterion, of_labels = fitted("logistic", "Sigmoid module, BCELoss")
    influence = uw.explain(model, X, of_labels(Y), loss=criterion)
    with torch.no_grad():
        np.testing.assert_allclose(uw.predict(influence, XQ).outputs, model(XQ).numpy(), rtol=1e-12)


def test_the_script_of_the_test_is_a_fit_of_the_library_too():
    """The closed form, for the first family: the gradient of softmax regression in NumPy is zero at the fit."""
    model, *_ = fitted("cross-entropy", "fused")
    W, b = (parameter.detach().numpy() for parameter in model.parameters())
    residual = np.exp(log_softmax(X.numpy() @ W.T + b, 1)) - np.eye(4)[Y]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(residual.T @ X.numpy() / N + PENALTY * W).max() < 1e-8
