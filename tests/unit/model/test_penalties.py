"""The derivatives of a penalty that is written out are those that autograd finds in it."""

from __future__ import annotations

import torch

import upweight as uw
from upweight.model import penalties


def objective(penalty):
    draw = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 2, generator=draw, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    return uw.Objective(
        lambda params, example: (params["w"].T @ example[0]).sum() + params["b"].sum(), params, penalty=penalty
    )


def test_a_quadratic_penalty_with_tilts():
    strengths = {"w": torch.linspace(0, 2, 6, dtype=torch.float64).reshape(3, 2)}
    quadratic = uw.L2(strengths, {"w": -0.3, "b": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    written = objective(quadratic)
    general = objective(quadratic.__call__)  # a function as any other
    V = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(penalties.gradient(written), penalties.gradient(general), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(penalties.hvp(written, V), penalties.hvp(general, V), rtol=1e-14, atol=1e-14)
    for one in (written, general):
        total = torch.ones(4, 8, dtype=torch.float64)
        torch.testing.assert_close(penalties.add_hvp(total, one, V), 1 + penalties.hvp(general, V), rtol=1e-14, atol=0)
    none = objective(None)
    assert not penalties.gradient(none).any()
    assert torch.equal(penalties.add_hvp(V.clone(), none, V), V)
