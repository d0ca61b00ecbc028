#!/usr/bin/env bash
# Opacus gives a sample a gradient by the embedding of its padding, which torch does not train.
#
# Library: opacus 1.6.0, torch 2.13.0.
# Surprise: GradSampleModule computes the per-sample gradients of nn.Embedding(padding_idx=0) without looking at padding_idx,
#   so that grad_sample holds the padding's row too. It grows with the padding of a sample; norms, dot products and clipping
#   by the norm count it, though autograd's gradient of the same sample is 0 there and the row never moves.
# Expected: grad_sample[i] is the gradient of the loss of sample i, as its documentation says.
# Where upweight meets it: model/layers takes the padding's row out of structured gradients, and compares with autograd.
#
# Seen: the row of the padding has a gradient of 0 by autograd and of 0.26 by Opacus, whose norm of a sample is up to 3
#   times as large; all other rows agree to 3e-8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 opacus==1.6.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, words):
        return self.head(self.embedding(words).mean(1))


words, labels = torch.randint(1, 7, (5, 6)), torch.randint(0, 3, (5,))
words[:, 2:] = 0
model = Mean()
exact = []
for one, label in zip(words, labels):
    model.zero_grad()
    cross_entropy(model(one[None]), label[None]).backward()
    exact.append(model.embedding.weight.grad.clone())
exact = torch.stack(exact)
model.zero_grad()
cross_entropy(GradSampleModule(model, loss_reduction="mean")(words), labels).backward()
given = model.embedding.weight.grad_sample
others = float((given - exact)[:, 1:].abs().max())
ratio = float((given.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())
print("gradient by the padding: autograd", float(exact[:, 0].abs().max()), "Opacus", float(given[:, 0].abs().max()))
print("norm of a sample over autograd's, at most", ratio, "; other rows differ by", others)
sys.exit(not (float(exact[:, 0].abs().max()) == 0 and float(given[:, 0].abs().max()) > 0.01 and others < 1e-6))
PYTHON
