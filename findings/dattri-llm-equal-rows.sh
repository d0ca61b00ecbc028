#!/usr/bin/env bash
# dattri-llm gives two equal training rows one line of scores, with the sum of both, and all later rows move up by one.
#
# Library: dattri-llm 0.1.0 (with torch 2.13.0, transformers 5.23.0).
# Surprise: rows are known by a hash of their content, and `agnostic_matrix()` has a line for each different hash, "each row
#   summed over that sample's steps". A row that occurs twice in the data counts as one row seen in two steps: its score is
#   doubled, the matrix is shorter than the data, and line i is no longer row i. Nothing is said. Text has duplicates: 178
#   of Enron1's 5,172 messages repeat another one.
# Expected: as many lines as rows, or a warning; each copy has the score of one row, for removing it removes one.
# Where upweight meets it: rows have positions, and names beside them (data/ids.py); benchmarks/peers checks the shape.
#
# Seen: 5 lines for 6 rows; line 1 over the gradient product of row 1: 2.00; line 4 is row 5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 dattri-llm==0.1.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from dattri_llm import AttributionArguments, AttributionTask, TracInAttributor
from torch import nn
from torch.utils.data import Dataset


class Rows(Dataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return {"x": self.X[row], "y": self.y[row]}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
X, y = torch.randn(6, 3), torch.arange(6) % 2
X[4], y[4] = X[1], y[1]  # row 4 is row 1 again
arguments = AttributionArguments(output_dir="out", per_device_train_batch_size=3)
attributor = TracInAttributor(arguments, task=AttributionTask(loss_func=loss, model=model))
_, matrix = attributor.attribute(Rows(X, y), Rows(X[:1], y[:1])).agnostic_matrix()

gradients = []
for row in range(6):
    model.zero_grad()
    loss(model, {"x": X[row : row + 1], "y": y[row : row + 1]}).backward()
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
products = torch.stack(gradients) @ gradients[0]
ratio = float(matrix[1, 0] / products[1])
last = int((products - matrix[-1, 0]).abs().argmin())
print(f"{len(matrix)} lines for 6 rows; line 1 over the gradient product of row 1: {ratio:.2f}; line 4 is row {last}")
if not (len(matrix) == 5 and abs(ratio - 2) < 1e-3 and last == 5):
    sys.exit("No longer so: equal rows have lines of their own.")
PYTHON
