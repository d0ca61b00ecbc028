"""Equations 1 to 5 against the derivative of the re-solved minimum: catches any sign, 1/n, penalty or transpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
import oracles
from tolerances import ARGMIN_INPUT, ARGMIN_PARAMS

ROWS = [0, 7, 19]
MEANINGS = [False, True]
SOLVERS = ["direct", "cg"]


@pytest.fixture(
    scope="module",
    params=[(name, folded) for name in cases.NAMES for folded in MEANINGS],
    ids=lambda p: f"{p[0]}-{'folded' if p[1] else 'fixed'}",
)
def case(request):
    return cases.make(request.param[0], folded=request.param[1], weighted=True)


@pytest.fixture(scope="module")
def moved(case):
    """How the re-solved minimum moves as the weight of each of `ROWS` grows."""
    return torch.stack([oracles.params_when_weight_grows(case.problem, case.theta, row) for row in ROWS])


def close(ours, theirs, rtol):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) < rtol


def test_equation_1(case, moved):
    close(case.influence().on_params(ROWS), moved, ARGMIN_PARAMS)


def test_equation_2_and_the_sign_and_size_of_removal(case, moved):
    slopes = torch.stack(
        [oracles.gradient(lambda t, q=q: case.query_loss(t)[q], case.theta) for q in range(len(case.yq))]
    )
    truth = slopes @ moved.T
    scores = case.influence().on_loss(case.Xq.numpy(), case.yq.numpy())
    close(scores.derivative[:, ROWS], truth, ARGMIN_PARAMS)
    close(scores.values[:, ROWS], -truth * case.problem.weights[ROWS] / case.n, ARGMIN_PARAMS)


def test_a_measure_other_than_the_loss(case, moved):
    def first_output(params, example):
        return case.model.output(params, example[0])[0]

    slopes = torch.stack(
        [oracles.gradient(lambda t, x=x: case.model.output(case.model.split(t), x)[0], case.theta) for x in case.Xq]
    )
    scores = case.influence().on_measure(first_output, case.Xq.numpy(), case.yq.numpy())
    close(scores.derivative[:, ROWS], slopes @ moved.T, ARGMIN_PARAMS)


def test_equation_3_on_parameters_and_losses(case):
    """Weight ε moves from a row to a new example: the new one enters as an extra row."""
    row, x_new, y_new = ROWS[1], case.Xq[0], case.yq[1]
    n, weights = case.n, case.problem.weights

    def solved(change):
        X, y = torch.cat([case.X, x_new[None]]), torch.cat([case.y, y_new[None]])
        w = torch.cat([weights, torch.zeros(1, dtype=torch.float64)])
        w[row], w[-1] = w[row] - change, change
        # the extra row must not change the 1/n: scale the mean back
        problem = replace(case.problem, X=X, y=y, weights=w * (n + 1) / n, original_weight=float(w.sum()) * (n + 1) / n)
        return oracles.argmin(problem, case.theta)

    truth = n * oracles.derivative(solved)
    influence = case.influence()
    close(influence.on_params_of_replacing([row], x_new[None].numpy(), y_new[None].numpy())[0], truth, ARGMIN_PARAMS)
    slope = oracles.gradient(lambda t: case.query_loss(t)[2], case.theta)
    on = (case.Xq[2:3].numpy(), case.yq[2:3].numpy())
    scores = influence.of_replacing([row], x_new[None].numpy(), y_new[None].numpy(), on=on)
    close(scores.derivative, (slope @ truth).reshape(1, 1), ARGMIN_PARAMS)
    close(scores.values, (slope @ truth * weights[row] / n).reshape(1, 1), ARGMIN_PARAMS)


def test_relabelling_is_equation_3_with_the_same_input(case):
    rows, labels = ROWS, case.y[[5, 6, 8]]
    influence = case.influence()
    on = tuple(array.numpy() for array in case.queries)
    relabelled = influence.of_relabeling(rows, labels.numpy(), on=on)
    replaced = influence.of_replacing(rows, case.X[rows].numpy(), labels.numpy(), on=on)
    np.testing.assert_allclose(relabelled.values, replaced.values, rtol=1e-12, atol=1e-15)


def test_equations_4_and_5(case):
    row = ROWS[2]
    draw = torch.Generator().manual_seed(8)
    direction = torch.randn(case.X[row].shape, generator=draw, dtype=torch.float64)
    truth = oracles.params_when_input_moves(case.problem, case.theta, row, direction)  # carries wᵢ/n
    influence = case.influence()
    share = float(case.problem.weights[row]) / case.n
    close(influence.on_params_of_perturbing([row], direction[None].numpy())[0] * share, truth, ARGMIN_INPUT)
    slope = oracles.gradient(lambda t: case.query_loss(t)[1], case.theta)
    field = influence.of_perturbing([row], on=(case.Xq[1:2].numpy(), case.yq[1:2].numpy()))
    assert field.shape == (1, 1, *case.X[row].shape)
    close((field[0, 0] * direction.numpy()).sum(), slope @ truth, ARGMIN_INPUT)


def test_adding_an_example(case):
    x_new, y_new = case.Xq[3], case.yq[3]
    n, weights = case.n, case.problem.weights

    def solved(change):
        X, y = torch.cat([case.X, x_new[None]]), torch.cat([case.y, y_new[None]])
        w = torch.cat([weights, torch.full((1,), change, dtype=torch.float64)])
        problem = replace(
            case.problem, X=X, y=y, weights=w * (n + 1) / n, original_weight=float(weights.sum()) * (n + 1) / n
        )
        return oracles.argmin(problem, case.theta)

    truth = n * oracles.derivative(solved)
    slope = oracles.gradient(lambda t: case.query_loss(t)[0], case.theta)
    scores = case.influence().of_adding(
        x_new[None].numpy(), y_new[None].numpy(), on=(case.Xq[:1].numpy(), case.yq[:1].numpy())
    )
    close(scores.derivative, (slope @ truth).reshape(1, 1), ARGMIN_PARAMS)
    close(scores.values, (slope @ truth / n).reshape(1, 1), ARGMIN_PARAMS)


def test_self_influence(case):
    self_scores = case.influence().of_self(ROWS)
    scores = case.influence().on_loss(case.X[ROWS].numpy(), case.y[ROWS].numpy())
    np.testing.assert_allclose(self_scores.values, scores.values[range(3), ROWS], rtol=1e-9)
    np.testing.assert_allclose(self_scores.derivative, scores.derivative[range(3), ROWS], rtol=1e-9)


@pytest.mark.parametrize("name", cases.LINEAR)
@pytest.mark.parametrize("folded", MEANINGS)
def test_removing_rows_by_their_newton_step_is_closer_to_the_refit_than_first_order(name, folded):
    case = cases.make(name, folded=folded, weighted=True)
    influence = case.influence()
    on = tuple(array.numpy() for array in case.queries)
    groups = [[0], [7, 8], [19, 20, 21, 22]]
    newton, first = influence.of_removing(groups, on=on).values, influence.of_groups(groups, on=on).values
    truth = torch.stack(
        [
            case.query_loss(oracles.without_rows(case.problem, case.theta, group)) - case.query_loss(case.theta)
            for group in groups
        ],
        1,
    ).numpy()
    assert np.linalg.norm(newton - truth) < 0.5 * np.linalg.norm(first - truth)
