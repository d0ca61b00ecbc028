"""Figure 2, right: the 100 rows with the largest |value| really removed from a convolutional network.

2,616 parameters, tanh, n = 5,500, L2 0.001 on weights, damping 0.01; the query is MNIST's test image 6558, a 6. The
authors take 500,000 steps of Adam, to a point that is no minimum, and 30,000 more for each removed row; `--literal`
does that, which is days on a CPU. The settings for a CPU: some thousand steps of Adam, then L-BFGS on all rows in
metrics of the curvature, which ends lower but at no minimum either; and for each removed row gradient descent from θ̂
for a time of 1/damping, in ten linearly implicit steps on all other rows. The control takes the same steps with all
rows and is subtracted. The penalty's share goes with a row. What is finished is kept in ~/.cache/upweight/paper, so an
interrupted run goes on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor
from torch.nn.functional import cross_entropy

import upweight as uw
from paper import cnn, report
from upweight.model.sweep import Sweep
from upweight.operators import DenseOperator

QUERY, DAMPING = 6_558, 0.01
HESSIAN = uw.operators.Hessian()
DAMPINGS, MORE = (0.001, 0.01, 0.1), 0.1
TRAIN = cnn.Adam(5_500, 3e-3, (3_300, 4_675))
LITERAL = cnn.Adam(500_000, 1e-4, (110_000, 220_000))
LITERAL_AGAIN = cnn.Adam(30_000, 1e-6, ())
GOAL = 1e-6  # ‖∇R‖ of the fit
AGAIN, LENGTH = 10, 10.0  # steps of one retraining and their length: gradient descent for a time of 1/damping
HALFWAY = (2, 5)
ROUNDS = 12
LOWEST, TRIES = 8, 6  # how many of the exact curvature's lowest eigenvalues are looked for, and steps of the search


@dataclass(frozen=True)
class Written:
    """A curvature that was computed elsewhere."""

    matrix: DenseOperator = field(repr=False)

    def bind(self, sweep: Sweep) -> DenseOperator:  # noqa: ARG002
        """The same matrix, whatever the rows."""
        return self.matrix


def compute(
    rows: int = 5_500, removed: int = 100, rounds: int = ROUNDS, hard: int = 800, literal: bool = False
) -> dict[str, Any]:
    """Figure 2 right: predicted and actual change of one test loss for the rows that matter most to a CNN."""
    train, test = cnn.data(rows)
    query = cnn.Rows(test.X[[QUERY]], test.y[[QUERY]])
    file = report.progress_file("fig2_right", {"rows": rows, "rounds": rounds, "hard": hard, "literal": literal})
    theta, moments, how = trained(train, file.with_suffix(""), rounds, hard, literal)
    H, G = curvatures(theta, train, hard, file.with_suffix(""))
    curvature = uw.operators.GaussNewton()
    every = {f"hessian_{damping:g}": predicted(theta, train, query, H, damping, HESSIAN) for damping in (DAMPING, MORE)}
    every |= {
        f"gauss_newton_{damping:g}": predicted(theta, train, query, G, damping, curvature) for damping in DAMPINGS
    }
    exact, damped = every[f"hessian_{DAMPING:g}"], every[f"gauss_newton_{DAMPING:g}"]
    assert damped is not None
    scores = damped if exact is None else exact
    chosen = np.argsort(-np.abs(scores.values[0]), kind="stable")[:removed]
    again = partial(further_by_adam, theta, moments, file.with_suffix("")) if literal else partial(further, theta, H)
    losses = retrained(partial(again, train, query), chosen, file)
    outcomes = [
        uw.Outcomes(at[None, :-1] - at[-1], at[-1:] - loss_of(theta, query), chosen, "loss", scores.query_values)
        for at in losses.T
    ]
    numbers = compared(scores, outcomes[-1], every) | described(theta, train, test) | lowest_curvatures(theta, train, H)
    numbers |= {
        "query_loss": loss_of(theta, query),
        "residual": scores.certificate.residual.max(),
        "cg_met_no_negative_curvature": exact is not None,
    }
    newton, leverage = newton_steps(theta, train, query, H, chosen)
    numbers |= {
        "pearson_newton": np.corrcoef(newton, outcomes[-1].actual[0])[0, 1],
        "slope_newton": np.polyfit(newton, outcomes[-1].actual[0], 1)[0],
        "median_leverage": np.median(leverage),
        "largest_leverage": leverage.max(),
    }
    for step in HALFWAY:
        if step < len(outcomes):
            numbers[f"pearson_after_{step}_steps"] = uw.agreement(scores, outcomes[step - 1]).pearson
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
        "fit": how,
        "retrain": f"{LITERAL_AGAIN}, from the fit's moments"
        if literal
        else f"from θ̂, {AGAIN} linearly implicit steps of gradient descent of length {LENGTH:g}, "
        "θ ← θ − (|H| + I/length)⁻¹∇R, on all rows but one; the control on all rows",
        "seconds": "of this run; training and retraining are kept from earlier runs, if there were any",
    }
    arrays = {
        "rows": chosen,
        "predicted": scores.values[0, chosen],
        "gauss_newton": damped.values[0, chosen],
        "newton": newton,
        "leverage": leverage,
        "actual": outcomes[-1].actual[0],
        "losses": losses,
        "theta": theta,
    }
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def trained(train: cnn.Rows, folder: Path, rounds: int, hard: int, literal: bool) -> tuple[Tensor, Any, str]:
    """θ̂, Adam's moments, and how it was trained, in words."""
    folder.mkdir(parents=True, exist_ok=True)
    first = LITERAL if literal else TRAIN
    theta, moments = first.train(cnn.flat(cnn.untrained()), train, folder / "adam.pt")
    if literal:
        return theta, moments, f"{LITERAL}, float32"
    fit = cnn.Fit.resumed(theta, folder / "fit.pt")
    fit.refine(train, rounds, hard, GOAL)
    how = f"{TRAIN}, then L-BFGS on all rows, {fit.gradients} gradients in {fit.rounds} metrics, float32"
    return fit.theta, moments, how


def curvatures(theta: Tensor, train: cnn.Rows, hard: int, folder: Path) -> list[DenseOperator]:
    """Nearly the Hessian, which makes a metric, and Gauss–Newton; the folder keeps them."""
    file = folder / "curvatures.pt"
    if not file.exists():
        torch.save([cnn.near_hessian(theta, train, hard), cnn.gauss_newton(theta, train)], file)
    return [DenseOperator(matrix) for matrix in torch.load(file, weights_only=True)]


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
    curvature: uw.operators.Curvature,
) -> uw.Scores | None:
    """The values by a curvature of the library; None if it is not positive with this damping. `near` preconditions."""
    solver = uw.solvers.CG(rtol=1e-4, preconditioner=uw.solvers.Preconditioned(Written(near)))
    try:
        return explained(theta, train, curvature=curvature, solver=solver, damping=damping).on_loss(query.X, query.y)
    except uw.errors.NotPositiveDefinite as error:
        print(error, flush=True)
        return None


def further(theta: Tensor, H: DenseOperator, train: cnn.Rows, query: cnn.Rows, row: int | None) -> list[float]:
    """The query's loss after every step of training on without a row, or with all rows.

    θ ← θ − (|H| + I/τ)⁻¹ ∇R: linearly implicit steps of gradient descent of length τ, the same for every row.
    """
    losses = []
    for _ in range(AGAIN):
        _, gradient = cnn.risk(theta, train, row)
        theta = theta - H.map(lambda x: 1 / (x.abs() + 1 / LENGTH), gradient[None])[0]
        losses.append(loss_of(theta, query))
    return losses


def further_by_adam(
    theta: Tensor, moments: Any, folder: Path, train: cnn.Rows, query: cnn.Rows, row: int | None
) -> list[float]:
    """The query's loss after 30,000 more steps of Adam, from its moments, on the rows that are left."""
    kept = torch.tensor([other for other in range(train.n) if other != row])
    file = folder / "again.pt"
    after, _ = LITERAL_AGAIN.train(theta, cnn.Rows(train.X[kept], train.y[kept]), file, state=moments)
    file.unlink(missing_ok=True)
    return [loss_of(after, query)]


def retrained(again: Callable[..., list[float]], chosen: NDArray[np.int64], file: Path) -> NDArray[np.float64]:
    """The query's losses on the way, a line for each row, and a last line for the control. `file` keeps them."""
    done = json.loads(file.read_text()) if file.exists() else {}
    for row in [None, *chosen.tolist()]:
        if str(row) not in done:
            done[str(row)] = again(row=row)
            file.write_text(json.dumps(done))
            print(f"{len(done)} of {len(chosen) + 1} trained on", flush=True)
    return np.array([done[str(row)] for row in [*chosen.tolist(), None]])


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


def newton_steps(
    theta: Tensor, train: cnn.Rows, query: cnn.Rows, H: DenseOperator, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """∇f · (|H| + λI − Gᵢ/n)⁻¹ ∇Lᵢ/n for each row, and the row's leverage: its Gauss–Newton curvature Gᵢ goes with it.

    With UᵀU = Gᵢ/n and A = U (|H| + λI)⁻¹ Uᵀ, by Woodbury's identity; the leverage is A's largest eigenvalue.
    """
    network = cnn.at(theta, train.X.dtype)
    query_gradient = cnn.risk(theta, query)[1] - cnn.strengths() * theta
    values, leverages = [], []
    for row in chosen:
        one = cnn.Rows(train.X[[row]], train.y[[row]])
        U = torch.cat(list(cnn.square_roots(network, one.X))).double() / train.n**0.5
        sides = torch.cat([cnn.risk(theta, one)[1][None] / train.n, U])
        solved = H.map(lambda x: 1 / (x.abs() + DAMPING), sides)
        A = U @ solved[1:].T
        rest = torch.linalg.solve(torch.eye(len(A), dtype=torch.float64) - A, U @ solved[0])
        values.append(float(query_gradient @ (solved[0] + solved[1:].T @ rest)))
        leverages.append(float(torch.linalg.eigvalsh(A)[-1]))
    return np.array(values), np.array(leverages)


def lowest_curvatures(theta: Tensor, train: cnn.Rows, near: DenseOperator) -> dict[str, Any]:
    """The lowest eigenvalues of the exact Hessian, by LOBPCG from the lowest eigenvectors of `near`.

    They are values on a subspace: the smallest is an upper bound of λmin, and at least as many eigenvalues of the
    Hessian are negative as of them.
    """
    exact = explained(theta, train, curvature=HESSIAN).operator
    draw = torch.randn(LOWEST, near.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = near.map(lambda x: (torch.arange(len(x)) < LOWEST).double(), draw)

    def by(product: Callable[[Tensor], Tensor]) -> LinearOperator:
        def apply(columns: NDArray[np.float64]) -> NDArray[np.float64]:
            return product(torch.from_numpy(columns.reshape(near.size, -1).T.copy())).T.numpy()

        return LinearOperator((near.size, near.size), matvec=apply, matmat=apply, dtype=np.float64)  # type: ignore[call-arg]

    preconditioner = by(lambda V: near.map(lambda x: 1 / x.abs().clamp(min=cnn.FLOOR), V))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it has not converged, and need not: see above
        values, _ = lobpcg(by(exact.apply), start.T.numpy(), M=preconditioner, largest=False, maxiter=TRIES, tol=1e-4)
    return {"smallest_eigenvalue_at_most": values.min(), "negative_eigenvalues_at_least": (values < 0).sum()}


def draw(result: dict[str, Any]) -> Figure:
    """Predicted against actual with the damped Hessian, with Gauss–Newton, and by the Newton step of each removal."""
    numbers, arrays = result["numbers"], result["arrays"]
    figure, axes = report.canvas(3, 13.6, 4.5, sharey=True)
    damping = f"{result['settings']['damping']:g}"
    panels = (
        (f"Hessian, damping {damping}", "predicted", "", report.BLUE),
        (f"Gauss–Newton, damping {damping}", "gauss_newton", f"_gauss_newton_{damping}", report.GREY),
        ("Newton step of the removal", "newton", "_newton", report.ORANGE),
    )
    for ax, (title, key, suffix, color) in zip(axes, panels, strict=True):
        report.predicted_against_actual(ax, arrays[key], arrays["actual"], color=color)
        report.style(ax, title=title)
        report.note(ax, f"Pearson {numbers['pearson' + suffix]:.3f}\nslope {numbers['slope' + suffix]:.2f}")
        ax.set_xlabel("predicted change of the test loss (10⁻³ nats)")
    axes[0].set_ylabel("actual change, trained on (10⁻³ nats)")
    return figure


if __name__ == "__main__":
    report.run("fig2_right", compute, draw)
