"""The losses that models compute themselves are known again, and outputs of several parts are taken together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw
from small import Sentences, seeded, sentences
from upweight.adapters.own_loss import KINDS
from upweight.model import calculus

ROWS = sentences(labelled=False)
DRAW = np.random.default_rng(1)
NUMBERS = DRAW.normal(size=(len(ROWS), 3))


class Asked(Sentences):
    """Asked with labels it tells one of the losses, by torch.nn.functional."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, input_ids, attention_mask, labels=None):
        logits = super().forward(input_ids, attention_mask)["logits"]
        if self.kind in {"next", "every"}:
            logits = self.head(self.words(input_ids))
        logits = logits[:, :1] if self.kind == "one number" else logits
        return {"logits": logits, "loss": None if labels is None else self.loss(logits, labels)}

    def loss(self, logits, labels):
        if self.kind == "next":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if self.kind == "every":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.kind == "switches":
            return F.binary_cross_entropy_with_logits(logits, labels)
        if self.kind == "one number":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels) if self.kind == "numbers" else F.cross_entropy(logits, labels)


def target(kind, k, length):
    if kind in {"next", "every"}:
        return [(k + place) % 3 for place in range(length)]
    whole = {"switches": (NUMBERS[k] > 0).astype(np.float32), "numbers": NUMBERS[k].astype(np.float32)}
    return whole.get(kind, np.float32(NUMBERS[k, 0]) if kind == "one number" else k % 3)


@pytest.mark.parametrize("kind", ["next", "every", "one", "one number", "numbers", "switches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_known_loss_has_the_gradients_of_the_model_on_a_row_alone(kind, dtype):
    assert len(KINDS) == 6
    model = seeded(lambda: Asked(kind)).to(dtype).eval()
    rows = [{**row, "labels": target(kind, k, len(row["input_ids"]))} for k, row in enumerate(ROWS)]
    influence = uw.explain(model, rows, damping=1.0)
    ours = calculus.gradients(influence.objective, influence.examples.batch(range(len(rows))))
    exact = seeded(lambda: Asked(kind)).to(dtype).double()
    for k in (0, 3, 7):
        ids = torch.tensor([rows[k]["input_ids"]])
        labels = torch.as_tensor(np.array([rows[k]["labels"]]))
        labels = labels.double() if labels.is_floating_point() else labels
        loss = exact(ids, torch.ones_like(ids), labels)["loss"]
        theirs = torch.autograd.grad(loss, list(exact.parameters()))
        expected = torch.cat([one.reshape(-1) for one in theirs])
        torch.testing.assert_close(ours[k].double(), expected, rtol=1e-6, atol=1e-9)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes, self.number = nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, x):
        return {"classes": self.classes(x), "unused": x.sum(), "number": self.number(x)[:, 0]}


def test_parts_of_an_output_are_taken_together():
    """Two losses added: values are those of a model that returns one tensor, by its own dense Gauss-Newton matrix."""
    X = torch.from_numpy(DRAW.normal(size=(30, 3)))
    y = (X[:, 0] > 0).long()

    def together(output, target):
        numbers = (output["number"] - target.to(output["number"].dtype)).square().mean()
        return F.cross_entropy(output["classes"], target) + 2 * numbers

    model = seeded(TwoHeads).double().eval()
    values = uw.explain(model, X, y, loss=together, damping=0.1).on_loss(X[:3], y[:3]).values
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(theta, x):
        found = torch.func.functional_call(model, theta, (x[None],))
        return torch.cat([found["classes"][0], found["number"]])

    def loss(z, target):
        return F.cross_entropy(z[None, :2], target[None]) + 2 * (z[2] - target) ** 2

    def flat(tree):
        return torch.cat([tree[name].flatten(-theta[name].ndim) for name in theta], -1)

    J = torch.stack([flat(torch.func.jacrev(outputs)(theta, x)) for x in X])
    Z = torch.stack([outputs(theta, x) for x in X])
    H = torch.stack([torch.func.hessian(loss)(z, t) for z, t in zip(Z, y, strict=True)])
    G = torch.stack([torch.func.grad(loss)(z, t) @ j for z, t, j in zip(Z, y, J, strict=True)])
    C = torch.einsum("nka,nkl,nlb->ab", J, H, J) / len(X) + 0.1 * torch.eye(J.shape[2]).double()
    np.testing.assert_allclose(values, (G[:3] @ torch.linalg.solve(C, G.T) / len(X)).numpy(), rtol=1e-6)
