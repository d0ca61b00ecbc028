#!/usr/bin/env bash
# pyDVL's EK-FAC sees no curvature at all where a two-class model is undecided, and the wrong amount everywhere else.
#
# Library: pyDVL 0.10.0 (with torch 2.13.0 and NumPy 1.26.4).
# Surprise: the Fisher matrix is the mean of p_k ∇log p_k (∇log p_k)ᵀ over the classes k. EkfacInfluence takes one backward
#   pass of Σ_k √p_k log p_k and the outer product of that one gradient, which also holds all products of two classes. For
#   two classes it is p₀p₁(√p₀ − √p₁)²: zero at p = (½, ½), where the Fisher matrix of the outputs, p₀p₁, is largest.
#   Nothing is said; with three or ten classes all entries are off too.
# Expected: diag(p) − ppᵀ for the outputs, as KFAC and EK-FAC are defined and as the documentation says.
# Where upweight works around it: it does not use it. operators/kronecker.py draws labels, or takes one backward pass for
#   each column of a root of diag(p) − ppᵀ, and its EKFAC is exact where Gauss–Newton is a Kronecker product (tested).
#
# Seen: p = (0.50, 0.50): theirs 0.0000, Fisher 0.2500
#       p = (0.73, 0.27): theirs 0.0223, Fisher 0.1966
#       p = (0.88, 0.12): theirs 0.0370, Fisher 0.1050
#       scores at p = (½, ½), damping 0.01: 50, by the Fisher matrix 0.98: 51 times too large
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 torch==2.13.0 "pyDVL[influence]==0.10.0"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from pydvl.influence.torch import EkfacInfluence
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X, y, damping = torch.ones(8, 1), torch.arange(8) % 2, 0.01
rows = DataLoader(TensorDataset(X, y), batch_size=8)


def fitted(logit):
    """EK-FAC of a single layer whose logits are (logit, 0) for every row; and p."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[logit], [0.0]]))
    influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=damping).fit(rows)
    return influence, torch.softmax(model(X)[0], 0).detach()


found = []
for logit in (0.0, 1.0, 2.0):
    influence, p = fitted(logit)
    # the largest eigenvalue over 2 is the entry (0, 0) of a matrix a·[[1, −1], [−1, 1]]
    theirs = float(next(iter(influence.ekfac_representation.diags)).max()) / 2
    found.append((theirs, float(p[0] * p[1])))
    print(f"p = ({p[0]:.2f}, {p[1]:.2f}): theirs {theirs:.4f}, Fisher {found[-1][1]:.4f}")

influence, p = fitted(0.0)
score = float(influence.influences(X[:1], y[:1], X[:1], y[:1]))
g = p - torch.eye(2)[0]  # the gradient of the row's loss in the weights
right = float(g @ torch.linalg.solve(torch.diag(p) - torch.outer(p, p) + damping * torch.eye(2), g))
print(f"scores at p = (½, ½), damping {damping}: {score:.3g}, by the Fisher matrix {right:.2g}: {score / right:.0f} times too large")
(zero, quarter), *others = found
if not (zero < 1e-6 < quarter and all(abs(a - b) > 0.05 for a, b in others) and score / right > 10):
    sys.exit("No longer so: EK-FAC's curvature of a softmax has changed.")
PYTHON
