"""Figure 4, the RBF half: what helps an RBF kernel machine recognise a fish is what lies close to it in pixels.

Dogs against fish, 900 + 900 training and 300 + 300 test photographs (Imagenette's springers and tenches, not the
paper's own), pixels scaled to [−1, 1]. They are 224 × 224 and the paper's 299 × 299; nearest-neighbour enlargement only
repeats pixels, so distances between enlarged photographs are weighted distances between small ones. The kernel
exp(−γ‖a − b‖²) of all 2,400 photographs, γ = 0.05/1800, is factorised, K = F Fᵀ; the rows of F are features on which a
linear SVM is the kernel SVM. Hinge loss, L2 0.001, no intercept; influence with SmoothHinge(0.001). The query is the
correctly classified test fish whose margin is nearest 0.990, the margin of the paper's test image. No photograph is
drawn here: they are ImageNet's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

import upweight as uw
from paper import report

L2, T, GAMMA, MARGIN, SHOWN = 0.001, 0.001, 0.05 / 1800, 0.990, 5
SMALL, LARGE = 224, 299  # pixels on a side: here, and in the paper


def compute(per_class: int = 900) -> dict[str, Any]:
    """Figure 4, RBF: values of all training photographs against their pixel distance from the query."""
    data = uw.datasets.dogfish()
    rows = np.flatnonzero(np.concatenate([np.arange(900) < per_class] * 2))
    y, yq = data.labels[rows].astype(int), data.test_labels.astype(int)
    images = np.concatenate([data.images[rows], data.test_images]).reshape(len(rows) + len(yq), -1)
    squares = squared_distances(images)
    features, jitter = factor(np.exp(-GAMMA * squares))
    F, Fq = features[: len(y), : len(y)], features[len(y) :, : len(y)]
    model = LinearSVC(
        loss="hinge", C=1 / (len(y) * L2), fit_intercept=False, tol=1e-8, max_iter=1_000_000, random_state=24
    ).fit(F, y)
    margins = (2 * yq - 1) * model.decision_function(Fq)
    fish = np.flatnonzero((yq == 1) & (margins > 0))
    query = int(fish[np.argmin(np.abs(margins[fish] - MARGIN))])
    influence = uw.explain(model, F, y, loss=uw.losses.smooth_hinge(T), penalty_per_example=True)
    scores = influence.on_loss(Fq[query : query + 1], yq[query : query + 1])
    values, distances = scores.values[0], np.sqrt(squares[len(y) + query, : len(y)])
    helpful, harmful = scores.helpful(20).rows[0], scores.harmful(20).rows[0]
    train_margins = (2 * y - 1) * model.decision_function(F)
    same, active = y == 1, train_margins < 1 + 10 * T  # the other rows have no gradient but the penalty's share
    correlation = scipy.stats.spearmanr(np.abs(values), distances)[0]
    near = distances <= np.quantile(distances, 0.1)
    numbers = {
        "distance_correlation": correlation,
        "distance_correlation_of_fish": scipy.stats.spearmanr(np.abs(values[same]), distances[same])[0],
        "distance_correlation_of_dogs": scipy.stats.spearmanr(np.abs(values[~same]), distances[~same])[0],
        "query": query,
        "query_margin": margins[query],
        "test_accuracy": float((margins > 0).mean()),
        "train_accuracy": float((train_margins > 0).mean()),
        "share_of_fish_among_20_most_helpful": same[helpful].mean(),
        "share_of_fish_among_20_most_harmful": same[harmful].mean(),
        "rows_with_a_gradient": int(active.sum()),
        "distance_correlation_of_rows_with_a_gradient": scipy.stats.spearmanr(
            np.abs(values[active]), distances[active]
        )[0],
        "mean_value_of_near_fish": values[same & near].mean(),
        "mean_value_of_near_dogs": values[~same & near].mean(),
        "mean_value_of_far_fish": values[same & ~near].mean(),
        "mean_value_of_far_dogs": values[~same & ~near].mean(),
        "largest_value": values.max(),
        "nearest_distance": distances.min(),
        "farthest_distance": distances.max(),
        "median_distance": np.median(distances),
        "median_distance_of_20_most_helpful": np.median(distances[helpful]),
        "jitter": jitter,
    }
    numbers |= {f"helpful_{place + 1}": int(row) for place, row in enumerate(helpful[:SHOWN])}
    settings = {
        "n": len(y),
        "p": F.shape[1],
        "l2": L2,
        "gamma": GAMMA,
        "t": T,
        "photographs": "Imagenette, springers (0) and tenches (1), pixels in [−1, 1]; 224 × 224, enlarged to 299 × 299 "
        "by nearest neighbour",
        "rows": "dogs first, then fish, each in the order of their file names",
        "query": "the correctly classified test fish whose margin is nearest 0.990; indices of test rows",
        "fit": "LinearSVC(loss='hinge', fit_intercept=False, tol=1e-8) on Cholesky features, float64",
        "penalty_per_example": True,
        "near": "the tenth of all training rows that is nearest to the query",
        "distance": "Euclidean, unsquared, in pixels of [−1, 1]",
    }
    arrays = {"value": values, "distance": distances, "fish": same, "helpful": helpful}
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def squared_distances(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """‖a − b‖² of all pairs of photographs in [−1, 1] pixels, as if enlarged to 299 × 299 by repeating pixels."""
    repeats = np.bincount(((np.arange(LARGE) + 0.5) * SMALL / LARGE).astype(int), minlength=SMALL)
    weights = np.sqrt(np.repeat(np.outer(repeats, repeats).ravel(), 3))
    gram = np.zeros((len(images), len(images)))
    for start in range(0, images.shape[1], 4096):
        block = (images[:, start : start + 4096] / 127.5 - 1) * weights[start : start + 4096]
        gram += block @ block.T
    norms = np.diagonal(gram)
    squares = np.maximum(norms[:, None] + norms - 2 * gram, 0)
    np.fill_diagonal(squares, 0)
    return squares


def factor(kernel: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """F with K = F Fᵀ, and what had to be added to the diagonal: 0 unless two photographs are the same."""
    for jitter in (0.0, 1e-10, 1e-8, 1e-6):
        try:
            return np.linalg.cholesky(kernel + jitter * np.eye(len(kernel))), jitter
        except np.linalg.LinAlgError:
            continue
    message = "The kernel matrix is not positive definite, even with 1e-6 on its diagonal."
    raise ValueError(message)


def draw(result: dict[str, Any]) -> Figure:
    """Value against distance, one dot per training photograph."""
    arrays, numbers = result["arrays"], result["numbers"]
    fish, x = np.array(arrays["fish"], dtype=bool), np.array(arrays["distance"])
    y = 1e3 * np.array(arrays["value"])
    figure, (ax,) = report.canvas(1, 6.4, 4.4)
    ax.axhline(0, color=report.GREY, linewidth=0.8, zorder=1)
    for who, color, label in ((fish, report.BLUE, "fish, as the query"), (~fish, report.ORANGE, "dog")):
        ax.scatter(x[who], y[who], s=14, alpha=0.6, color=color, linewidth=0, label=label, zorder=2)
    top = np.array(arrays["helpful"])[:SHOWN]
    ax.scatter(
        x[top], y[top], s=52, facecolor="none", edgecolor=report.INK, linewidth=1.1, zorder=3, label="five most helpful"
    )
    report.style(ax, title="RBF SVM: influence fades with pixel distance")
    report.note(
        ax,
        f"Spearman of |value| and distance −{-numbers['distance_correlation']:.3f}\n"
        f"test accuracy {100 * numbers['test_accuracy']:.1f} %, query's margin {numbers['query_margin']:.3f}",
        x=0.33,
    )  # fmt: skip
    ax.set(xlabel="Euclidean distance in pixels of [−1, 1]", ylabel="change of the query's loss if removed (10⁻³)")
    ax.legend(frameon=False, fontsize=9, loc="lower right", handletextpad=0.2, labelcolor=report.INK)
    return figure


if __name__ == "__main__":
    report.run("fig4_rbf", compute, draw)
