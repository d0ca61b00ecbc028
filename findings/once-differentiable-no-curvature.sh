#!/usr/bin/env bash
# The Hessian through a function that is marked @once_differentiable is silently zero.
#
# Library: torch 2.13.0 (torch.autograd).
# Surprise: the decorator hides the backward pass behind a node that would raise, but this node hangs on copies of the
#   gradients and has no way back to the parameters. A derivative that is asked for with respect to parameters never
#   walks through it. torch.autograd.functional.hessian then returns zeros, and torch.autograd.grad(allow_unused=True)
#   returns None, as for a loss without curvature. So a Newton step or an influence would be the penalty's alone.
# Expected: the mark exists to make a second differentiation raise ("trying to differentiate twice a function that was
#   marked with @once_differentiable"). For (x^3)^2 the second derivative is 30 x^4.
# Where upweight works around it: src/upweight/model, the probe of the routes through autograd, function
#   `_refuse_broken_graphs`. It takes one first derivative with its graph, looks through all nodes of this graph, and
#   refuses the loss if an error node is among them.
#
# Seen:
#   gradient at 1, 2:                          [6.0, 192.0], right
#   Hessian's diagonal, worked out:            [30.0, 480.0]
#   autograd.functional.hessian:               [0.0, 0.0]
#   autograd.grad of it, allow_unused=True:    None
#   nodes behind the gradient:                 ['torch::autograd::Error', 'torch::autograd::AccumulateGrad']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


def loss(x):
    return (Cube.apply(x) ** 2).sum()


x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
(gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
right = torch.allclose(gradient, 6 * x**5)
hessian = torch.autograd.functional.hessian(loss, x.detach())
(second,) = torch.autograd.grad(gradient.sum(), x, allow_unused=True)
nodes, node = [], gradient.grad_fn
while node is not None:
    nodes.append(node.name())
    node = node.next_functions[0][0] if node.next_functions else None
print(f"gradient at 1, 2:                          {gradient.tolist()}, {'right' if right else 'wrong'}")
print(f"Hessian's diagonal, worked out:            {(30 * x**4).tolist()}")
print(f"autograd.functional.hessian:               {hessian.diagonal().tolist()}")
print(f"autograd.grad of it, allow_unused=True:    {second}")
print(f"nodes behind the gradient:                 {nodes}")

if not (right and gradient.requires_grad and not hessian.any() and second is None):
    sys.exit("No longer so: a second derivative through @once_differentiable is not silently zero.")
PYTHON
