"""Networks whose weights are normalised have the derivatives of the same networks with the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import upweight as uw
from upweight.model.weight_norm import normed
from upweight.operators import EKFAC, GaussNewton, Hessian


class Formula(nn.Module):
    """A normalised linear layer, by hand."""

    def __init__(self, layer, dim):
        super().__init__()
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        self.g, self.v, self.dim = nn.Parameter(g.detach().clone()), nn.Parameter(v.detach().clone()), dim

    def forward(self, x):
        norm = self.v.norm() if self.dim is None else self.v.norm(dim=1 - self.dim, keepdim=True)
        return x @ (self.v * (self.g / norm)).T


def networks(dim, dtype=torch.float64):
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(4, 5, bias=False), dim=dim)
    last = nn.Linear(5, 3)
    return (nn.Sequential(one, nn.Tanh(), last).to(dtype) for one in (layer, Formula(layer, dim)))


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(40) % 3


def influence(model, curvature, **settings):
    return uw.explain(model, X, Y, loss=cross_entropy, curvature=curvature, progress=False, **settings)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_curvature_is_that_of_the_formula(dim):
    theirs, ours = (influence(model, Hessian(), damping=10.0).operator.matrix() for model in networks(dim))
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", [GaussNewton(), EKFAC(samples=2)])
def test_scores_are_those_of_the_formula(curvature):
    theirs, ours = (influence(model, curvature, damping=0.1).on_loss(X[:3], Y[:3]).values for model in networks(0))
    assert np.allclose(theirs, ours, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_older_way_to_normalise_a_weight():
    torch.manual_seed(0)
    layer = torch.nn.utils.weight_norm(nn.Conv1d(2, 3, 2).double(), dim=2)
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), layer, nn.Flatten())
    found = influence(model, Hessian(), damping=10.0)
    H = found.operator.matrix()
    params = dict(model.named_parameters())

    def risk(theta):
        sizes = [p.numel() for p in params.values()]
        b, g, v = (t.reshape(p.shape) for t, p in zip(theta.split(sizes), params.values(), strict=True))
        W = v * (g / v.square().sum((0, 1), keepdim=True).sqrt())
        out = torch.nn.functional.conv1d(X.reshape(-1, 2, 2), W, b).flatten(1)
        return cross_entropy(out, Y)

    assert list(params) == ["1.bias", "1.weight_g", "1.weight_v"]
    theta = torch.cat([p.detach().flatten() for p in params.values()])
    torch.testing.assert_close(H, torch.autograd.functional.hessian(risk, theta), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_the_formula_has_torchs_values_and_first_derivatives(dim):
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    shape = () if dim == -1 else [size if axis == dim else 1 for axis, size in enumerate(v.shape)]
    g = torch.rand(shape, generator=draw, dtype=torch.float64).requires_grad_()
    found = []
    for function in (normed, torch._weight_norm):
        value = function(v, g, dim)
        found.append((value, *torch.autograd.grad(value.sin().sum(), (v, g))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
