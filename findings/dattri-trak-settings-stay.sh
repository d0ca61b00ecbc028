#!/usr/bin/env bash
# The projector settings of one TRAKAttributor of dattri become the defaults of every later one in the process.
#
# Library: dattri 0.3.0 (with torch 2.13.0).
# Surprise: __init__ binds the module's dict of defaults and updates it in place. After
#   TRAKAttributor(…, projector_kwargs={"proj_dim": 4}) an attributor without projector_kwargs projects to 4 dimensions
#   instead of 512, and says nothing. A comparison of several dimensions in one process therefore depends on its order.
# Expected: equal calls give equal scores.
# Where upweight works around it: settings are frozen dataclasses, and nothing is kept in a module; benchmarks/peers gives
#   every cell of its table a process of its own.
#
# Seen: proj_dim of equal calls: 512, then 4; their scores differ by 0.65, the largest is 0.78
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 dattri==0.3.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> "$folder/bars" <<'PYTHON' || { cat "$folder/bars" >&2; exit 1; }
import sys

import torch
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
X, y = torch.randn(20, 6), torch.arange(20) % 3
rows = DataLoader(TensorDataset(X, y), batch_size=20)


def loss(params, row):
    return nn.functional.cross_entropy(torch.func.functional_call(model, params, row[0][None]), row[1][None])


def probability(params, row):
    return torch.exp(-loss(params, row))


def scores(**settings):
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    trak = TRAKAttributor(task, correct_probability_func=probability, regularization=1e-3, **settings)
    with torch.no_grad():
        trak.cache(rows)
        return trak.attribute(rows), trak.projector_kwargs["proj_dim"]


before, first = scores()
scores(projector_kwargs={"proj_dim": 4, "proj_seed": 7})
after, second = scores()
off, largest = float((before - after).abs().max()), float(before.abs().max())
print(f"proj_dim of equal calls: {first}, then {second}; their scores differ by {off:.2f}, the largest is {largest:.2f}")
if not (first == 512 and second == 4 and off > 0.1 * largest):
    sys.exit("No longer so: a later attributor has the documented defaults.")
PYTHON
