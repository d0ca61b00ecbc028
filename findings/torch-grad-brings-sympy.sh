#!/usr/bin/env bash
# The first gradient with cotangents imports SymPy, the first gradient of a scalar does not.
#
# Library: torch 2.13.0.
# Surprise: torch.autograd.grad and Tensor.backward, given grad_outputs or a gradient, import torch.fx.experimental.
#   symbolic_shapes to compare shapes, and with it SymPy and some 500 modules, though all shapes are numbers. Without, no
#   module is imported. It happens once a process, in the middle of whatever is timed.
# Expected: the same imports for dL/dx of a sum and for the same numbers with a vector of ones.
# Where upweight meets it: model/penalties.py writes the gradient of an L2 penalty out, so that a linear model of
#   scikit-learn is explained without: the first call of a process was 0.8 s shorter.
#
# Seen: modules imported by grad of a sum: 0, SymPy there: False; by grad with ones as cotangents: 487, SymPy there: True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

x = torch.arange(3.0, requires_grad=True)


def imported(gradient):
    """How many modules a gradient imports, and whether SymPy is there then."""
    before = set(sys.modules)
    gradient()
    return len(set(sys.modules) - before), "sympy" in sys.modules


scalar = imported(lambda: torch.autograd.grad((x**2).sum(), x))
vector = imported(lambda: torch.autograd.grad(x**2, x, torch.ones(3)))
print(f"modules imported by grad of a sum: {scalar[0]}, SymPy there: {scalar[1]}")
print(f"by grad with ones as cotangents: {vector[0]}, SymPy there: {vector[1]}")
sys.exit(not (scalar[0] < 10 and not scalar[1] and vector[0] > 100 and vector[1]))
PYTHON
