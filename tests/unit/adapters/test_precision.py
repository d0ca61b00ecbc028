"""In which precision a module is computed, that it is said, and what it costs in accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw


def network(width: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(40, 6, generator=draw), torch.randint(0, 3, (40,), generator=draw)


def values(model: nn.Module) -> np.ndarray:
    X, y = data()
    inf = uw.explain(model, X, y, loss=nn.functional.cross_entropy, penalty=0.1, damping=0.1, solver=uw.solvers.CG())
    return inf.on_loss(X[:3], y[:3]).values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_raised_and_named(dtype):
    X, y = data()
    small = uw.explain(network(8, dtype), X, y, loss=nn.functional.cross_entropy)
    large = uw.explain(network(6000, dtype), X, y, loss=nn.functional.cross_entropy)
    assert small.objective.reference.dtype == torch.float64
    assert large.objective.reference.dtype == torch.float32
    name = str(dtype).rpartition(".")[2]
    assert f"in float64, from {name} weights" in repr(small)
    assert f"in float32, from {name} weights" in repr(large)


def test_large_networks_run_in_float32_and_say_so():
    X, y = data()
    assert " in float32" in repr(uw.explain(network(6000, torch.float32), X, y, loss=nn.functional.cross_entropy))
    double = uw.explain(network(6000, torch.float64), X, y, loss=nn.functional.cross_entropy)
    assert double.objective.reference.dtype == torch.float64


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_scores_of_rounded_weights_are_near_those_of_float32_weights(dtype, allowed):
    """The rounding of the weights is all that is lost: 2⁻¹¹ for float16, 2⁻⁸ for bfloat16, a few times over."""
    full, rounded = values(network(16, torch.float32)), values(network(16, dtype))
    error = np.abs(full - rounded).max() / np.abs(full).max()
    assert 0 < error < allowed
    assert np.array_equal(rounded, values(network(16, dtype).float()))
