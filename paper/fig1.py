"""Figure 1: what the training loss and H⁻¹ contribute to influence, on ones against sevens.

Logistic regression without intercept, n = 11,894, p = 784, L2 0.01; the query is the 30th test image, a 7. All numbers
are −I_up,loss = n × the change of the query's loss when the row is removed. The three variants leave out parts of

    −I_up,loss = g_queryᵀ H⁻¹ gᵢ        gᵢ = −yᵢ σ(−yᵢ θᵀxᵢ) xᵢ + 0.01 θ

no train loss: −yᵢ xᵢ in place of gᵢ (the σ and the penalty's share are gone); no H: the identity in place of H⁻¹, and
gᵢ without the penalty's share, as in the paper's section 2.3 (with it, a constant 0.01 g_queryᵀθ is added to all rows,
which carries rows of almost no gradient across 0; `crossed_rows_with_penalty_share` counts them).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import upweight as uw
from paper import digits, report

QUERY = 30
HARMFUL_RANK = 4  # the paper shows the fifth most harmful seven


def compute(rows: int = 11_894) -> dict[str, Any]:
    """Figure 1: full influence against three variants that leave parts of it out."""
    data = digits.ones_and_sevens()
    X, y = data.X[:rows], data.y[:rows]
    on = data.test_X[QUERY : QUERY + 1], data.test_y[QUERY : QUERY + 1]
    model = digits.logistic(X, y)
    miss = model.predict_proba(X)[np.arange(len(X)), 1 - y]  # σ(−yθᵀx), the train loss' part of a row's gradient
    n = len(X)

    def influence(curvature: Any, *, folded: bool) -> np.ndarray:
        given = uw.explain(model, X, y, curvature=curvature, penalty_per_example=folded)
        return n * given.on_loss(*on).values[0]

    full = influence(uw.operators.Hessian(), folded=True)
    no_loss = influence(uw.operators.Hessian(), folded=False) / miss
    no_hessian = influence(uw.operators.Identity(), folded=False)
    with_share = influence(uw.operators.Identity(), folded=True)
    neither = no_hessian / miss

    same = y == on[1]
    harmful = np.flatnonzero(same)[np.argsort(full[same], kind="stable")[HARMFUL_RANK]]
    large = np.abs(no_loss) >= np.quantile(np.abs(no_loss), 0.9)
    numbers = {
        "labels_separated_without_hessian": bool((no_hessian[same] > 0).all() and (no_hessian[~same] < 0).all()),
        "crossed_rows_with_penalty_share": int((np.sign(with_share) != np.where(same, 1, -1)).sum()),
        "penalty_share_without_hessian": np.median(with_share - no_hessian),
        "harmful_same_label_rows": int((full[same] < 0).sum()),
        "harmful_same_label_rows_by_loss_alone": int((no_loss[same] < 0).sum()),
        "same_label_rows": int(same.sum()),
        "helpful_other_label_rows": int((full[~same] > 0).sum()),
        "overestimated_rows": int((large & (np.abs(full) < 0.01 * np.abs(full).max())).sum()),
        "rows_with_large_value_without_loss": int(large.sum()),
        "pearson_without_loss": np.corrcoef(full, no_loss)[0, 1],
        "pearson_without_hessian": np.corrcoef(full, no_hessian)[0, 1],
        "pearson_without_both": np.corrcoef(full, neither)[0, 1],
        "lowest_without_loss": no_loss.min(),
        "highest_without_loss": no_loss.max(),
        "lowest_without_hessian": no_hessian.min(),
        "highest_without_hessian": no_hessian.max(),
        "lowest_without_both": neither.min(),
        "highest_without_both": neither.max(),
        "harmful_row": int(harmful),
        "harmful_value": full[harmful],
    }
    settings = {
        "n": n,
        "p": X.shape[1],
        "l2": digits.L2,
        "query": "test image 30 of the ones and sevens (MNIST's test image 111), a 7",
        "unit": "−I_up,loss = n × change of the query's loss in nats",
        "overestimated": "rows among the tenth with the largest |value| without train loss whose full |value| is below "
        "1 % of the largest",
    }
    arrays = {
        "same_label": same,
        "full": [f"{value:.4g}" for value in full],
        "no_loss": [f"{value:.4g}" for value in no_loss],
        "no_hessian": [f"{value:.4g}" for value in no_hessian],
        "neither": [f"{value:.4g}" for value in neither],
        "query_image": (255 * on[0][0]).round().astype(int),
        "harmful_image": (255 * X[harmful]).round().astype(int),
    }
    arrays |= {key: np.array(arrays[key], dtype=float) for key in ("full", "no_loss", "no_hessian", "neither")}
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def draw(result: dict[str, Any]) -> Figure:
    """Three scatter panels, and the two images."""
    arrays, numbers = result["arrays"], result["numbers"]
    same = np.array(arrays["same_label"], dtype=bool)
    full = np.array(arrays["full"])
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 0.42])
    axes = [figure.add_subplot(grid[:, column]) for column in range(3)]
    panels = (
        ("No train loss", "no_loss", f"{numbers['overestimated_rows']:,} rows overestimated"),
        ("No H⁻¹", "no_hessian", f"the sign is the label, but\n{numbers['harmful_same_label_rows']:,} of "
         f"{numbers['same_label_rows']:,} sevens are harmful"),
        ("Neither", "neither", f"Pearson with full {numbers['pearson_without_both']:.2f}"),
    )  # fmt: skip
    order = np.random.default_rng(0).permutation(len(full))  # neither colour is always on top
    colors = np.where(same, report.BLUE, report.ORANGE)
    for ax, (title, key, text) in zip(axes, panels, strict=True):
        ax.axhline(0, color=report.GREY, linewidth=0.8, zorder=1)
        ax.axvline(0, color=report.GREY, linewidth=0.8, zorder=1)
        x = np.array(arrays[key])
        ax.scatter(x[order], full[order], s=7, c=colors[order], alpha=0.55, linewidth=0, zorder=2)
        report.style(ax, title=title)
        report.note(ax, text)
        ax.set_xlabel("$-I_{\\mathrm{up,loss}}$ with that part left out (nats)")
        ax.set_ylim(full.min() - 0.1 * np.ptp(full), full.max() + 0.3 * np.ptp(full))  # room for the words
    axes[0].set_ylabel("$-I_{\\mathrm{up,loss}}$ in full (nats)")
    for label, color in (("training 7, as the query", report.BLUE), ("training 1", report.ORANGE)):
        axes[0].scatter([], [], s=22, color=color, label=label)
    axes[0].legend(frameon=False, fontsize=8.5, loc="lower right", handletextpad=0.1, labelcolor=report.INK)
    for line, (title, key) in enumerate((("query", "query_image"), ("harmful 7", "harmful_image"))):
        ax = figure.add_subplot(grid[line, 3])
        ax.imshow(np.array(arrays[key]).reshape(28, 28), cmap="Greys", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_color(report.GREY)
        ax.set_title(title, fontsize=9.5, color=report.INK)
    return figure


if __name__ == "__main__":
    report.run("fig1", compute, draw)
