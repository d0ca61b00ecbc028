#!/usr/bin/env bash
# dattri's conjugate gradients do not stop when they have converged, and end in NaN.
#
# Library: dattri 0.3.0 (with torch 2.13.0).
# Surprise: ihvp_cg and IFAttributorCG document `tol`: if the norm of the residual is less, the iteration is truncated. The
#   argument is accepted and not read. Every solve takes max_iter steps; when the residual has become 0 the next step divides
#   0 by 0, so that a max_iter chosen generously turns all scores into NaN, without an error or a warning.
# Expected: the documented stop, or an error.
# Where upweight works around it: it does not use it. `CG` stops at its residual, and what is not finite is refused.
#
# Seen: largest error over the largest score, against IFAttributorExplicit: max_iter 25: 7e-08, max_iter 200: nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 dattri==0.3.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> "$folder/bars" <<'PYTHON' || { cat "$folder/bars" >&2; exit 1; }
import sys

import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Linear(6, 3)
X, y = torch.randn(60, 6), torch.arange(60) % 3
rows = DataLoader(TensorDataset(X, y), batch_size=60)


def loss(params, data):
    return nn.functional.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])


def scores(Attributor, **settings):
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = Attributor(task=task, regularization=0.1, **settings)
    attributor.cache(rows)
    return attributor.attribute(rows, rows).detach()


exact = scores(IFAttributorExplicit)
few, many = (
    float((scores(IFAttributorCG, max_iter=count, tol=1e-7) - exact).abs().max() / exact.abs().max())
    for count in (25, 200)
)
print(f"largest error over the largest score, against IFAttributorExplicit: max_iter 25: {few:.0e}, max_iter 200: {many}")
if not (few < 1e-3 and many != many):
    sys.exit("No longer so: more steps than are needed leave the scores finite, or few of them do not.")
PYTHON
