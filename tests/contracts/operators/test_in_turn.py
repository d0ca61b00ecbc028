"""Products of several vectors one after the other, as through larger networks, against dense autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.operators import GaussNewton, Hessian, implicit

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 4, (9,), generator=torch.Generator().manual_seed(1))
WEIGHTS = np.linspace(0.5, 1.5, 9)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()


def dense(curvature):
    """(1/n) Σ wᵢ of second derivatives, or of Jᵀ(diag π − ππᵀ)J, by autograd over all parameters at once."""
    model, weights = network(), torch.from_numpy(WEIGHTS)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    theta = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])

    def outputs(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        blocks = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, blocks, (X,))

    if isinstance(curvature, Hessian):
        return hessian(lambda t: (weights * cross_entropy(outputs(t), Y, reduction="none")).mean(), theta)
    J, share = jacobian(outputs, theta), outputs(theta).softmax(1).detach()
    H = torch.diag_embed(share) - share[:, :, None] * share[:, None]
    return torch.einsum("b,bkp,bkl,blq->pq", weights, J, H, J) / len(X)


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton(keep=0)], ids=["Hessian", "Gauss-Newton"])
@pytest.mark.parametrize("size", [None, 2], ids=["one batch", "several"])
def test_products_in_turn_are_those_of_the_dense_matrix(curvature, size, monkeypatch):
    monkeypatch.setattr(implicit, "_CACHE", 0)
    settings = {"loss": cross_entropy, "curvature": curvature, "damping": 5.0, "batch_size": size}
    operator = uw.explain(network(), X, Y, sample_weight=WEIGHTS, **settings).operator
    assert operator.sweep.objective.route.cotangents == "batched"
    assert operator._in_turn().route.cotangents == "loop"
    V = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(operator.apply(V), V @ dense(curvature), rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(implicit, "_CACHE", 2**40)
    assert operator._in_turn().route.cotangents == "batched"
