"""What is proven of an error: above the truth for every system, and what quadrature says where that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import upweight as uw
from upweight.operators.lowest import lowest_eigenvalue
from upweight.solvers import CG, Preconditioned
from upweight.solvers.block import descend_together
from upweight.solvers.bounds import Searched, of_values
from upweight.solvers.recurrence import descend


def system(condition, p=60, queries=1, seed=0, cluster=False):
    """A with eigenvalues from 1 to its condition (of the lower ones many alike, if they cluster), and sides."""
    draw = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(p, p, generator=draw, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(0, np.log10(condition), p, dtype=torch.float64)
    eigenvalues[: p // 2] = 1 if cluster else eigenvalues[: p // 2]
    return (Q * eigenvalues) @ Q.T, torch.randn(queries, p, generator=draw, dtype=torch.float64)


def searched(A, V, steps, lowest, precondition=None):
    """Where so many steps lead, and what was searched on the way."""
    found = Searched(lowest)
    inner = descend_together if len(V) > 1 else descend
    goal = torch.zeros(len(V), dtype=torch.float64)
    run = inner(lambda P: P @ A, precondition, torch.zeros_like(V), V, goal, steps, follow=found.follow)
    return run.x, V - run.x @ A, found


def energies(A, X, V):
    E = torch.linalg.solve(A, V.T).T - X
    return ((E @ A) * E).sum(1).clamp(min=0).sqrt()


@pytest.mark.parametrize("condition", [3.0, 1e2, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("kind", ["plain", "preconditioned", "varying"])
def test_the_bound_holds_after_any_number_of_steps(condition, queries, cluster, kind):
    for seed in range(2):
        A, V = system(condition, queries=queries, seed=seed, cluster=cluster)
        scale, draw = A.diagonal().clone(), torch.Generator().manual_seed(seed)

        def precondition(R, scale=scale, draw=draw):
            noise = torch.rand(len(scale), generator=draw, dtype=torch.float64) if kind == "varying" else 0
            return R / scale * (1 + noise)

        for steps in (1, 2, 3, 7, 20, 60):
            X, R, found = searched(A, V, steps, 1.0, None if kind == "plain" else precondition)
            truth, bound = energies(A, X, V), found.energy(R)
            rounding = 1e-12 * V.norm(dim=1) * condition**0.5
            assert (bound >= truth * (1 - 1e-9) - rounding).all(), (seed, steps, bound / truth)
            assert (bound <= R.norm(dim=1) * (1 + 1e-9)).all()  # never worse than ‖r‖/√μ


def test_for_one_side_without_preconditioner_it_is_gauss_radau():
    """Meurant and Tichý's recurrence of the coefficients γ, δ of conjugate gradients, with the node at μ."""
    A, V = system(1e3, p=80)
    mu, x, r = 0.9, torch.zeros(80, dtype=torch.float64), V[0].clone()
    p, rho, gamma_mu, before = r.clone(), float(r @ r), 1 / 0.9, []
    for _ in range(25):
        Ap = A @ p
        gamma = rho / float(p @ Ap)
        x, r = x + gamma * p, r - gamma * Ap
        new = float(r @ r)
        delta = new / rho
        gamma_mu = (gamma_mu - gamma) / (mu * (gamma_mu - gamma) + delta)
        before.append((gamma_mu * new) ** 0.5)
        p, rho = r + delta * p, new
    for steps in (1, 5, 12, 25):
        _, R, found = searched(A, V, steps, mu)
        assert float(found.energy(R)) == pytest.approx(before[steps - 1], rel=1e-7)


def test_it_comes_near_the_truth_where_the_small_eigenvalues_are_found():
    A, V = system(1e3, p=80, queries=3, cluster=True)
    X, R, found = searched(A, V, 14, 1.0)
    truth = energies(A, X, V)
    assert (found.energy(R) <= 1.6 * truth).all(), found.energy(R) / truth
    assert (R.norm(dim=1) > 3 * truth).all()  # what the residual alone says


def test_a_node_above_the_smallest_eigenvalue_is_no_bound():
    """What the bound rests on: with μ twenty times too large it says less than the truth."""
    A, V = system(1e3, p=80)
    X, R, found = searched(A, V, 12, 20.0)
    assert float(found.energy(R)) < float(energies(A, X, V))


def test_values_are_off_by_less_than_their_bound():
    A, V = system(1e3, p=80, queries=3)
    A, lowest = 1e-4 * A, 1e-4
    G = torch.randn(10, 80, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 2 * V[:1]
    for steps in (2, 6, 12):
        X, R, found = searched(A, V, steps, lowest)
        off = ((torch.linalg.solve(A, V.T).T - X) @ G.T).norm(dim=1)
        energy = found.energy(R)
        bound = of_values(G, X, R, V, energy, lowest)
        assert (off <= bound).all()
        plain = torch.linalg.matrix_norm(G, 2) * energy / lowest**0.5
        assert (bound <= plain * (1 + 1e-12)).all()
        assert (bound < 0.9 * plain).any()  # what G has of the images of all x is known


def network(criterion=torch.nn.functional.cross_entropy, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    X, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    return uw.explain(model, X, y, loss=criterion, **settings), X[:3], y[:3]


@pytest.mark.parametrize("preconditioner", [None, Preconditioned(uw.operators.EKFAC())])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_certificate_states_bounds_that_hold(preconditioner, queries):
    exact, X, y = network(curvature=uw.operators.GaussNewton(), damping=0.01, solver=uw.solvers.Cholesky())
    solver = CG(rtol=1e-9, settled=0.2, preconditioner=preconditioner)
    influence, _, _ = network(curvature=uw.operators.GaussNewton(), damping=0.01, solver=solver)
    S = exact.system.solve(uw_gradients(exact, X[:queries], y[:queries])).x
    truth, scores = exact.on_loss(X[:queries], y[:queries]), influence.on_loss(X[:queries], y[:queries])
    certificate = scores.certificate
    missed = np.linalg.norm(scores.values - truth.values, axis=1) / np.linalg.norm(scores.values, axis=1)
    assert (missed > 1e-7).all()
    assert (missed <= certificate.settled_bound).all()  # all 40 rows are followed
    gradients = uw_gradients(influence, *influence_rows(influence)).norm(dim=1).numpy()
    off = np.abs(scores.values - truth.values)
    assert (off <= np.abs(scores.scale) * gradients * certificate.error_bound[:, None]).all()
    found = influence.system.solve(uw_gradients(influence, X[:queries], y[:queries]))
    assert ((found.x - S).norm(dim=1) <= found.error_bound).all()
    assert "proven: " in str(certificate)


def uw_gradients(influence, X, y):
    from upweight.model import per_row

    return per_row.gradients(influence.system.sweep.over(influence.objective, influence.system.encoded(X, y)))


def influence_rows(influence):
    return influence.system.examples.x, influence.system.examples.y


def test_what_is_known_of_the_smallest_eigenvalue():
    def known(criterion=torch.nn.functional.cross_entropy, damping=0.0, **settings):
        return lowest_eigenvalue(network(criterion, **settings)[0].operator, damping)

    newton = uw.operators.GaussNewton()
    assert known(curvature=newton) is None
    assert known(curvature=newton, damping=0.1) == pytest.approx(0.1)
    assert known(curvature=newton, damping=0.1, penalty=0.02) == pytest.approx(0.12)
    assert known(curvature=uw.operators.GaussNewton(keep=0), damping=0.1) == pytest.approx(0.1)
    assert known(curvature=uw.operators.EmpiricalFisher(), damping=0.1) == pytest.approx(0.1)
    assert known(curvature=uw.operators.Hessian(), damping=0.1) is None  # it may bend downwards
    assert known(curvature=newton, damping=0.1, penalty=lambda theta: 0.1 * theta["0.weight"].cos().sum()) is None

    def wavy(f, y):
        return f[torch.arange(len(y)), y].cos().mean()

    assert known(wavy, curvature=newton, damping=0.1) is None  # not convex in the outputs

    def wavy_in_one_row(f, y):
        return torch.nn.functional.cross_entropy(f, y) - 9 * ((y == 3) * f.square().sum(1)).mean()

    X = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, some = torch.arange(200) % 3, [row for row in range(200) if row != 101]
    y[101] = 3  # the one row in which it bends
    for rows, found in ((slice(None), None), (some, pytest.approx(0.1))):
        settings = {"loss": wavy_in_one_row, "curvature": newton, "damping": 0.1}
        influence = uw.explain(torch.nn.Linear(4, 4).double(), X[rows], y[rows], **settings)
        assert lowest_eigenvalue(influence.operator, 0.1) == found
    matrix = uw.operators.DenseOperator(torch.eye(2))
    assert lowest_eigenvalue(matrix, 0.1) is None


def test_a_hessian_that_may_bend_downwards_gets_no_bound():
    influence, X, y = network(curvature=uw.operators.Hessian(), damping=2.0, solver=CG(rtol=1e-9, settled=0.3))
    with pytest.warns(uw.errors.TheoryWarning, match="not at a minimum"):
        certificate = influence.on_loss(X, y).certificate
    assert certificate.settled is not None
    assert certificate.settled_bound is certificate.error_bound is None
    assert "proven" not in str(certificate)
