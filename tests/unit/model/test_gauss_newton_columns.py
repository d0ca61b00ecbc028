"""The Gauss–Newton matrix where outputs are many and parameters few, as for adapters of a language model.

The oracle is autograd's Jacobian and Hessian of one row, written out.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.model import calculus


class Cubed(torch.autograd.Function):
    """x³ without a rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class Adapted(nn.Module):
    """A frozen table of 8 words in 7 places, and a narrow layer before it."""

    def __init__(self, cubed):
        super().__init__()
        self.narrow = nn.Linear(4, 5, dtype=torch.float64)
        self.head = nn.Parameter(torch.randn(5, 8 * 7, dtype=torch.float64), requires_grad=False)
        self.cubed = cubed

    def forward(self, x):
        return (self.cubed(self.narrow(x)) @ self.head).reshape(-1, 8, 7)


@pytest.mark.parametrize("cubed", [lambda x: x**3, Cubed.apply], ids=["forward mode", "backward twice"])
def test_the_matrix_by_its_columns(cubed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, X, y = Adapted(cubed), torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 8, (6, 7))
    weights = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    influence = uw.explain(model, X, y, loss=cross_entropy, damping=1.0, sample_weight=weights.numpy())
    assert influence.objective.size == 25
    assert calculus.through_parameters(influence.objective, 56)
    assert influence.operator.matrix().shape == (25, 25)
    names = [name for name, _ in model.named_parameters() if name.startswith("narrow")]
    theta = [dict(model.named_parameters())[name] for name in names]
    expected = torch.zeros(25, 25, dtype=torch.float64)
    for k in range(6):

        def output(*blocks, k=k):
            return torch.func.functional_call(model, dict(zip(names, blocks, strict=True)), (X[k : k + 1],)).reshape(-1)

        J = torch.cat(
            [block.reshape(56, -1) for block in torch.autograd.functional.jacobian(output, tuple(theta))], dim=1
        )
        H = torch.autograd.functional.hessian(
            lambda f, k=k: cross_entropy(f.reshape(1, 8, 7), y[k : k + 1]), output(*theta).detach()
        )
        expected += weights[k] * J.T @ H @ J / 6
    torch.testing.assert_close(influence.operator.matrix(), expected, rtol=1e-9, atol=1e-12)
    V = torch.eye(25, dtype=torch.float64)[:3]
    torch.testing.assert_close(influence.operator.apply(V), expected[:3], rtol=1e-9, atol=1e-12)
