"""The law-book of operators: one table of curvatures × one table of models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import cases
import oracles
import upweight as uw
from strategies import batch_sizes, permutations, vectors
from tolerances import EXACT, FLOAT32
from upweight.model.sweep import Sweep
from upweight.operators import (
    EKFAC,
    KFAC,
    Arnoldi,
    Dense,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Identity,
    Nystroem,
    Operator,
    Sampled,
    Spectral,
)


def _gauss_newton(case):
    model = case.model
    return oracles.dense_gauss_newton(
        case.problem, lambda t, x: model.output(model.split(t), x), model.output_loss, case.theta
    )


def _itself(curvature):
    """For approximations, whose own oracles are in a test of their own: the laws hold between its methods."""
    return lambda case: case.influence(curvature=curvature).operator.matrix()


ORACLES = {
    "Hessian": (Hessian(), lambda case: oracles.dense_hessian(case.problem, case.theta)),
    "GaussNewton": (GaussNewton(), _gauss_newton),
    "EmpiricalFisher": (EmpiricalFisher(), lambda case: oracles.dense_fisher(case.problem, case.theta)),
    "Identity": (Identity(), lambda case: torch.eye(len(case.theta), dtype=torch.float64)),
    "Dense Hessian": (Dense(), lambda case: oracles.dense_hessian(case.problem, case.theta)),
    "Dense GaussNewton": (Dense(GaussNewton()), _gauss_newton),
    "Dense EmpiricalFisher": (Dense(EmpiricalFisher()), lambda case: oracles.dense_fisher(case.problem, case.theta)),
    "Arnoldi, full rank": (Arnoldi(99), lambda case: oracles.dense_hessian(case.problem, case.theta)),
    "Nystroem, full rank": (Nystroem(99), _gauss_newton),
    "KFAC": (KFAC(), _itself(KFAC())),
    "EKFAC": (EKFAC(), _itself(EKFAC())),
    "EKFAC of the Fisher": (EKFAC(of=EmpiricalFisher()), _itself(EKFAC(of=EmpiricalFisher()))),
}
WITHOUT_A_SWEEP = [kind for kind in ORACLES if kind.startswith("Dense") or "KFAC" in kind or "rank" in kind]
POSITIVE = [name for name in ORACLES if "Hessian" not in name and "Arnoldi" not in name]


@dataclass(frozen=True)
class Bound:
    case: cases.Case
    spec: object
    operator: Operator
    truth: torch.Tensor

    @property
    def p(self):
        return len(self.truth)


@cache
def _bound(name, kind):
    case = cases.make(name, weighted=True)
    spec, dense = ORACLES[kind]
    return Bound(case, spec, case.influence(curvature=spec).operator, dense(case))


def _fixture(kinds):
    pairs = [(name, kind) for name in cases.NAMES for kind in kinds]
    return pytest.fixture(scope="module", params=pairs, ids=lambda p: f"{p[0]}-{p[1]}")(
        lambda request: _bound(*request.param)
    )


bound = _fixture(ORACLES)
sampled = _fixture([kind for kind in ORACLES if kind not in WITHOUT_A_SWEEP])
spectral = _fixture([*WITHOUT_A_SWEEP, "Identity"])


def close(a, b, rtol=EXACT):
    scale = float(torch.as_tensor(b).abs().max()) or 1.0
    assert float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()) <= rtol * max(scale, 1e-8)


def test_equals_the_dense_oracle(bound):
    close(bound.operator.apply(torch.eye(bound.p, dtype=torch.float64)), bound.truth)
    close(bound.operator.matrix(), bound.truth)


@given(vectors(3, 40), st.floats(-2, 2))
def test_is_linear_and_symmetric(bound, V, factor):
    V = torch.from_numpy(V[:, : bound.p])
    apply = bound.operator.apply
    close(apply(V[:1] + factor * V[1:2]), apply(V[:1]) + factor * apply(V[1:2]))
    close((V[:1] * apply(V[2:])).sum(), (V[2:] * apply(V[:1])).sum(), 1e-9)


@given(vectors(3, 40))
def test_many_vectors_together_are_the_same_as_alone(bound, V):
    V = torch.from_numpy(V[:, : bound.p])
    close(bound.operator.apply(V), torch.cat([bound.operator.apply(v[None]) for v in V]))


@given(batch_sizes())
def test_batch_size_changes_nothing(bound, size):
    V = torch.eye(bound.p, dtype=torch.float64)[:3]
    close(bound.case.influence(curvature=bound.spec, batch_size=size).operator.apply(V), bound.operator.apply(V))


@given(permutations(60))
def test_row_order_changes_nothing(bound, order):
    case, objective = bound.case, bound.case.influence(curvature=bound.spec).objective
    order = order[: case.n].argsort()
    shuffled = uw.Examples(case.X[order], case.y[order], sample_weight=case.problem.weights[order].numpy())
    V = torch.eye(bound.p, dtype=torch.float64)[:2]
    close(bound.spec.bind(Sweep(objective, shuffled)).apply(V), bound.operator.apply(V))


def test_keeps_shape_and_precision_and_gives_no_graph(bound):
    out = bound.operator.apply(torch.ones(2, bound.p, dtype=torch.float64))
    assert out.shape == (2, bound.p)
    assert out.dtype == torch.float64
    assert not out.requires_grad


def test_a_few_rows_estimate_the_whole_without_bias(sampled):
    bound = sampled
    assert isinstance(bound.operator, Sampled)
    V = torch.eye(bound.p, dtype=torch.float64)[:2]
    rows = np.arange(bound.case.n)
    each = torch.stack([bound.operator.apply_rows(V, rows[i : i + 1]) for i in rows])
    close(each.mean(0), bound.operator.apply(V))
    close(bound.operator.apply_rows(V, rows), bound.operator.apply(V))
    bounding = bound.operator.largest_row_curvature()
    if bounding is not None and not isinstance(bound.spec, Identity):
        eye = torch.eye(bound.p, dtype=torch.float64)
        largest = max(float(torch.linalg.eigvalsh(bound.operator.apply_rows(eye, rows[i : i + 1]))[-1]) for i in rows)
        assert largest <= bounding * (1 + 1e-9)


def test_spectral_laws(spectral):
    bound = spectral
    assert isinstance(bound.operator, Spectral)
    V = torch.randn(2, bound.p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(bound.operator.map(lambda x: x, V), bound.operator.apply(V))
    close(bound.operator.eigenvalues, torch.linalg.eigvalsh(bound.truth))
    shift = 1.0 - float(bound.operator.eigenvalues[0])
    inverse = bound.operator.map(lambda x: 1 / (x + shift), V)
    close(bound.operator.apply(inverse) + shift * inverse, V, 1e-9)


@pytest.mark.parametrize("kind", POSITIVE)
@pytest.mark.parametrize("name", cases.NAMES)
def test_is_positive_where_it_is_claimed(kind, name):
    case = cases.make(name, weighted=True)
    eigenvalues = torch.linalg.eigvalsh(case.influence(curvature=ORACLES[kind][0]).operator.matrix())
    assert float(eigenvalues[0]) > -1e-12 * float(eigenvalues[-1])


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "EmpiricalFisher", "EKFAC"])
def test_leaves_the_module_untouched_and_keeps_to_its_precision(kind):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).float()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    module.eval()
    X, y = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 2
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    random = torch.get_rng_state()
    influence = uw.explain(module, X, y, loss=torch.nn.functional.cross_entropy, curvature=ORACLES[kind][0])
    V = torch.randn(2, influence.objective.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    in_double = influence.operator.apply(V)
    assert torch.equal(torch.get_rng_state(), random)
    assert not module.training
    assert not module[0]._forward_hooks
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
    objective = uw.Objective.from_module(module, torch.nn.functional.cross_entropy)  # stays in float32
    close(ORACLES[kind][0].bind(Sweep(objective, uw.Examples(X, y))).apply(V), in_double, FLOAT32)


def test_the_fisher_is_not_called_gauss_newton():
    case = cases.make("softmax")
    fisher = case.influence(curvature=EmpiricalFisher()).operator.matrix()
    assert float((fisher - _gauss_newton(case)).abs().max()) > 1e-2
