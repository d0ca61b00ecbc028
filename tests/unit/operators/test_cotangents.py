"""Cotangents of losses with too many outputs to form their second derivative: closed forms, found by trying."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import upweight as uw
from nets import draw, z_scores
from tolerances import EXACT, STANDARD_ERRORS
from upweight import calculus
from upweight.operators.cotangents import FORMED, Exact, Signs, outputs


def weighted_entropy(f, y):
    weight = torch.linspace(0.5, 2, f.shape[1], dtype=f.dtype)
    return cross_entropy(f, y, weight=weight, reduction="none").sum(-1).mean() / 7


def smoothed(f, y):
    return cross_entropy(f.movedim(2, 1), y, label_smoothing=0.2, reduction="none").mean(1).sum()


def ignoring(f, y):
    y = torch.where(y == 1, -100, y)
    return cross_entropy(f, y, ignore_index=-100, reduction="sum")


LARGE = {
    "separate": ((FORMED + 5,), lambda f, y: mse_loss(f, y.double().expand(f.shape))),
    "logistic": (
        (FORMED + 5,),
        lambda f, y: binary_cross_entropy_with_logits(f, (y > 0).double().expand(f.shape), reduction="sum") / len(f),
    ),
    "softmax of many classes": ((FORMED + 9,), lambda f, y: cross_entropy(f, y[:, 0])),
    "tokens, classes first": ((6, 30), weighted_entropy),
    "tokens, classes last": ((30, 6), smoothed),
    "tokens, some ignored": ((6, 30), ignoring),
    "coupled otherwise": (
        (FORMED + 5,),
        lambda f, y: (f.sum(1) ** 2 + (f**2).sum(1) / 3 - f[:, 0] * y[:, 0]).mean(),
    ),
}


def scores_as_outputs(name: str) -> tuple[uw.Objective, tuple[Tensor, Tensor], Tensor]:
    """A model whose outputs are a table of numbers per example, so that H is the only thing that is asked for."""
    shape, loss = LARGE[name]
    K = int(np.prod(shape))
    module = nn.Sequential(nn.Linear(2, K), nn.Unflatten(1, shape)).double()
    with torch.no_grad():
        module[0].weight.copy_(draw(K, 2, seed=1))
    objective = uw.Objective.from_module(module, loss)
    X, y = draw(3, 2), torch.randint(0, 6, (3, 30), generator=torch.Generator().manual_seed(0))
    if name in {"separate", "logistic"}:
        y = y[:, :1]
    return objective, (X, y), calculus.output_hessians(objective, (X, y))


@pytest.mark.parametrize("name", LARGE)
def test_cotangents_have_the_second_derivative_as_their_second_moment(name, monkeypatch):
    objective, batch, H = scores_as_outputs(name)
    if name != "coupled otherwise":  # these have closed forms, which must be found
        monkeypatch.setattr("upweight.operators.cotangents._formed", None)
    f = outputs(objective, batch)
    u = Exact().of(objective, batch, f)
    assert float((torch.einsum("mbi,mbj->bij", u, u) - H).abs().max()) <= EXACT * float(H.abs().max())
    drawn = [Signs(8, seed).of(objective, batch, range(len(f)), f) for seed in range(20)]
    moments = [torch.einsum("mbi,mbj->bij", v, v) for v in drawn]
    probe = draw(len(H[0]), 5, seed=2)
    scores = z_scores(
        [torch.einsum("ik,bij,jk->bk", probe, M, probe) for M in moments],
        torch.einsum("ik,bij,jk->bk", probe, H, probe),
    )
    assert float(scores.abs().max()) < STANDARD_ERRORS
