"""Figure 4: an RBF kernel machine looks at what lies near in pixels; a pretrained network does not.

Dogs against fish, 900 + 900 training and 300 + 300 test photographs (Imagenette's springers and tenches, not the
paper's own), pixels scaled to [−1, 1]. They are 224 × 224 and the paper's 299 × 299; nearest-neighbour enlargement only
repeats pixels, so distances between enlarged photographs are weighted distances between small ones.

RBF SVM   The kernel exp(−γ‖a − b‖²) of all 2,400 photographs, γ = 0.05/1800, is factorised, K = F Fᵀ; the rows of F are
          features on which a linear SVM is the kernel SVM. Hinge loss, L2 0.001, no intercept; influence with
          SmoothHinge(0.001).
Network   A frozen pretrained network and binary logistic regression on its features, L2 0.001, no intercept.

The query that is drawn is the test fish whose RBF margin is nearest 0.990, the margin of the paper's test image, among
those that all models classify correctly; correlations are also averaged over all test photographs that the RBF machine
and the network classify correctly. No photograph is drawn here: they are ImageNet's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from torch import nn

import upweight as uw
from paper import networks, report

L2, T, GAMMA, MARGIN, SHOWN, TOP = 0.001, 0.001, 0.05 / 1800, 0.990, 5, 20
SMALL, LARGE = 224, 299  # pixels on a side: here, and in the paper
NAMES = {
    "squeezenet": "SqueezeNet 1.1",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "inception_v3_nsfwjs": "Inception v3 (nsfwjs)",
    "inception_v3_torchvision": "Inception v3",
}


def compute(
    per_class: int = 900,
    per_class_test: int = 300,
    nets: str = "efficientnet_lite0,squeezenet,inception_v3_nsfwjs",
) -> dict[str, Any]:
    """Figure 4: values of all training photographs against their pixel distance from the query, by model."""
    data = uw.datasets.dogfish()
    rows = np.flatnonzero(np.concatenate([np.arange(900) < per_class] * 2))
    asked = np.flatnonzero(np.concatenate([np.arange(300) < per_class_test] * 2))
    images, y = data.images[rows], data.labels[rows].astype(int)
    queries, yq = data.test_images[asked], data.test_labels[asked].astype(int)
    squares = squared_distances(np.concatenate([images, queries]).reshape(len(y) + len(yq), -1))
    apart = np.sqrt(squares[len(y) :, : len(y)])
    machine, F, jitter = kernel_machine(squares, y)
    margins = (2 * y - 1) * uw.predict(machine, F[: len(y)]).outputs[:, 0]
    found = {"rbf": uw.apps.understand(machine, (F[len(y) :], yq), k=SHOWN)}
    for name in nets.split(","):
        found[name] = uw.apps.understand(headed(name, images, y), (np.moveaxis(queries, -1, 1), yq), k=SHOWN)
    found = {name: replace(each, distances=apart) for name, each in found.items()}  # of pixels, for every model
    first = nets.split(",")[0]
    right = {name: each.predicted == yq for name, each in found.items()}
    both = right["rbf"] & right[first]
    fish = np.flatnonzero((yq == 1) & np.logical_and.reduce(list(right.values())))
    query = int(fish[np.argmin(np.abs(found["rbf"].outputs[fish, 0] - MARGIN))])
    pair = uw.apps.side_by_side({"rbf": found["rbf"], "network": found[first]})
    numbers: dict[str, Any] = {
        "queries": int(both.sum()),
        "query": query,
        "agreement_of_values": float(np.nanmean(pair.agreement[both])),
        "shared_of_20_most_helpful": float(np.mean(np.nan_to_num(pair.shared(TOP)[both]))),  # none where nothing helps
        "nearest_distance": apart[query].min(),
        "farthest_distance": apart[query].max(),
        "jitter": jitter,
    }
    active = margins < 1 + 10 * T  # the other rows have no gradient but the penalty's share
    numbers["train_rows_with_a_gradient"] = int(active.sum())
    numbers["rbf_distance_correlation_of_rows_with_a_gradient"] = scipy.stats.spearmanr(
        np.abs(found["rbf"].scores.values[query, active]), apart[query, active]
    )[0]
    arrays: dict[str, Any] = {"distance": apart[query], "fish": y == 1}
    near = apart[query] <= np.quantile(apart[query], 0.1)
    for name, each in found.items():
        prefix = "rbf" if name == "rbf" else "network" if name == first else name
        known = each.locality[both]
        known = known[np.isfinite(known)]  # a hinge far inside its margin has no gradient, and all its values are 0
        numbers |= _numbers(prefix, each, query, y, near) | {
            f"{prefix}_distance_correlation": known.mean(),
            f"{prefix}_queries_with_values": len(known),
            f"{prefix}_distance_correlation_of_the_query": each.locality[query],
            f"{prefix}_test_right": int(right[name].sum()),
            f"{prefix}_output_of_the_query": each.outputs[query, 0],
        }
        arrays |= {f"{prefix}_value": each.scores.values[query], f"{prefix}_locality": known}
    settings = {
        "n": len(y),
        "l2": L2,
        "gamma": GAMMA,
        "t": T,
        "network": first,
        "networks": nets,
        "photographs": "Imagenette, springers (0) and tenches (1), pixels in [−1, 1]; 224 × 224, for the RBF machine "
        "and all distances enlarged to 299 × 299 by nearest neighbour",
        "rows": "dogs first, then fish, each in the order of their file names",
        "queries": "test photographs that the RBF machine and the network classify correctly",
        "query": "the test fish that every model classifies correctly with the RBF margin nearest 0.990; a test row",
        "fit": "LinearSVC(loss='hinge', fit_intercept=False, tol=1e-8) on Cholesky features, float64; heads by Newton",
        "penalty_per_example": True,
        "near": "the tenth of all training rows that is nearest to the query",
        "distance": "Euclidean, unsquared, in pixels of [−1, 1]",
        "distance_correlation": "Spearman of |value| and distance, mean over the queries that have any value ≠ 0",
        "features": "as the network gives them; heads' decisions are therefore surer with SqueezeNet's large features",
    }
    return {"settings": settings, "numbers": numbers, "arrays": arrays}


def _numbers(
    prefix: str, found: uw.apps.Understanding, query: int, y: NDArray[np.int_], near: NDArray[np.bool_]
) -> dict[str, Any]:
    """What section 5.1 says of one model about the query."""
    values, fish = found.scores.values[query], y == 1
    helpful = found.helpful(query, SHOWN)
    same_helpful, same_harmful = found.same_class(query, TOP)
    numbers = {
        f"{prefix}_largest_value": values.max(),
        f"{prefix}_smallest_value": values.min(),
        f"{prefix}_rows_with_half_of_the_influence": found.half[query],
        f"{prefix}_median_rows_with_half_of_the_influence": float(np.median(found.half)),
        f"{prefix}_share_of_fish_among_20_most_helpful": same_helpful,
        f"{prefix}_share_of_fish_among_20_most_harmful": same_harmful,
        f"{prefix}_share_of_dogs_that_help": float((values[~fish] > 0).mean()),
        f"{prefix}_share_of_fish_that_harm": float((values[fish] < 0).mean()),
        f"{prefix}_rank_of_first_helpful_dog": found.first_of_another_class(query) or 0,
        f"{prefix}_mean_value_of_near_fish": values[fish & near].mean(),
        f"{prefix}_mean_value_of_near_dogs": values[~fish & near].mean(),
        f"{prefix}_mean_value_of_far_fish": values[fish & ~near].mean(),
        f"{prefix}_mean_value_of_far_dogs": values[~fish & ~near].mean(),
    }
    return numbers | {f"{prefix}_helpful_{place + 1}": int(row) for place, row in enumerate(helpful.rows)}


def kernel_machine(
    squares: NDArray[np.float64], y: NDArray[np.int_]
) -> tuple[uw.Influence, NDArray[np.float64], float]:
    """The RBF SVM as a linear SVM on Cholesky features; those of all photographs; what the factor's diagonal needed."""
    features, jitter = factor(np.exp(-GAMMA * squares))
    F = features[:, : len(y)]
    model = LinearSVC(
        loss="hinge", C=1 / (len(y) * L2), fit_intercept=False, tol=1e-8, max_iter=1_000_000, random_state=24
    ).fit(F[: len(y)], y)
    return uw.explain(model, F[: len(y)], y, loss=uw.losses.smooth_hinge(T), penalty_per_example=True), F, jitter


def headed(name: str, images: NDArray[np.uint8], y: NDArray[np.int_]) -> uw.Influence:
    """A frozen network and a logistic head on its features, the head at its minimum."""
    body = networks.NETWORKS[name]()
    with torch.no_grad():
        width = body(networks.pixels(images[:1])).shape[1]
    head = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(body, head).eval()
    start = uw.explain(
        model,
        np.moveaxis(images, -1, 1),
        y,
        loss=lambda output, target: nn.functional.binary_cross_entropy_with_logits(output[:, 0], target.double()),
        penalty=L2,
        penalty_per_example=True,
        parameters=["1.weight"],
        batch_size=25,
        damping=0.0,
    )
    return uw.retrained(start)


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
            return np.linalg.cholesky(kernel + jitter * np.eye(len(kernel))).astype(np.float64, copy=False), jitter
        except np.linalg.LinAlgError:
            continue
    message = "The kernel matrix is not positive definite, even with 1e-6 on its diagonal."
    raise ValueError(message)


def draw(result: dict[str, Any]) -> Figure:
    """Value against distance for both models, and how the correlation spreads over queries."""
    arrays, numbers, settings = result["arrays"], result["numbers"], result["settings"]
    fish, x = np.array(arrays["fish"], dtype=bool), np.array(arrays["distance"])
    figure, (left, middle, right) = report.canvas(3, 14.4, 4.4, width_ratios=(1.0, 1.0, 0.8))
    for ax, prefix, title in ((left, "rbf", "RBF SVM"), (middle, "network", NAMES[settings["network"]])):
        y = np.array(arrays[f"{prefix}_value"])
        kinds = {"fish, as the query": fish, "dog": ~fish}
        uw.plots.influence_against_distance(y, x, ax, kinds=kinds, marked=np.argsort(-y)[:SHOWN].tolist())
        report.style(ax, title=f"{title}: one test fish")
        report.note(
            ax,
            f"Spearman of |value| and distance {numbers[f'{prefix}_distance_correlation_of_the_query']:+.2f}\n"
            f"dogs that help: {numbers[f'{prefix}_share_of_dogs_that_help']:.0%}, fish that harm: "
            f"{numbers[f'{prefix}_share_of_fish_that_harm']:.0%}",
            x=0.3,
        )
        ax.set_xlabel("Euclidean distance in pixels of [−1, 1]")
        ax.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
        ax.legend().remove()
        ax.set_ylim(top=1.25 * y.max())
    left.legend(frameon=False, fontsize=9, loc="lower right", handletextpad=0.2, labelcolor=report.INK)
    shown = [("rbf", "RBF SVM"), ("network", NAMES[settings["network"]])]
    shown += [(name, NAMES[name]) for name in settings["networks"].split(",")[1:]]
    parts = right.violinplot([arrays[f"{name}_locality"] for name, _ in shown], showmedians=True, showextrema=False)
    for place, body in enumerate(parts["bodies"]):  # type: ignore[arg-type]
        body.set(facecolor=report.ORANGE if place == 0 else report.BLUE, alpha=0.55)
    parts["cmedians"].set(color=report.INK)
    right.axhline(0, color=report.GREY, linewidth=0.8)
    right.set_xticks(range(1, len(shown) + 1), [title.replace(" ", "\n", 1) for _, title in shown])
    right.tick_params(axis="x", labelsize=8)
    right.set(ylabel="Spearman of |value| and distance")
    report.style(right, title=f"{numbers['queries']} test photographs")
    return figure


if __name__ == "__main__":
    report.run("fig4", compute, draw)
