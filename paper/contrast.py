"""Section 6, the question of Cadamuro et al.: which few labels would make a wrong prediction right?

Ten digits, 5,000 of MNIST's training images averaged 2 × 2 (196 features), multinomial logistic regression of penalty
0.01/2 ‖θ‖². For wrong predictions on test images, drawn by seed: the smallest set of label changes that is predicted to
be enough, and of removals, each really made and the model fitted again, by the library's Newton method and once more
from scratch by scikit-learn. Beside them, with the same labels, the shortest starts of other orders of the rows that
really correct the prediction, found by refitting: highest training loss among the rows of the predicted class, highest
loss of all, nearest image, and random rows of the predicted class.

    python -m paper.contrast
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

import upweight as uw
from paper import report
from upweight import datasets
from upweight.apps import Answer, contrast, contrast_by_removal

DECAY = 0.01
MOST = 512  # rows of an order that are tried before it is given up
ORDERS = ("influence", "loss", "loss_all", "nearest", "random")
Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def pictures(images: NDArray[np.uint8]) -> Array:
    """Images in 0 … 1, averaged over 2 × 2 pixels."""
    return (images / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)


def fitted(X: Array, y: Labels) -> LogisticRegression:
    """The minimum of the mean loss + 0.01/2 ‖θ‖², intercepts free, from scratch."""
    return LogisticRegression(C=1 / (DECAY * len(X)), tol=1e-8, max_iter=10_000).fit(X, y)


def fitted_again(model: LogisticRegression, X: Array, y: Labels) -> LogisticRegression:
    """The same from the parameters of another fit, to outputs within about 0.003: for the searches along an order."""
    again = LogisticRegression(C=model.C, tol=1e-5, max_iter=10_000, warm_start=True)
    again.coef_, again.intercept_, again.classes_ = np.array(model.coef_), np.array(model.intercept_), model.classes_
    return again.fit(X, y)


def compute(rows: int = 5_000, queries: int = 100, seed: int = 0) -> dict[str, Any]:
    """The sets of every query, what they really do, and how many rows other orders need."""
    data = datasets.mnist()
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(data.labels))[:rows]
    X, y = pictures(data.images[chosen]), data.labels[chosen].astype(np.int64)
    Xq, yq = pictures(data.test_images), data.test_labels.astype(np.int64)
    model = fitted(X, y)
    influence = uw.explain(model, X, y)
    said = uw.predict(influence, Xq).labels
    assert said is not None
    wrong = np.flatnonzero(said != yq)
    picked = np.sort(draw.permutation(wrong)[:queries])
    settings = {"rows": rows, "queries": len(picked), "seed": seed, "penalty": DECAY, "most": MOST}
    file = report.progress_file("contrast", settings)
    done = json.loads(file.read_text()) if file.is_file() else {}
    for query in picked:
        if str(query) not in done:
            done[str(query)] = one(influence, model, X, y, Xq[[query]], yq[[query]], draw_seed=seed + int(query))
            _write(file, done)
    told = [done[str(query)] for query in picked]
    arrays = {key: np.array([one[key] for one in told]) for key in told[0]}
    return {
        "settings": settings,
        "numbers": {"test_accuracy": model.score(Xq, yq), "wrong": len(wrong), **summary(arrays)},
        "arrays": {"query": picked, "label": said[picked], "wanted": yq[picked], **arrays},
    }


def one(
    influence: uw.Influence, model: LogisticRegression, X: Array, y: Labels, Xq: Array, yq: Labels, draw_seed: int
) -> dict[str, Any]:
    """Everything about one query."""
    labels = contrast(influence, (Xq, yq)).answers[0]
    removal = contrast_by_removal(influence, (Xq, yq)).answers[0]

    def relabelled(rows: Labels) -> Labels:
        return np.where(np.isin(np.arange(len(y)), rows), yq[0], y)

    def corrects(rows: Labels) -> bool:
        return bool(fitted_again(model, X, relabelled(rows)).predict(Xq)[0] == yq[0])

    keep = np.setdiff1d(np.arange(len(y)), removal.rows)
    without = LogisticRegression(C=model.C, tol=1e-8, max_iter=10_000).fit(X[keep], y[keep])
    orders = other_orders(model, X, y, Xq, yq, labels.label, np.random.default_rng(draw_seed))
    return {
        **_told("", labels),
        **_told("removal_", removal),
        "corrected_from_scratch": bool(fitted(X, relabelled(labels.rows)).predict(Xq)[0] == yq[0]),
        "removal_corrected_from_scratch": bool(without.predict(Xq)[0] == yq[0]),
        "influence": smallest(corrects, labels.rows),
        **{name: smallest(corrects, order[:MOST]) for name, order in orders.items()},
    }


def other_orders(
    model: LogisticRegression, X: Array, y: Labels, Xq: Array, yq: Labels, label: int, draw: np.random.Generator
) -> dict[str, Labels]:
    """Rows in the order in which each baseline would give them the right label."""
    loss = -model.predict_log_proba(X)[np.arange(len(y)), y]
    same, other = np.flatnonzero(y == label), np.flatnonzero(y != yq[0])
    but_one = len(same) - 1  # a class without rows would be another model
    distance = ((X[other] - Xq) ** 2).sum(1)
    return {
        "loss": same[np.argsort(-loss[same], kind="stable")][:but_one],
        "loss_all": other[np.argsort(-loss[other], kind="stable")],
        "nearest": other[np.argsort(distance, kind="stable")],
        "random": draw.permutation(same)[:but_one],
    }


def smallest(corrects: Callable[[Labels], bool], order: Labels) -> int:
    """The shortest start of an order that corrects, by doubling and then halving; 0 if the whole does not."""
    low, high = 0, 1
    while not corrects(order[:high]):
        if high >= len(order):
            return 0
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if corrects(order[:middle]) else (middle, high)
    return high


def summary(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The numbers of the table."""
    ratio = {
        prefix: (arrays[f"{prefix}actual"] - arrays[f"{prefix}margin"])
        / (arrays[f"{prefix}predicted"] - arrays[f"{prefix}margin"])
        for prefix in ("", "removal_")
    }
    numbers: dict[str, Any] = {"queries": len(arrays["size"])}
    for prefix in ("", "removal_"):
        corrected = arrays[f"{prefix}corrected"]
        numbers |= {
            f"{prefix}corrected": corrected.sum(),
            f"{prefix}corrected_rate": corrected.mean(),
            f"{prefix}corrected_from_scratch": arrays[f"{prefix}corrected_from_scratch"].sum(),
            f"{prefix}without_a_set": (arrays[f"{prefix}size"] == 0).sum(),
            f"{prefix}median_set_size": np.median(arrays[f"{prefix}size"]),
            f"{prefix}largest_set_size": arrays[f"{prefix}size"].max(),
            f"{prefix}calibration": np.nanmedian(ratio[prefix]),
            f"{prefix}calibration_low": np.nanquantile(ratio[prefix], 0.05),
            f"{prefix}calibration_high": np.nanquantile(ratio[prefix], 0.95),
        }
    for name in ORDERS:
        sizes = np.where(arrays[name] > 0, arrays[name], np.inf)
        numbers[f"median_set_size_{name}"] = min(float(np.median(sizes)), MOST + 1)
        numbers[f"reached_{name}"] = (arrays[name] > 0).sum()
    smaller = arrays["size"] <= np.where(arrays["loss"] > 0, arrays["loss"], np.inf)
    return numbers | {"sets_no_larger_than_by_loss": smaller.sum()}


def draw(result: dict[str, Any]) -> Figure:
    """Predicted against actual change of the margin, and how many rows each order needs."""
    arrays = {key: np.array(value) for key, value in result["arrays"].items()}
    figure, axes = report.canvas(2, 10.5, 4.6)
    _changes(axes[0], arrays)
    _sizes(axes[1], arrays)
    numbers = result["numbers"]
    report.note(
        axes[0],
        f"corrected {numbers['corrected']} of {numbers['queries']} by new labels,\n"
        f"{numbers['removal_corrected']} by removals",
        x=0.42,
        y=0.32,
    )
    return figure


def _changes(ax: Axes, arrays: dict[str, NDArray[Any]]) -> None:
    ends = [0.0, 0.0]
    for prefix, color, label in (("", report.BLUE, "labels changed"), ("removal_", report.ORANGE, "rows removed")):
        predicted = arrays[f"{prefix}margin"] - arrays[f"{prefix}predicted"]
        actual = arrays[f"{prefix}margin"] - arrays[f"{prefix}actual"]
        ends[1] = max(ends[1], float(np.nanmax(predicted)), float(np.nanmax(actual)))
        ax.scatter(predicted, actual, s=16, alpha=0.7, color=color, edgecolor="white", linewidth=0.3, label=label)
    ax.axline((0, 0), slope=1, color=report.GREY, linewidth=1, zorder=1)
    ax.set(xlabel="predicted fall of the margin", ylabel="actual fall, model fitted again")
    ax.set(xlim=(0, 1.05 * ends[1]), ylim=(0, 1.05 * ends[1]), aspect="equal")
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    report.style(ax, title="Sets that are predicted to be enough")


def _sizes(ax: Axes, arrays: dict[str, NDArray[Any]]) -> None:
    told = {
        "influence (predicted set)": (arrays["size"] * arrays["corrected"], report.BLUE, "-"),
        "nearest images": (arrays["nearest"], "#2f9e6e", "-"),
        "highest loss in the class": (arrays["loss"], report.ORANGE, "-"),
        "highest loss of all": (arrays["loss_all"], report.ORANGE, ":"),
        "random in the class": (arrays["random"], report.GREY, "-"),
    }
    for label, (sizes, color, dash) in told.items():
        reached = np.sort(sizes[sizes > 0])
        share = np.arange(1, len(reached) + 1) / len(sizes)
        ax.step(reached, share, where="post", color=color, linestyle=dash, linewidth=1.8, label=label)
    ax.set(xscale="log", ylim=(0, 1), xlabel="labels changed", ylabel="share of wrong predictions corrected")
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    report.style(ax, title="Rows needed")


def _told(prefix: str, answer: Answer) -> dict[str, Any]:
    return {
        f"{prefix}size": len(answer.rows),
        f"{prefix}margin": answer.margin,
        f"{prefix}predicted": answer.predicted,
        f"{prefix}actual": answer.actual,
        f"{prefix}corrected": answer.corrected,
    }


def _write(file: Path, done: dict[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(done))
    part.replace(file)


if __name__ == "__main__":
    report.run("contrast", compute, draw)
