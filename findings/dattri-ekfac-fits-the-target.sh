#!/usr/bin/env bash
# dattri's EK-FAC takes its curvature from the function of the queries, not from the loss that was trained.
#
# Library: dattri 0.3.0 (with torch 2.13.0).
# Surprise: an AttributionTask has a loss_func, "the loss function of the model training", and a target_func, "the target
#   function to be attributed". IFAttributorEKFAC.cache estimates its covariances and eigenvalues with the target, so that
#   asking about ten times the loss does not give ten times the scores, and asking about a margin or a logit divides by
#   the curvature of that instead of the loss. With target_func left out the two are one, and nothing shows.
# Expected: scores are linear in what is asked: a target of 10 · loss gives 10 times the scores, as
#   IFAttributorExplicit does. Its docstring says that the Fisher matrix is estimated on the loss function.
# Where upweight works around it: it does not use it. `on_measure` differentiates the measure for the queries alone;
#   operators know the objective only, and the linearity of answers is a law in tests/laws.
#
# Seen: scores of a target of 10 · loss over those of the loss: explicit 10.00, EK-FAC 4.94
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 dattri==0.3.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> "$folder/bars" <<'PYTHON' || { cat "$folder/bars" >&2; exit 1; }
import sys

import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC, IFAttributorExplicit
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
X, y = torch.randn(20, 6), torch.arange(20) % 3
rows = DataLoader(TensorDataset(X, y), batch_size=20)


def loss(params, data):
    return nn.functional.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])


def scores(Attributor, target, **damping):
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict(), target_func=target)
    attributor = Attributor(task=task, **damping)
    attributor.cache(rows)
    return attributor.attribute(rows, rows).detach()


def ratio(Attributor, **damping):
    one = scores(Attributor, None, **damping)
    ten = scores(Attributor, lambda params, data: 10 * loss(params, data), **damping)
    return float((ten * one).sum() / (one * one).sum())


explicit, ekfac = ratio(IFAttributorExplicit, regularization=0.1), ratio(IFAttributorEKFAC, damping=1e-3)
print(f"scores of a target of 10 · loss over those of the loss: explicit {explicit:.2f}, EK-FAC {ekfac:.2f}")
if not (abs(explicit - 10) < 0.1 and ekfac < 8):
    sys.exit("No longer so: EK-FAC's scores are linear in the target.")
PYTHON
