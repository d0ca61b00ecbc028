"""Figure 3: a hinge-loss SVM explained through a smooth hinge, and 100 of its rows really removed.

Linear SVM without intercept on ones against sevens, n = 11,800, L2 0.01, trained by liblinear on the hinge. The weights
stay; influence is computed with SmoothHinge(t) = t log(1 + exp((1 − s)/t)) at t = 0 (the hinge itself, whose curvature
is 0, so H = 0.01 I), 0.001 and 0.1. The 100 rows with the largest |value| at t = 0 are removed, the SVM is trained
again from scratch at the same penalty per row, and the raw hinge loss of the query is compared.

At t = 0 the result depends on a convention: the fit leaves about 64 rows exactly on the corner of the hinge, where its
slope is anything from −1 to 0, and which side rounding puts them on is decided by liblinear's tolerance. The Pearson
with all of them taken as outside (slope 0) and as inside (slope −1) is reported beside the one that falls out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

import upweight as uw
from paper import digits, report

TEMPERATURES = (0.0, 0.001, 0.1)
QUERY = 1597  # of the ones and sevens; MNIST's test image 7432, a 7 that the SVM takes for a 1
TOLERANCE = 1e-6  # the paper's
CORNER = 1e-4  # margins within this of 1 are on the corner


def compute(rows: int = 11_800, removed: int = 100) -> dict[str, Any]:
    """Figure 3: predicted change under three smoothings against the actual change of the hinge loss."""
    data = digits.ones_and_sevens()
    X, y = data.X[:rows], data.y[:rows]
    on = data.test_X[QUERY : QUERY + 1], data.test_y[QUERY : QUERY + 1]
    model = svm(X, y)
    values = {t: influence(model, X, y, t).on_loss(*on).values[0] for t in TEMPERATURES}
    before = hinge(model, *on)

    @cache
    def removing(row: int) -> float:
        return hinge(svm(np.delete(X, row, 0), np.delete(y, row)), *on) - before

    def top(line: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        chosen = np.argsort(-np.abs(line), kind="stable")[:removed]
        return chosen, np.array([removing(row) for row in chosen.tolist()])

    chosen, actual = top(values[0.0])
    sides = {}
    for side, corner in (("outside", -CORNER), ("inside", CORNER)):
        line = influence(model, X, y, 0.0, corner=corner).on_loss(*on).values[0]
        others, changes = top(line)
        sides[f"pearson_t0_corner_rows_{side}"] = np.corrcoef(line[others], changes)[0, 1]
    margins = (2 * y - 1) * model.decision_function(X)
    numbers: dict[str, Any] = {f"pearson_t{t:g}": np.corrcoef(values[t][chosen], actual)[0, 1] for t in TEMPERATURES}
    numbers |= {f"slope_t{t:g}": np.polyfit(values[t][chosen], actual, 1)[0] for t in TEMPERATURES}
    numbers |= {f"largest_predicted_t{t:g}": np.abs(values[t][chosen]).max() for t in TEMPERATURES}
    numbers |= sides
    numbers |= {
        "n_removed": removed,
        "largest_actual": np.abs(actual).max(),
        "query_hinge": before,
        "rows_on_the_corner": int((np.abs(margins - 1) < CORNER).sum()),
        "rows_inside_the_margin": int((margins < 1 - CORNER).sum()),
        "rows_that_count_as_inside": int((margins < 1).sum()),
    }
    settings = {
        "n": rows,
        "p": X.shape[1],
        "l2": digits.L2,
        "query": f"test image {QUERY} of the ones and sevens (MNIST's test image 7432), a 7 taken for a 1",
        "temperatures": list(TEMPERATURES),
        "removed": f"the {removed} rows with the largest |value| at t = 0, the same in all panels",
        "fit": f"LinearSVC(loss='hinge', fit_intercept=False, tol={TOLERANCE:g}, max_iter=5000, random_state=24), "
        "float64",
        "penalty_per_example": True,
        "actual": "change of the raw hinge loss after fitting the other rows from scratch, C = 1/((n − 1)·0.01)",
    }
    arrays = {"rows": chosen, "actual": actual} | {f"predicted_t{t:g}": values[t][chosen] for t in TEMPERATURES}
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def svm(X: NDArray[np.float64], y: NDArray[np.int64]) -> LinearSVC:
    """Mean hinge + (0.01/2)‖θ‖²."""
    return LinearSVC(
        loss="hinge", C=1 / (len(X) * digits.L2), fit_intercept=False, tol=TOLERANCE, max_iter=5000,
        random_state=24,
    ).fit(X, y)  # fmt: skip


def influence(
    model: LinearSVC, X: NDArray[np.float64], y: NDArray[np.int64], t: float, corner: float = 0.0
) -> uw.Influence:
    """The SVM's weights under SmoothHinge(t); at t = 0, margins below 1 + corner have the slope −1."""
    if not corner:
        loss = uw.losses.smooth_hinge(t) if t else uw.losses.hinge
        return uw.explain(model, X, y, loss=loss, penalty_per_example=True)
    loss = replace(uw.losses.hinge, slope=hinge_slope(corner))

    def one(params: dict[str, torch.Tensor], example: Any) -> torch.Tensor:
        return loss(params["coef"] @ example[0], example[1])

    objective = uw.Objective(
        one,
        {"coef": torch.from_numpy(model.coef_)},
        penalty=digits.L2,
        penalty_per_example=True,
        linear=uw.Linear(loss, 1, X.shape[1], intercept=False),
    )
    return uw.Influence(objective, (X, y))


def hinge_slope(corner: float) -> Any:
    """∂/∂η of max(0, 1 − sη), with the corner at a margin of 1 + `corner`."""

    def slope(eta: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sign = 2 * y.reshape(eta.shape).to(eta.dtype) - 1
        return -sign * (sign * eta < 1 + corner).to(eta.dtype)

    return slope


def hinge(model: LinearSVC, X: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """The raw hinge loss of one query."""
    return float(max(0.0, 1 - (2 * y[0] - 1) * model.decision_function(X)[0]))


def smooth_hinge(s: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """The loss of a margin s, for panel (a)."""
    return np.maximum(0, 1 - s) if t == 0 else t * np.logaddexp(0, (1 - s) / t)


def draw(result: dict[str, Any]) -> Figure:
    """The losses, and predicted against actual under each."""
    numbers, arrays = result["numbers"], result["arrays"]
    figure, axes = report.canvas(4, 15.2, 3.9)
    s = np.linspace(0.8, 1.2, 201)
    shades = {0.0: report.INK, 0.001: report.BLUE, 0.01: report.GREY, 0.1: report.ORANGE}
    for t, color in shades.items():
        line = "--" if t == 0.001 else "-"
        label = "hinge (t = 0)" if t == 0 else f"t = {t:g}"
        axes[0].plot(
            s, smooth_hinge(s, t), line, color=color, linewidth=1.8, label=label, zorder=3 if t == 0.001 else 2
        )
    axes[0].set(xlabel="margin s", ylabel="SmoothHinge(s, t)")
    axes[0].legend(frameon=False, fontsize=8.5, labelcolor=report.INK)
    axes[0].set_box_aspect(1)
    report.style(axes[0], title="The losses")
    for ax, t in zip(axes[1:], TEMPERATURES, strict=True):
        report.predicted_against_actual(ax, arrays[f"predicted_t{t:g}"], arrays["actual"], color=shades[t], equal=t > 0)
        title = "Influence under the hinge (t = 0)" if t == 0 else f"Under the smooth hinge, t = {t:g}"
        report.style(ax, title=title)
        ax.set_box_aspect(1)
        report.note(ax, f"Pearson {numbers[f'pearson_t{t:g}']:.3f}\nslope {numbers[f'slope_t{t:g}']:.3f}")
        ax.set_xlabel("predicted change of the test loss (10⁻³)")
    axes[1].set_ylabel("actual change of the hinge loss (10⁻³)")
    return figure


if __name__ == "__main__":
    report.run("fig3", compute, draw)
