"""Figure 2, left: the 500 rows with the largest |value| really removed from a ten-class logistic regression.

n = 55,000 digits, p = 7,840, L2 0.01, no intercept; the query is MNIST's test image 8, a misclassified 5. Every one of
the 500 models is trained again by Newton's method, to a gradient of 1e-6 of one row's; the penalty of a row goes with
it, as in the paper. Twenty models are trained side by side, for they share every pass over the data: 20 × 10 columns
make one matrix product. Finished retrainings are kept in ~/.cache/upweight/paper, so an interrupted run goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import upweight as uw
from paper import digits, report

CLASSES = 10
SIDE_BY_SIDE = 20
RTOL, MOST_STEPS = 1e-6, 30


def compute(rows: int = 55_000, removed: int = 500) -> dict[str, Any]:
    """Figure 2 left: predicted and actual change of one test loss for the rows that matter most."""
    data = digits.ten_classes()
    X, y = data.X[:rows], data.y[:rows]
    query = slice(digits.QUERY, digits.QUERY + 1)
    on = (data.test_X[query], data.test_y[query])
    model = digits.logistic(X, y)
    influence = uw.explain(model, X, y, solver=uw.solvers.Cholesky(), penalty_per_example=True)
    scores = influence.on_loss(*on)
    chosen = np.argsort(-np.abs(scores.values[0]), kind="stable")[:removed]
    progress = report.progress_file("fig2_left", {"rows": rows, "removed": removed})
    actual, control = retrained(influence, on, chosen, progress)
    newton = influence.of_removing(chosen, on=on)
    outcomes = uw.Outcomes(actual[None], np.array([control]), chosen, "loss", scores.query_values)
    first, step = uw.agreement(scores, outcomes), uw.agreement(newton, outcomes)
    numbers = {
        "n_removed": removed,
        "pearson": first.pearson,
        "slope": first.slope,
        "pearson_newton": step.pearson,
        "slope_newton": step.slope,
        "largest_error": np.abs(scores.values[0, chosen] - actual).max(),
        "largest_error_newton": np.abs(newton.values[0] - actual).max(),
        "largest_change": np.abs(actual).max(),
        "control_drift": control,
        "query_loss": scores.query_values[0],  # type: ignore[index]
        "gradient_norm": scores.certificate.gradient_norm,
        "residual": scores.certificate.residual.max(),
        "test_accuracy": model.score(data.test_X, data.test_y),
    }
    settings = {
        "n": rows,
        "p": influence.objective.size,
        "l2": digits.L2,
        "test_index": digits.QUERY,
        "removed": f"the {removed} rows with the largest |value|",
        "solver": repr(influence.solver),
        "retrain": f"Newton's method with the curvature at θ̂, to a gradient of {RTOL:g} of one row's, {SIDE_BY_SIDE} "
        "models side by side, float64",
        "penalty_per_example": True,
        "fit": "LogisticRegression, L-BFGS, tol 1e-10, no intercept, float64",
    }
    progress.unlink()
    arrays = {"rows": chosen, "predicted": scores.values[0, chosen], "newton": newton.values[0], "actual": actual}
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def retrained(
    influence: uw.Influence, on: Any, chosen: NDArray[np.int64], file: Path
) -> tuple[NDArray[np.float64], float]:
    """The actual changes, block by block, and the control's drift; `file` keeps what is finished."""
    done = json.loads(file.read_text()) if file.exists() else {}
    control = trained_without(influence, [None])[0]
    drift = 0.0
    for start in range(0, len(chosen), SIDE_BY_SIDE):
        block = [row for row in chosen[start : start + SIDE_BY_SIDE].tolist() if str(row) not in done]
        if block or start == 0:
            fitted = dict(zip(block, trained_without(influence, block), strict=True))

            def retrain(weights: NDArray[np.float64], seed: int, fitted: dict[int, Any] = fitted) -> torch.Tensor:  # noqa: ARG001
                left_out = np.flatnonzero(weights == 0)
                return fitted[int(left_out[0])] if len(left_out) else control

            outcomes = uw.leave_one_out(influence, on, block or chosen[:1], retrain if block else lambda *_: control)
            done |= {str(row): value for row, value in zip(block, outcomes.actual[0].tolist(), strict=False)}
            drift = float(outcomes.control[0])
            file.write_text(json.dumps(done))
            print(f"{len(done)} of {len(chosen)} models trained again", flush=True)
    return np.array([done[str(row)] for row in chosen]), drift


def trained_without(influence: uw.Influence, left_out: list[int | None]) -> list[torch.Tensor]:
    """The minimum θ without each of these rows (None leaves none out), all found in the same passes over the data.

    Newton's method from θ̂ with the curvature at θ̂; a model is done when its gradient is 1e-6 of one row's.
    """
    if not left_out:
        return []
    X, y = (leaf.numpy() for leaf in influence.examples.batch(slice(None)))
    n, k = len(X), len(left_out)
    typical = np.sqrt((X[:256] ** 2).sum(1).mean()) / n
    theta = influence.objective.theta.repeat(k, 1)
    active = np.arange(k)
    for _ in range(MOST_STEPS):
        gradient = gradients(theta[active].numpy(), X, y, [left_out[place] for place in active])
        left = np.linalg.norm(gradient, axis=1) > RTOL * typical
        active, gradient = active[left], gradient[left]
        if not len(active):
            return list(theta)
        theta[active] -= influence.prepared.solve(torch.from_numpy(gradient)).x
    message = (
        f"{len(active)} models have not converged in {MOST_STEPS} steps; ‖∇R‖/row = {gradient.max() / typical:.2g}."
    )
    raise RuntimeError(message)


def gradients(
    theta: NDArray[np.float64], X: NDArray[np.float64], y: NDArray[np.int64], left_out: list[int | None]
) -> NDArray[np.float64]:
    """∇R of each model, (k, p): (1/n)(Σⱼ ∇Lⱼ − ∇Lᵢ) + (1 − 1/n) λθ with row i left out."""
    k, n = len(theta), len(X)
    W = theta.reshape(k * CLASSES, -1)

    def slopes(X: NDArray[np.float64], y: NDArray[np.int64], W: NDArray[np.float64]) -> NDArray[np.float64]:
        """Softmax less the label, (b, models · classes)."""
        P = np.exp(X @ W.T).reshape(len(X), -1, CLASSES)
        P /= P.sum(2, keepdims=True)
        P[np.arange(len(X)), :, y] -= 1
        return P.reshape(len(X), -1)

    total = np.zeros_like(W)
    for start in range(0, n, 5000):
        part = slice(start, start + 5000)
        total += slopes(X[part], y[part], W).T @ X[part]
    total = total.reshape(k, CLASSES, -1)
    for model, row in enumerate(left_out):
        if row is not None:
            own = W[model * CLASSES : (model + 1) * CLASSES]
            total[model] -= np.outer(slopes(X[[row]], y[[row]], own)[0], X[row])
    share = np.array([1.0 if row is None else 1 - 1 / n for row in left_out])
    return total.reshape(k, -1) / n + share[:, None] * digits.L2 * theta


def draw(result: dict[str, Any]) -> Figure:
    """Predicted against actual to first order and by the Newton step of each removal, and the errors of both."""
    numbers, arrays = result["numbers"], result["arrays"]
    actual = np.array(arrays["actual"])
    figure, axes = report.canvas(3, 13.6, 4.5)
    panels = (
        ("First order (equation 2)", "predicted", "pearson", "slope", report.BLUE),
        ("Newton step of the removal", "newton", "pearson_newton", "slope_newton", report.ORANGE),
    )
    for ax, (title, key, pearson, slope, color) in zip(axes, panels, strict=False):
        report.predicted_against_actual(ax, arrays[key], actual, color=color)
        report.style(ax, title=title)
        report.note(ax, f"Pearson {numbers[pearson]:.7f}\nslope {numbers[slope]:.4f}")
        ax.set_xlabel("predicted change of the test loss (10⁻³ nats)")
        name = "first order" if key == "predicted" else "Newton step"
        error = 1e6 * (actual - np.array(arrays[key]))
        axes[2].scatter(1e3 * actual, error, s=14, alpha=0.7, color=color, linewidth=0, label=name)
    axes[0].set_ylabel("actual change, retrained (10⁻³ nats)")
    axes[2].axhline(0, color=report.GREY, linewidth=0.8, zorder=1)
    axes[2].set(xlabel="actual change, retrained (10⁻³ nats)", ylabel="actual − predicted (10⁻⁶ nats)")
    axes[2].legend(frameon=False, fontsize=9, loc="lower right", handletextpad=0.1, labelcolor=report.INK)
    axes[2].set_box_aspect(1)
    report.style(axes[2], title="What is left")
    return figure


if __name__ == "__main__":
    report.run("fig2_left", compute, draw)
