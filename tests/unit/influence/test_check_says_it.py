"""What check() says of a curvature beside the Hessian, of damping, and in its verdict."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw

torch.manual_seed(0)
X = torch.randn(120, 4).double()
Y = (X[:, 0] + torch.randn(120).double() > 0).long()
EMPTY = X * torch.tensor([1.0, 1.0, 1.0, 0.0])


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()


def trained(inputs):
    net = nn.Linear(4, 2).double()
    steps = torch.optim.LBFGS(net.parameters(), max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        steps.zero_grad()
        value = F.cross_entropy(net(inputs), Y)
        value.backward()
        return value

    steps.step(closure)
    return net.eval()


def dense_hessian(model, criterion):
    """By nested autograd of the mean loss over the flat parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def risk(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        params = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return criterion(torch.func.functional_call(model, params, (X,)), Y)

    return torch.autograd.functional.hessian(risk, flat)


CURVATURES = [
    uw.operators.GaussNewton(),
    uw.operators.EKFAC(),
    uw.operators.KFAC(),
    uw.operators.EmpiricalFisher(),
    uw.operators.Nystroem(3),
]


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda spec: type(spec).__name__)
def test_the_quotients_are_those_of_dense_matrices(curvature):
    model = network()
    influence = uw.explain(model, X, Y, loss=F.cross_entropy, curvature=curvature, damping=0.1)
    report = influence.check((X[:5], Y[:5]))
    H, C = dense_hessian(model, F.cross_entropy), influence.operator.matrix()
    draw = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (1, len(H)), generator=draw).double() - 1
    G = []
    for row in range(1):
        model.zero_grad()
        F.cross_entropy(model(X[row : row + 1]), Y[row : row + 1]).backward()
        G.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    for found, V in zip(report.beside_hessian, (signs, torch.stack(G)), strict=True):
        expected = float(torch.einsum("ki,ij,kj->", V, C, V) / torch.einsum("ki,ij,kj->", V, H, V))
        assert found == pytest.approx(expected, rel=1e-8)
    assert f"vᵀCv is {report.beside_hessian[0]:.3g} of vᵀHv" in str(report)


def test_the_hessian_is_not_compared_with_itself():
    report = uw.explain(network(), X, Y, loss=F.cross_entropy, curvature=uw.operators.Hessian(), damping=1.0).check()
    assert report.beside_hessian is None
    assert "vᵀHv" not in str(report)


def test_damping_that_halves_values_at_a_minimum_is_said():
    """An empty column leaves a flat direction, so a damping is chosen; the truth are values without it."""
    influence = uw.explain(trained(EMPTY), EMPTY, Y, loss=F.cross_entropy)
    on = (EMPTY[:8], Y[:8])
    report = influence.check(on)
    assert report.at_minimum
    assert f"damping={influence.damping:.3g} alone makes values up to" in report.verdict
    C = influence.operator.matrix()
    G = torch.cat([torch.atleast_2d(g) for g in _gradients(influence, on)])
    damped = torch.linalg.solve(C + influence.damping * torch.eye(len(C)), G.T).T
    forms = (damped * G).sum(1)
    held = float((influence.damping * damped.square().sum(1) / forms).max())
    assert report.held_back == pytest.approx(held, rel=1e-6)
    really = (torch.linalg.pinv(C) @ G.T).T
    smaller = 1 - float((forms / (really * G).sum(1)).min())
    assert 0.2 < report.held_back <= smaller + 1e-9  # at least so much is held back
    named = uw.explain(trained(EMPTY), EMPTY, Y, loss=F.cross_entropy, damping=1e-6)  # what it says to type
    assert named.check(on).verdict == "ok"


def _gradients(influence, on):
    params = {name: p.clone().requires_grad_() for name, p in influence.objective.params.items()}
    for x, y in zip(*on, strict=True):
        value = influence.objective.loss(params, (x, y))
        yield torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(params.values()))])


def test_a_verdict_is_words():
    far = uw.explain(network(), X, Y, loss=F.cross_entropy).check()
    assert far.verdict.startswith("not ok: θ̂ is ")
    assert "not at a minimum, as much as" in far.verdict
    down = uw.explain(network(), X, Y, loss=F.cross_entropy, curvature=uw.operators.Hessian(), damping=0.0).check()
    assert "C + λI is not positive" in down.verdict or "not solved" in down.verdict
    assert far.to_dict()["verdict"] == far.verdict
    assert str(far).splitlines()[-1] == f"verdict              {far.verdict}"
