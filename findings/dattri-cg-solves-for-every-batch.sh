#!/usr/bin/env bash
# dattri solves every query's linear system anew for each batch of training rows.
#
# Library: dattri 0.3.0 (with torch 2.13.0).
# Surprise: IFAttributorCG.attribute loops over batches of training rows, and inside calls transform_test_rep, which runs
#   the whole iteration for the queries. Its Hessian is of the cached data, the same for all, so that nothing in the system
#   depends on the batch: rows in ten batches cost ten times the solve of rows in one, and give the same scores.
# Expected: one solve for each query; a batch size that sets memory, not the number of solves.
# Where upweight works around it: benchmarks/peers/protocols/dattri_mnist.py gives dattri all rows in one batch, and says so.
#
# Seen: solves for 5 queries in one batch: rows in 1 batch 1, in 10 batches 10; largest difference of the scores 2e-06
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 dattri==0.3.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> "$folder/bars" <<'PYTHON' || { cat "$folder/bars" >&2; exit 1; }
import sys

import torch
from dattri.algorithm.influence_function import IFAttributorCG
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Linear(6, 3)
X, y = torch.randn(60, 6), torch.arange(60) % 3


def loss(params, data):
    return nn.functional.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])


class Counting(IFAttributorCG):
    solves = 0

    def transform_test_rep(self, *given, **named):
        self.solves += 1
        return super().transform_test_rep(*given, **named)


def attributed(size):
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = Counting(task=task, max_iter=10, regularization=0.1)
    attributor.cache(DataLoader(TensorDataset(X, y), batch_size=60))
    rows, queries = (DataLoader(TensorDataset(X[:k], y[:k]), batch_size=b) for k, b in ((60, size), (5, 5)))
    return attributor.attribute(rows, queries).detach(), attributor.solves


(whole, one), (parts, many) = attributed(60), attributed(6)
apart = float((whole - parts).abs().max())
print(
    f"solves for 5 queries in one batch: rows in 1 batch {one}, in 10 batches {many}; "
    f"largest difference of the scores {apart:.0e}"
)
if not (one == 1 and many == 10 and apart < 1e-4):
    sys.exit("No longer so: the number of solves does not grow with the batches, or the scores differ.")
PYTHON
