"""The only automatic choices. Each is a function of what is known, and what it chose shows in repr() and check().

curvature   Hessian for linear predictors and for losses given as one function; GaussNewton for torch modules,
            because they are rarely at a minimum and it is positive there.
solver      Cholesky for p ≤ 4,000, else CG to a relative residual of 1e-6.
damping     0 for scikit-learn estimators, for Hessian() and for Identity(). For GaussNewton and EmpiricalFisher of
            other models: 0 if an L2 penalty covers every parameter, for it already bounds C from below; else a tenth
            of C's mean eigenvalue, estimated with 16 random vectors (Grosse et al., 2023, use the same share).
batch       as many examples as keep their saved activations under 1 GiB.
"""

from __future__ import annotations

import math
from typing import Any

import scipy.sparse
import torch

from upweight import calculus
from upweight.objective import L2, Objective
from upweight.operators import Curvature, EmpiricalFisher, GaussNewton, Hessian, Operator
from upweight.solvers import CG, Cholesky, Solver
from upweight.trees import leaves, like, take

DIRECT_UP_TO = 4000
DAMPING_SHARE = 0.1
_TRACE_VECTORS = 16


def curvature(objective: Objective) -> Curvature:
    """The curvature for an objective when none is named."""
    return GaussNewton() if objective.linear is None and objective.outputs is not None else Hessian()


def solver(objective: Objective) -> Solver:
    """The solver for an objective when none is named."""
    return Cholesky() if objective.size <= DIRECT_UP_TO else CG(rtol=1e-6)


def damping(objective: Objective, spec: Curvature, operator: Operator) -> float:
    """λ when none is given.  Cost: nothing, or one sweep with 16 vectors."""
    if objective.linear is not None or not isinstance(spec, GaussNewton | EmpiricalFisher):
        return 0.0
    if isinstance(objective.penalty, L2) and float(calculus.penalty_diagonal(objective).min()) > 0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (_TRACE_VECTORS, operator.size), generator=generator, dtype=torch.float64) - 1
    mean_eigenvalue = float((signs * operator.apply(signs)).sum()) / (_TRACE_VECTORS * operator.size)
    return max(DAMPING_SHARE * mean_eigenvalue, 1e-12)


def example_bytes(objective: Objective, batch: Any) -> int:
    """Memory that one example needs per vector of a product, measured on the first example of `batch`."""
    if objective.linear is not None:
        K, d = objective.linear.n_outputs, objective.linear.n_features
        return 8 * max(4 * K + K * K, d // 8)
    example = take(like(batch, objective.reference), 0)
    if any(scipy.sparse.issparse(leaf) for leaf in leaves(batch)):
        return 8 * max(1024, objective.size)
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    blocks = {name: block.detach().clone().requires_grad_() for name, block in objective.blocks.items()}
    own = {block.data_ptr() for block in blocks.values()}
    params = blocks if isinstance(objective.params, dict) else next(iter(blocks.values()))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective.loss(params, example)
    activations = sum(size for pointer, size in seen.items() if pointer not in own)
    largest = max(block.numel() * block.element_size() for block in blocks.values())
    # a batched backward pass holds a few copies of the activations; a convolution may hold an example's weights too
    return math.ceil(4 * activations + largest / 8 + 1024)
