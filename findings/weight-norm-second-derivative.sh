#!/usr/bin/env bash
# The Hessian of a weight-normalised layer in torch is not symmetric: the second derivative of its operation is wrong.
#
# Library: torch 2.13.0, on the CPU.
# Surprise: nn.utils.parametrizations.weight_norm (and the older nn.utils.weight_norm) compute g v/‖v‖ by an operation of
#   their own. Its values and first derivatives are right, and it can be differentiated again without an error or a
#   warning; what comes out differs from the formula's second derivative by as much as that is large, and the matrix of
#   second derivatives differs from its transpose by as much.
# Expected: the second derivative, or an error.
# Where upweight meets it: curvature, Hessian products and influence of such networks. They were refused, because the
#   second derivative is compared with the slope of the first; now the norm is written out (model/weight_norm.py).
#
# Seen: largest entry 10.5; torch against the formula 10.5, torch against its transpose 10.5; the formula's own 2e-15.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.autograd.functional import hessian, jacobian
from torch.nn.utils.parametrizations import weight_norm

torch.manual_seed(0)
layer = weight_norm(torch.nn.Linear(2, 2, bias=False).double())
names = ["parametrizations.weight.original0", "parametrizations.weight.original1"]
g, v = (dict(layer.named_parameters())[name].detach().clone() for name in names)
x = torch.randn(5, 2, dtype=torch.float64)


def by_torch(g, v):
    return torch.func.functional_call(layer, dict(zip(names, (g, v))), (x,)).sin().sum()


def by_formula(g, v):
    return (x @ (v * (g / v.norm(dim=1, keepdim=True))).T).sin().sum()


def matrix(function):
    blocks = hessian(function, (g, v))
    lines = [[part.reshape(a.numel(), b.numel()) for part, b in zip(line, (g, v))] for line, a in zip(blocks, (g, v))]
    return torch.cat([torch.cat(line, 1) for line in lines])


first = max(float((a - b).abs().max()) for a, b in zip(jacobian(by_torch, (g, v)), jacobian(by_formula, (g, v))))
ours, theirs = matrix(by_formula), matrix(by_torch)
largest, apart = float(ours.abs().max()), float((theirs - ours).abs().max())
crooked, own = (float((H - H.T).abs().max()) for H in (theirs, ours))
print(f"first derivatives apart by {first:.1g}; second ones: largest {largest:.1f}, torch against the formula {apart:.1f}")
print(f"torch against its transpose {crooked:.1f}, the formula {own:.1g}")
as_stated = first < 1e-12 and own < 1e-12 and apart > 0.5 * largest and crooked > 0.5 * largest
raise SystemExit(0 if as_stated else "no longer as stated")
PYTHON
