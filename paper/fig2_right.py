"""Figure 2, right: the 100 rows with the largest |value| really removed from a convolutional network.

2,616 parameters, tanh, n = 5,500, L2 0.001 on weights, damping 0.01; the query is MNIST's test image 6558, a 6. The
authors take 500,000 steps of Adam to a point that is no minimum, and 30,000 more for each removed row. Here the network
is trained to a minimum: Adam for some thousands of steps, then L-BFGS on all rows in a metric from the curvature; each
removed row is followed to the minimum without it in the metric of the exact Hessian. `--literal` takes the authors'
own steps, which is days on a CPU. The penalty's share goes with a row, and the control, trained again with all rows in
the same way, is subtracted. What is finished is kept in ~/.cache/upweight/paper, so an interrupted run goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

import upweight as uw
from paper import cnn, report
from upweight.operators import DenseOperator
from upweight.sweep import Sweep

QUERY, DAMPING = 6_558, 0.01
HESSIAN = uw.operators.Hessian()
OTHER_DAMPINGS = (0.001, 0.1)
TRAIN = cnn.Adam(5_500, 3e-3, (3_300, 4_675))
LITERAL = cnn.Adam(500_000, 1e-4, (110_000, 220_000))
LITERAL_AGAIN = cnn.Adam(30_000, 1e-6, ())
OF_ONE_ROW = 1e-3  # a retraining ends when ‖∇R‖ is this share of the removed row's own part of it
GOAL = 1e-6  # ‖∇R‖ of the fit
MOST = 40  # steps of one retraining
ROUNDS = 6
LOWEST = 16  # directions in which the exact curvature is looked at


@dataclass(frozen=True)
class Written:
    """A curvature that was computed elsewhere."""

    matrix: DenseOperator = field(repr=False)

    def bind(self, sweep: Sweep) -> DenseOperator:  # noqa: ARG002
        """The same matrix, whatever the rows."""
        return self.matrix


def compute(
    rows: int = 5_500, removed: int = 100, rounds: int = ROUNDS, hard: int = 1_500, literal: bool = False
) -> dict[str, Any]:
    """Figure 2 right: predicted and actual change of one test loss for the rows that matter most to a CNN."""
    train, test = cnn.data(rows)
    query = cnn.Rows(test.X[[QUERY]], test.y[[QUERY]])
    file = report.progress_file("fig2_right", {"rows": rows, "rounds": rounds, "hard": hard, "literal": literal})
    theta, moments = trained(train, file.with_suffix(""), rounds, hard, literal)
    H, G = (DenseOperator(C) for C in (cnn.near_hessian(theta, train, hard), cnn.gauss_newton(theta, train)))
    metric = cnn.Metric(H)
    values = {damping: predicted(theta, train, query, H, damping) for damping in (DAMPING, *OTHER_DAMPINGS)}
    gauss_newton = predicted(theta, train, query, G, DAMPING, uw.operators.GaussNewton())
    assert gauss_newton is not None
    positive = values[DAMPING]
    scores = gauss_newton if positive is None else positive
    chosen = np.argsort(-np.abs(scores.values[0]), kind="stable")[:removed]
    if literal:
        again = partial(steps_of_adam, theta, moments, train, file.with_suffix(""))
    else:
        again = partial(minimum_without, theta, metric, train)
    told = retrained(again, chosen, query, metric, train, theta, file)
    control, before = told[-1][0], loss_of(theta, query)
    outcomes = uw.Outcomes(
        told[None, :-1, 0] - control, np.array([control - before]), chosen, "loss", scores.query_values
    )
    numbers = compared(
        scores, outcomes, {f"damping_{key:g}": value for key, value in values.items()} | {"gauss_newton": gauss_newton}
    )
    numbers |= (
        described(theta, train, test)
        | lowest_curvatures(theta, train, H)
        | {
            "query_loss": before,
            "hessian_damped_is_positive": values[DAMPING] is not None,
            "residual": scores.certificate.residual.max(),
            "largest_remaining_gradient": told[:, 1].max(),
            "largest_remaining_step": np.abs(told[:-1, 2] / outcomes.actual[0]).max(),
            "gradients_per_retraining": told[:, 3].mean(),
        }
    )
    settings = {
        "n": rows,
        "p": cnn.PARAMETERS,
        "l2": cnn.L2,
        "l2_on": "weights, not biases",
        "damping": DAMPING,
        "test_index": QUERY,
        "curvature": scores.certificate.curvature,
        "removed": f"the {removed} rows with the largest |value|",
        "penalty_per_example": True,
        "literal": literal,
        "fit": repr(LITERAL)
        if literal
        else f"{TRAIN}, then {rounds} rounds of {cnn.STEPS} steps of L-BFGS on all rows, float32",
        "retrain": repr(LITERAL_AGAIN)
        if literal
        else "L-BFGS from θ̂ on all rows but one in the metric of the Hessian at θ̂, to a gradient of "
        f"{OF_ONE_ROW:g} of the row's",
    }
    arrays = {
        "rows": chosen,
        "predicted": scores.values[0, chosen],
        "gauss_newton": gauss_newton.values[0, chosen],
        "actual": outcomes.actual[0],
    }
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def trained(train: cnn.Rows, folder: Path, rounds: int, hard: int, literal: bool) -> tuple[Tensor, Any]:
    """θ̂, and Adam's moments."""
    folder.mkdir(parents=True, exist_ok=True)
    first = LITERAL if literal else TRAIN
    theta, moments = first.train(cnn.flat(cnn.untrained()), train, folder / "adam.pt")
    return (theta if literal else cnn.refined(theta, train, rounds, hard, GOAL, folder / "refined.pt")), moments


def explained(theta: Tensor, train: cnn.Rows, **settings: Any) -> uw.Influence:
    """The library's view of the network, in float32."""
    strengths = {name: cnn.L2 for name, _ in cnn.Network().named_parameters() if name.endswith("weight")}
    objective = uw.Objective.from_module(
        cnn.at(theta), cross_entropy, penalty=uw.L2(strengths), penalty_per_example=True
    )
    return uw.Influence(objective, (train.X, train.y), batch_size=cnn.CHUNK, **settings)


def predicted(
    theta: Tensor,
    train: cnn.Rows,
    query: cnn.Rows,
    near: DenseOperator,
    damping: float,
    curvature: uw.operators.Curvature = HESSIAN,
) -> uw.Scores | None:
    """The values by a curvature of the library; None if it is not positive with this damping. `near` preconditions."""
    solver = uw.solvers.CG(rtol=1e-4, preconditioner=uw.solvers.Preconditioned(Written(near)))
    try:
        return explained(theta, train, curvature=curvature, solver=solver, damping=damping).on_loss(query.X, query.y)
    except uw.errors.NotPositiveDefinite as error:
        print(error, flush=True)
        return None


def minimum_without(theta: Tensor, metric: cnn.Metric, train: cnn.Rows, row: int | None, goal: float) -> cnn.Found:
    """The minimum without a row, or with all of them, from θ̂."""
    return cnn.descend(lambda theta: cnn.risk(theta, train, row), theta, metric, goal, MOST)


def steps_of_adam(
    theta: Tensor,
    moments: Any,
    train: cnn.Rows,
    folder: Path,
    row: int | None,
    goal: float,  # noqa: ARG001
) -> cnn.Found:
    """30,000 more steps of Adam, from its moments, on the rows that are left."""
    kept = torch.tensor([other for other in range(train.n) if other != row])
    left = cnn.Rows(train.X[kept], train.y[kept])
    file = folder / "again.pt"
    after, _ = LITERAL_AGAIN.train(theta, left, file, state=moments)
    file.unlink(missing_ok=True)
    value, gradient = cnn.risk(after, train, row)
    return cnn.Found(after, value, gradient, LITERAL_AGAIN.steps)


def retrained(
    again: Any,
    chosen: NDArray[np.int64],
    query: cnn.Rows,
    metric: cnn.Metric,
    train: cnn.Rows,
    theta: Tensor,
    file: Path,
) -> NDArray[np.float64]:
    """For each row, and last for all rows: the query's loss, what is left of ‖∇R‖ as a share of the row's own part,
    what a Newton step from there would add to the loss, and the gradients it took. `file` keeps what is finished."""
    done = json.loads(file.read_text()) if file.exists() else {}
    sizes = {row: row_size(theta, train, row) for row in chosen.tolist()}
    for row in [*chosen.tolist(), None]:
        if str(row) in done:
            continue
        size = min(sizes.values()) if row is None else sizes[row]
        found = again(row, OF_ONE_ROW * size)
        step = metric.scaled(found.gradient, -1.0)
        ahead = loss_of(found.theta - step, query) - loss_of(found.theta, query)
        done[str(row)] = [loss_of(found.theta, query), found.norm / size, ahead, found.calls]
        file.write_text(json.dumps(done))
        print(f"{len(done)} of {len(chosen) + 1}: row {row}, loss {done[str(row)]}", flush=True)
    return np.array([done[str(row)] for row in [*chosen.tolist(), None]])


def row_size(theta: Tensor, train: cnn.Rows, row: int) -> float:
    """The norm of one row's part of ∇R, with its share of the penalty."""
    _, own = cnn.risk(theta, cnn.Rows(train.X[[row]], train.y[[row]]))
    return float(own.norm()) / train.n


def loss_of(theta: Tensor, query: cnn.Rows) -> float:
    """The query's loss in float64."""
    with torch.no_grad():
        return float(cross_entropy(cnn.at(theta, torch.float64)(query.X.double()), query.y))


def compared(scores: uw.Scores, outcomes: uw.Outcomes, others: dict[str, uw.Scores | None]) -> dict[str, Any]:
    """How well predictions and outcomes agree, by the scores of the figure and by others."""
    first = uw.agreement(scores, outcomes)
    numbers = {
        "n_removed": len(outcomes.rows),
        "pearson": first.pearson,
        "slope": first.slope,
        "control_drift": outcomes.control[0],
        "spearman": first.spearman,
        "largest_change": np.abs(outcomes.actual).max(),
        "control_drift_over_median_change": abs(outcomes.control[0]) / np.median(np.abs(outcomes.actual)),
    }
    for name, other in others.items():
        if other is not None:
            told = uw.agreement(other, outcomes)
            numbers |= {f"pearson_{name}": told.pearson, f"slope_{name}": told.slope}
    return numbers


def described(theta: Tensor, train: cnn.Rows, test: cnn.Rows) -> dict[str, Any]:
    """The fit."""
    value, gradient = cnn.risk(theta, train)
    network = cnn.at(theta)

    def accuracy(rows: cnn.Rows) -> float:
        with torch.no_grad():
            return float((network(rows.X).argmax(1) == rows.y).double().mean())

    return {
        "train_accuracy": accuracy(train),
        "test_accuracy": accuracy(test),
        "risk": value,
        "gradient_norm": gradient.norm(),
    }


def lowest_curvatures(theta: Tensor, train: cnn.Rows, near: DenseOperator) -> dict[str, Any]:
    """Eigenvalues of the exact Hessian on the span of the lowest eigenvectors of `near`.

    The smallest is an upper bound of λmin, and at least as many eigenvalues are negative as of these.
    """
    operator = explained(theta, train, curvature=HESSIAN).operator
    draw = torch.randn(LOWEST, near.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spans = near.map(lambda x: (torch.arange(len(x)) < LOWEST).double(), draw)
    V = torch.linalg.qr(spans.T)[0].T.contiguous()
    told = torch.linalg.eigvalsh(V @ operator.apply(V).T)
    return {"smallest_eigenvalue_at_most": told[0], "negative_eigenvalues_at_least": (told < -1e-6).sum()}


def draw(result: dict[str, Any]) -> Figure:
    """Predicted against actual with the damped Hessian and with Gauss–Newton."""
    numbers, arrays = result["numbers"], result["arrays"]
    figure, axes = report.canvas(2, 9.2, 4.7, sharey=True)
    panels = (
        ("Hessian", "predicted", "", report.BLUE),
        ("Gauss–Newton", "gauss_newton", "_gauss_newton", report.ORANGE),
    )
    for ax, (title, key, suffix, color) in zip(axes, panels, strict=True):
        report.predicted_against_actual(ax, arrays[key], arrays["actual"], color=color)
        report.style(ax, title=f"{title}, damping {result['settings']['damping']:g}")
        report.note(ax, f"Pearson {numbers['pearson' + suffix]:.3f}\nslope {numbers['slope' + suffix]:.2f}")
        ax.set_xlabel("predicted change of the test loss (10⁻³ nats)")
    axes[0].set_ylabel("actual change, retrained (10⁻³ nats)")
    return figure


if __name__ == "__main__":
    report.run("fig2_right", compute, draw)
