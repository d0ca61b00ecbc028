"""Self-influence: every row's removal, measured on its own loss.

    values[i] = (wᵢ/n) ∇Lᵢᵀ (C + λI)⁻¹ (∇Lᵢ + share)

A factorised solver gives the quadratic forms of all rows by one triangular solve each, without their solutions; any
other solver solves one system per row. `share` is what a row's gradient carries of the penalty's, 0 if r stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.influence import pairs, scoring
from upweight.influence.certificate import Certificate
from upweight.influence.scores import SelfScores, called
from upweight.influence.scoring import Products
from upweight.influence.system import System, solved
from upweight.model import calculus, layers, linear, per_row
from upweight.model.layers import pieces
from upweight.operators.kronecker import Kronecker, in_order
from upweight.operators.linear import LinearHessian
from upweight.solvers import Quadratic, Solution
from upweight.solvers.direct import Factored as Triangular
from upweight.solvers.factored import Diagonalised
from upweight.solvers.outer import OuterForms

_BLOCK = 256  # rows whose systems are solved together, if their gradients fit
_BLOCK_NUMBERS = 2**24
_SPARSE_BLOCK = 32  # the same where rows are sparse: their vectors stay in cache
_WORTH, _FEWEST = 2, 2  # rows for each parameter, and outputs, from which an inverse pays
_SUMS_TO_0 = 1e-12  # of the largest slope: rounding


def of_self(system: System, rows: Any) -> SelfScores:
    """The self-influence of these rows: `Influence.of_self`."""
    rows = system.examples.rows(rows)
    system = system.for_many(len(rows))
    return system.ask(lambda: _of_rows(system, rows))


def _of_rows(system: System, rows: NDArray[np.int64]) -> SelfScores:
    solver, prepared = system.solver, system.prepared

    def solve(V: Tensor) -> Solution:
        return solved(prepared, V, repr(solver))

    if isinstance(prepared, Quadratic):
        products, known = _by_forms(system, rows, prepared, solve)
    else:
        products, known = _by_solutions(system, rows, solve)
    scale = -system.examples.weights[rows] / system.n
    error = products.standard_error()
    names = scoring.Columns.of(system.examples, rows).names
    return SelfScores(
        values=-scale * products.mean[0],
        rows=rows,
        n=system.n,
        certificate=replace(known, solver=repr(solver)),
        scale=scale,
        standard_error=None if error is None else np.abs(scale) * error[0],
        ids=None if names is None else names.values,
        axis=called(names),
    )


def _by_forms(
    system: System, rows: NDArray[np.int64], prepared: Quadratic, solve: Callable[[Tensor], Solution]
) -> tuple[Products, Certificate]:
    objective, sweep = system.objective, system.sweep
    pairwise = pairs.comparing(objective, prepared)
    operator = system.operator
    kronecker = operator if isinstance(operator, Kronecker) and isinstance(prepared, Diagonalised) else None
    closed = scoring.closed(system)
    outer = _outer(system, rows, prepared) if pairwise is None else None
    quick = pairwise is not None or outer is not None
    known_slopes = closed is not None and not closed.sparse and not quick
    witnesses = rows[np.unique(np.linspace(0, len(rows) - 1, pairs.WITNESSES).astype(np.int64))]
    solution = solve(per_row.gradients(sweep, witnesses))
    across = solve(system.project(torch.stack([system.risk_gradient, system.penalty_share]))).x

    def forms(batch: Any, w: Tensor) -> Tensor:
        if pairwise is not None:
            own = pairwise.own(*pairs.features(objective, batch))
            return torch.cat([own[:, None], calculus.dots(objective, batch, across)], 1)
        if outer is not None:
            own = outer.own(*pairs.features(objective, batch))
            return torch.cat([own[:, None], calculus.dots(objective, batch, across)], 1)
        if known_slopes:
            G = linear.sloped(objective, linear.wide(batch[0]), batch[1])
        else:
            G = layers.gradients(objective, batch).double().cpu()
        own = prepared.forms(G)  # a row without weight may lean on what the others do not determine
        own = torch.where((w == 0) & own.isnan(), 0.0, own)
        return torch.cat([own[:, None], G @ across.T], 1)

    every = len(rows) == system.n and bool((np.diff(rows) == 1).all())  # then they are read without a copy
    if kronecker is not None:
        values = _by_blocks(system, None if every else rows, kronecker, prepared.inverse, across)  # type: ignore[attr-defined]
    else:
        visited = closed.sloped if closed is not None and known_slopes else sweep
        vectors = 8 if quick else per_row.width(sweep)
        values = visited.emit(forms, vectors=vectors, rows=None if every else rows, label="self-influence")
    known = scoring.certificate(system, solution)
    drift = np.full(len(rows), np.nan) if objective.folded else -values[:, 1]
    known = replace(known, residual=np.full(len(rows), float(solution.residual.max())), drift=drift)
    return Products((values[:, 0] + values[:, 2])[None]), known


def _by_blocks(
    system: System,
    rows: NDArray[np.int64] | None,
    kronecker: Kronecker,
    inverse: Callable[[Tensor], Tensor],
    across: Float[Tensor, "k p"],
) -> Float[NDArray[np.float64], "n 1+k"]:
    """Every row's own form, block by block, and its products with some vectors: a sweep for the blocks that fit."""
    objective, sweep = system.objective, system.sweep
    sizes = {name: block.numel() for name, block in objective.blocks.items()}
    rounds = kronecker.rounds()
    parts: list[NDArray[np.float64]] = []
    for number, some in enumerate(rounds):

        def forms(batch: Any, w: Tensor, number: int = number, some: range = some) -> Tensor:  # noqa: ARG001
            captured = kronecker.pieces(batch)
            own = kronecker.weigh_blocks(captured, inverse, some)
            own = in_order(own)[:, None] if len(rounds) == 1 else own
            if number:
                return own
            along = pieces.along(captured, across.to(objective.reference), sizes)[:, :, 0].T
            return torch.cat([along.double().cpu(), own], 1)

        vectors = 3 + layers.vectors(objective, sweep.example_bytes)
        with kronecker.here(some, objective.reference):
            parts.append(sweep.emit(forms, vectors=vectors, rows=rows, label="self-influence"))
    found = torch.from_numpy(np.concatenate(parts, 1))
    k = len(across)
    return torch.cat([in_order(found[:, k:])[:, None], found[:, :k]], 1).numpy()


def _outer(system: System, rows: NDArray[np.int64], prepared: Quadratic) -> OuterForms | None:
    """Forms by pairs of outputs: of a softmax over dense rows, where there are enough to pay for an inverse."""
    operator, p = system.operator, system.objective.size
    if not isinstance(operator, LinearHessian) or not isinstance(prepared, Triangular) or operator.sparse:
        return None
    if len(rows) <= _WORTH * p:
        return None
    structure, slopes = operator.sweep.objective.linear, operator.slopes
    known = structure is not None and structure.n_outputs > _FEWEST and system.sweep.at_most(16 * p**2, 4) == 16 * p**2
    if structure is None or not known or float(slopes.sum(1).abs().max()) > _SUMS_TO_0 * float(slopes.abs().max()):
        return None
    return prepared.outer(structure, operator.active)


def _by_solutions(
    system: System, rows: NDArray[np.int64], solve: Callable[[Tensor], Solution]
) -> tuple[Products, Certificate]:
    means, replicas, certificates = [], [], []
    operator = scoring.closed(system)
    block = _SPARSE_BLOCK if operator is not None and operator.sparse else _BLOCK
    size = max(1, min(block, _BLOCK_NUMBERS // system.objective.size))
    for start in range(0, len(rows), size):
        G = per_row.gradients(system.sweep, rows[start : start + size])
        solution = solve(G + system.penalty_share)
        means.append((solution.x * G).sum(1)[None].numpy())
        if solution.replicas is not None:
            replicas.append((solution.replicas * G).sum(2)[:, None].numpy())
        known = scoring.certificate(system, solution)
        if system.objective.folded:  # the penalty's share was in the right-hand sides; a row's own loss has none
            known = replace(known, drift=np.full(len(G), np.nan))
        certificates.append(known)
    mean = np.concatenate(means, 1)
    return Products(mean, np.concatenate(replicas, 2) if replicas else None), Certificate.joined(certificates)
