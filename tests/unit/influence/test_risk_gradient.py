"""∇R as the sweep of the scores finds it, against the gradient of the whole objective by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import upweight as uw
from tolerances import EXACT

N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))
WEIGHTS = np.random.default_rng(0).random(N) + 0.2


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("penalty", [None, 0.3])
@pytest.mark.parametrize("folded", [True, False])
def test_the_sweep_of_the_scores_finds_the_gradient_of_the_objective(batch_size, penalty, folded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    settings = {"penalty": penalty, "penalty_per_example": folded, "sample_weight": WEIGHTS, "batch_size": batch_size}
    influence = uw.explain(model, X, Y, loss=cross_entropy, damping=0.1, progress=False, **settings)
    assert not influence.system.knows_risk_gradient
    certificate = influence.on_loss(X[:2], Y[:2]).certificate
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = cross_entropy(functional_call(model, params, (X,)), Y, reduction="none")
    risk = (torch.from_numpy(WEIGHTS) * losses).sum() / N
    risk = risk + (penalty or 0.0) / 2 * sum((p**2).sum() for p in params.values())
    truth = torch.cat([g.reshape(-1) for g in torch.autograd.grad(risk, list(params.values()))])
    assert influence.system.knows_risk_gradient
    assert float((influence.risk_gradient - truth).abs().max()) <= EXACT * float(truth.abs().max())
    assert certificate.gradient_norm == pytest.approx(float(truth.norm()), rel=1e-12)
