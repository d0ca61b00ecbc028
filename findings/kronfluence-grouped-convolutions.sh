#!/usr/bin/env bash
# The scores of kronfluence for a convolution with groups, or with reflected borders, are made of wrong gradients.
#
# Library: kronfluence 1.0.1 (with torch 2.13.0).
# Surprise: kronfluence rebuilds an example's gradient from a layer's inputs and output gradients. For groups > 1 it
#   averages the input channels over the groups, and so gives every group the same input; for padding_mode="reflect"
#   it pads with zeros. The layer is listed as tracked, no warning appears, and the scores have the right shape.
# Expected: with strategy="identity" there is no curvature, and a pairwise score is the inner product of two gradients,
#   which torch.autograd gives too. For a plain convolution the two agree to float32.
# Where upweight works around it: src/upweight/model, gradients through layers, function `_convolution_factors`: each
#   group keeps its own channels, and a border that is no padding of zeros reaches it as an operation of its own. The
#   function `_structured` in model/layers/per_example.py compares all captured gradients with autograd's before they are used.
#
# Seen:
#   plain      relative error of the layer's scores 7.2e-08
#   groups=2   relative error of the layer's scores 0.47
#   reflect    relative error of the layer's scores 0.24
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 accelerate==1.15.0 einops==0.8.2 einconv==0.1.0 \
  opt-einsum==3.4.0 safetensors==0.8.0 tqdm==4.70.1
"$folder/venv/bin/pip" install --quiet --no-deps kronfluence==1.0.1  # torchvision is declared and not used
cd "$folder"
"$folder/venv/bin/python" -W ignore::FutureWarning - <<'PYTHON'
import sys

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import TensorDataset


class Classes(Task):
    def compute_train_loss(self, batch, model, sample=False):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def error(name, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    data = TensorDataset(torch.randn(6, 4, 6, 6), torch.arange(6) % 3)
    model(data.tensors[0])
    rows = []
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(model[0].parameters()))]))
    truth = torch.stack(rows) @ torch.stack(rows).T
    task = Classes()
    analyzer = Analyzer(name, prepare_model(model, task), task, cpu=True, output_dir="out", disable_tqdm=True)
    analyzer.fit_all_factors("f", data, factor_args=FactorArguments(strategy="identity"), per_device_batch_size=6)
    apart = ScoreArguments(compute_per_module_scores=True)
    analyzer.compute_pairwise_scores("s", "f", data, data, 6, 6, score_args=apart)
    scores = analyzer.load_pairwise_scores("s")["0"]
    relative = float((scores - truth).norm() / truth.norm())
    print(f"{name:<10} relative error of the layer's scores {relative:.2g}")
    return relative


plain, groups = error("plain"), error("groups=2", groups=2)
reflected = error("reflect", padding=1, padding_mode="reflect")
if not (plain < 1e-4 and groups > 0.05 and reflected > 0.05):
    sys.exit("No longer so: the scores of these convolutions have changed.")
PYTHON
