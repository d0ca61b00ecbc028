"""Recurrent layers written out are torch's own: outputs, last states, gradients; and no loop over rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from small import seeded
from upweight.model import calculus
from upweight.model.recurrent import written_out

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
X = torch.randn(30, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(30) % 2
FORMS = [*itertools.product([1, 2], [False, True], [True], [True]), (2, True, False, False)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("layers", "both", "bias", "first"),
    [*itertools.product([1, 2], [False, True], [True], [True]), (2, True, False, False)],
)
def test_outputs_states_and_gradients_are_torchs_own(kind, layers, both, bias, first):
    layer = seeded(lambda: LAYERS[kind](3, 4, layers, bidirectional=both, bias=bias, batch_first=first)).double()
    once = layer(X)
    theirs = torch.autograd.grad(once[0].square().sum(), list(layer.parameters()))
    with written_out():
        again = layer(X)
    ours = torch.autograd.grad(again[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(again, once)
    torch.testing.assert_close(ours, theirs)
    assert "lstm" not in vars(torch._VF), "torch is as it was"


def test_projections_states_of_ones_own_and_single_sequences():
    layer = seeded(lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True)).double()
    state = torch.ones(1, 30, 2).double(), torch.full((1, 30, 4), 0.5).double()
    once, alone = layer(X, state), layer(X[0])
    with written_out():
        torch.testing.assert_close(layer(X, state), once)
        torch.testing.assert_close(layer(X[0]), alone)


def test_packed_sequences_are_torchs():
    layer = seeded(lambda: nn.GRU(3, 4, batch_first=True)).double()
    packed = nn.utils.rnn.pack_padded_sequence(X[:3], [6, 4, 2], batch_first=True)
    once = layer(packed)[0].data
    with written_out():
        torch.testing.assert_close(layer(packed)[0].data, once)


class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_loop_over_rows_and_gradients_of_autograd(kind):
    model = seeded(lambda: Last(LAYERS[kind](3, 4, batch_first=True))).double().eval()
    influence = uw.explain(model, X, Y, loss=cross_entropy, damping=0.1)
    assert influence.objective.route.examples == "vmap"
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(30)))
    for row in (0, 7):
        loss = cross_entropy(model(X[row : row + 1]), Y[row : row + 1])
        theirs = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(ours[row], torch.cat([one.reshape(-1) for one in theirs]))
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (X,)), chunk_size=10)(
        dict(model.named_parameters())
    )
    J = torch.cat([one.detach().reshape(30, 2, -1) for one in J.values()], 2)
    p = model(X).softmax(1).detach()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    C = torch.einsum("nka,nkl,nlb->ab", J, H, J) / 30 + 0.1 * torch.eye(J.shape[2]).double()
    expected = ours[:3] @ torch.linalg.solve(C, ours.T) / 30
    np.testing.assert_allclose(influence.on_loss(X[:3], Y[:3]).values, expected.numpy(), rtol=1e-5, atol=1e-9)
