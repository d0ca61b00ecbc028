"""Figure 2, middle: the same removals predicted by LiSSA's stochastic estimate, with its standard errors.

The model, the query and the 500 retrained rows of fig2_left (whose JSON is read). LiSSA takes scale 25, depth 5,000,
batches of one row drawn with replacement, ten repeats, and no damping beyond the penalty in H. A standard error comes
from the spread of the repeats, so it holds the noise and not the bias that 5,000 steps leave in flat directions, up to
(1 − 0.01/25)^5000 = 13.5 %. z = (LiSSA − exact) / standard error, with the exact value from CG.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import upweight as uw
from paper import digits, report

SOLVER = uw.solvers.LiSSA(scale=25.0, depth=5000, batch_size=1, repeats=10, seed=17)
TOP = 100


def compute(left: str = str(report.RESULTS / "fig2_left.json")) -> dict[str, Any]:
    """Figure 2 middle: LiSSA's predictions for the rows that fig2_left retrained."""
    done = json.loads(Path(left).read_text())
    chosen, actual = np.array(done["arrays"]["rows"]), np.array(done["arrays"]["actual"])
    data = digits.ten_classes()
    rows = done["settings"]["n"]
    X, y = data.X[:rows], data.y[:rows]
    on = data.test_X[[digits.QUERY]], data.test_y[[digits.QUERY]]
    model = digits.logistic(X, y)

    def values(solver: Any) -> uw.Scores:
        print(solver, flush=True)
        return uw.explain(model, X, y, solver=solver, penalty_per_example=True).on_loss(*on)

    exact, ten, one = (values(solver) for solver in (uw.solvers.CG(rtol=1e-8), SOLVER, replace(SOLVER, repeats=1)))
    truth, mean, single, noise = exact.values[0], ten.values[0], one.values[0], ten.standard_error[0]  # type: ignore[index]
    z = np.abs(mean - truth) / noise
    numbers = {
        "pearson": np.corrcoef(mean[chosen], actual)[0, 1],
        "repeats": SOLVER.repeats,
        "max_z": z[chosen].max(),
        "median_z": np.median(z[chosen]),
        "max_z_of_all_rows": z.max(),
        "slope": np.polyfit(mean[chosen], actual, 1)[0],
        "pearson_with_exact": np.corrcoef(mean[chosen], truth[chosen])[0, 1],
        "pearson_with_exact_of_all_rows": np.corrcoef(mean, truth)[0, 1],
        "median_relative_standard_error": np.median(noise[chosen] / np.abs(truth[chosen])),
        "pearson_of_one_repeat": np.corrcoef(single[chosen], actual)[0, 1],
        "top_100_found": found(mean, truth),
        "top_100_found_by_one_repeat": found(single, truth),
        "truncation": ten.certificate.truncation,
        "residual": ten.certificate.residual.max(),
        "converged": ten.certificate.converged,
        "residual_of_exact": exact.certificate.residual.max(),
        "difference_of_exact_from_fig2_left": np.abs(truth[chosen] - done["arrays"]["predicted"]).max(),
    }
    settings = {
        "n": rows,
        "p": len(model.coef_) * X.shape[1],
        "l2": digits.L2,
        "test_index": digits.QUERY,
        "solver": repr(SOLVER),
        "damping": 0,
        "draws": "single rows, uniformly with replacement",
        "exact": repr(uw.solvers.CG(rtol=1e-8)),
        "rows": "those of fig2_left",
    }
    arrays = {
        "rows": chosen,
        "predicted": mean[chosen],
        "standard_error": noise[chosen],
        "one_repeat": single[chosen],
        "exact": truth[chosen],
        "actual": actual,
    }
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def found(estimate: NDArray[np.float64], truth: NDArray[np.float64]) -> int:
    """How many of the 100 rows of largest |truth| are among the 100 of largest |estimate|."""
    first, second = (np.argsort(-np.abs(line), kind="stable")[:TOP] for line in (estimate, truth))
    return len(np.intersect1d(first, second))


def draw(result: dict[str, Any]) -> Figure:
    """Ten repeats with error bars of two standard errors, and one repeat."""
    numbers, arrays = result["numbers"], result["arrays"]
    figure, axes = report.canvas(2, 9.2, 4.7, sharex=True, sharey=True)
    report.predicted_against_actual(axes[1], arrays["one_repeat"], arrays["actual"], color=report.ORANGE)
    report.predicted_against_actual(axes[0], arrays["predicted"], arrays["actual"])
    axes[0].errorbar(
        1e3 * np.array(arrays["predicted"]),
        1e3 * np.array(arrays["actual"]),
        xerr=2e3 * np.array(arrays["standard_error"]),
        fmt="none",
        ecolor=report.BLUE,
        alpha=0.35,
        linewidth=0.7,
        zorder=1.5,
    )
    low = min(min(arrays[key]) for key in ("predicted", "one_repeat", "actual"))
    high = max(max(arrays[key]) for key in ("predicted", "one_repeat", "actual"))
    ends = 1e3 * (np.array([low, high]) + 0.06 * (high - low) * np.array([-1, 1]))
    axes[0].set(xlim=ends, ylim=ends)
    report.style(axes[0], title="LiSSA, ten repeats (± 2 standard errors)")
    report.style(axes[1], title="LiSSA, one repeat")
    report.note(axes[0], f"Pearson {numbers['pearson']:.4f}\n{numbers['top_100_found']} of the true top 100 found")
    report.note(
        axes[1],
        f"Pearson {numbers['pearson_of_one_repeat']:.4f}\n"
        f"{numbers['top_100_found_by_one_repeat']} of the true top 100 found",
    )
    for ax in axes:
        ax.set_xlabel("predicted change of the test loss (10⁻³ nats)")
    axes[0].set_ylabel("actual change, retrained (10⁻³ nats)")
    return figure


if __name__ == "__main__":
    report.run("fig2_mid", compute, draw)
