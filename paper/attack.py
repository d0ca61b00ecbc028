"""Section 5.2: training photographs changed invisibly, by less than half of an 8-bit level, so that a test photograph
flips: python -m paper.attack.

A frozen pretrained network with a logistic top layer. For each target the training photographs are ranked by the L1
norm of equation 5 by their pixels; then {first}, {second}, the first 2, 3, 5 and 10 of them are tried in this order. A
try repeats: step along the sign of equation 5, project to the box, recompute features, refit, solve again for s_test.
A flip counts only if scikit-learn, fitted from scratch on recomputed features of the changed photographs, says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from paper import networks, report
from paper.head import Head
from upweight import datasets

L2 = 0.001
SCALE = 2.0  # standard deviation of the whitened features
BOX = 0.4995  # levels: a hair below half, so that rounding gives the same 8-bit photograph
CANDIDATES = 40  # rows whose pixel gradients are computed for a target; the others' are bounded by their features'
SETS = (1, 1, 2, 3, 5, 10)  # sizes; the second is the second row alone
ITERATIONS, PATIENCE = 40, 4
MANY, MANY_STEP, MANY_ITERATIONS, MANY_PATIENCE = 30, 0.005, 2000, 60


class Photographs:
    """Photographs, their features by a network, and the fitted top layer.

    Args:
        network: by its name in `networks.NETWORKS`.
        whiten: whether features are whitened on the training photographs, or stay as the network gives them.
    """

    def __init__(self, network: str, *, whiten: bool = True) -> None:
        data, self.network = datasets.dogfish(), networks.NETWORKS[network]()
        self.images, self.y, self.test_y = data.images, data.labels.astype(float), data.test_labels.astype(float)
        self.raw = networks.features(self.network, data.images).astype(np.float64)
        plain = np.zeros(self.raw.shape[1]), np.eye(self.raw.shape[1])
        self.mean, self.matrix = whitening(self.raw) if whiten else plain
        self._mean, self._matrix = torch.from_numpy(self.mean).float(), torch.from_numpy(self.matrix).float()
        self.test = self.whitened(networks.features(self.network, data.test_images).astype(np.float64))
        self.head = Head(self.whitened(self.raw), self.y, L2)
        self.head.fit()

    def whitened(self, features: np.ndarray) -> np.ndarray:
        """Features of mean 0 and covariance SCALE² I over the training photographs."""
        return (features - self.mean) @ self.matrix

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Whitened features, differentiable by pixels."""
        return (self.network(pixels) - self._mean) @ self._matrix

    def recomputed(self, pixels: torch.Tensor) -> np.ndarray:
        """Whitened features in the precision of the top layer."""
        with torch.no_grad():
            return self.whitened(self.network(pixels).double().numpy())

    def gradients(self, pixels: torch.Tensor, by_features: np.ndarray) -> torch.Tensor:
        """(r, 3, h, w) from (r, d) derivatives by features, through the network."""
        x = pixels.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.features(x), x, torch.from_numpy(by_features).float())
        return gradient


def whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and the symmetric matrix that makes the covariance of the rows SCALE² I, but for its smallest parts."""
    mean = features.mean(0)
    values, vectors = np.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    return mean, SCALE * (vectors / np.sqrt(values + 1e-6 * values[-1])) @ vectors.T


def sizes(photos: Photographs, seed: int = 0) -> np.ndarray:
    """(n,) how large the L1 norm by pixels is per unit of a gradient by features: its mean over two directions."""
    directions = np.random.default_rng(seed).standard_normal((2, photos.head.H.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = np.zeros(len(photos.y))
    for row in tqdm(range(len(found)), desc="sizes", leave=False):
        x = networks.pixels(photos.images[[row]]).requires_grad_(True)
        h = photos.features(x)
        for k, direction in enumerate(directions):
            (gradient,) = torch.autograd.grad(
                h, x, torch.from_numpy(direction[None]).float(), retain_graph=k < len(directions) - 1
            )
            found[row] += float(gradient.abs().sum()) / len(directions)
    return found


def ranked(photos: Photographs, s: np.ndarray, size: np.ndarray, candidates: int) -> np.ndarray:
    """The candidates by the L1 norm of equation 5 by their pixels, largest first."""
    by_features = photos.head.of_perturbing(s)
    chosen = np.argsort(-np.linalg.norm(by_features, axis=1) * size, kind="stable")[:candidates]
    norms = [
        float(photos.gradients(networks.pixels(photos.images[[row]]), by_features[[row]]).abs().sum()) for row in chosen
    ]
    return chosen[np.argsort(-np.array(norms), kind="stable")]


def craft(
    photos: Photographs,
    rows: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    *,
    step: float,
    iterations: int,
    patience: int,
) -> tuple[torch.Tensor, Head, int]:
    """The changed pixels with the largest mean loss of the queries, the model refitted on them, and the iterations.

    Ends when every query is flipped, when the loss has not risen by 1 % within `patience` iterations, or after
    `iterations`.
    """
    original = networks.pixels(photos.images[rows])
    low, high = (original - BOX).clamp(min=0), (original + BOX).clamp(max=255)
    x, head = original.clone(), photos.head.copy()
    best, best_loss, mark, since = (x, head.copy()), head.loss(queries, labels), 0.0, 0
    done = 0
    while done < iterations:
        done += 1
        s = head.s_test(queries, labels)
        gradient = photos.gradients(x, head.of_perturbing(s)[rows])
        x = torch.minimum(torch.maximum(x + step * gradient.sign(), low), high)
        head.H[rows] = photos.recomputed(x)
        head.fit()
        loss = head.loss(queries, labels)
        if loss > best_loss:
            best, best_loss = (x, head.copy()), loss
        since = 0 if loss > 1.01 * mark else since + 1
        mark = max(mark, loss)
        if (head.margins(queries, labels) < 0).all() or since >= patience:
            break
    return *best, done


def verified(photos: Photographs, rows: np.ndarray, x: torch.Tensor) -> LogisticRegression:
    """Scikit-learn's fit from scratch on the features of the changed photographs."""
    H = photos.whitened(photos.raw)
    H[rows] = photos.recomputed(x)
    n = len(photos.y)
    model = LogisticRegression(C=1 / (n * L2), fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
    return model.fit(H, photos.y)


def change(photos: Photographs, rows: np.ndarray, x: torch.Tensor, model: LogisticRegression) -> dict[str, float]:
    """How large a change is, in pixels and in features, and what else the model does on it."""
    original = networks.pixels(photos.images[rows])
    moved = (x - original).flatten(1)
    features = photos.whitened(photos.raw)
    before, after = features[rows].copy(), photos.recomputed(x)
    centroid = np.stack([features[photos.y == photos.y[row]].mean(0) for row in rows])
    spread = np.linalg.norm(before - centroid, axis=1)
    features[rows] = after
    return {
        "pixel_linf": float(moved.abs().max()),
        "pixel_l2": float(moved.norm(dim=1).mean()),
        "same_8_bit": float(bool((x.round() == original).all())),
        "feature_l2": float(np.linalg.norm(after - before, axis=1).mean()),
        "feature_to_centroid": float(spread.mean()),
        "test_accuracy": float(np.mean(np.equal(model.predict(photos.test), photos.test_y))),
        "train_wrong": float(np.sum(np.not_equal(model.predict(features), photos.y))),
    }


def single(photos: Photographs, target: int, size: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """One target: the sizes that were tried until it flipped, and what flipped it."""
    query, label = photos.test[[target]], photos.test_y[[target]]
    start = time.perf_counter()
    ranking = ranked(photos, photos.head.s_test(query, label), size, settings["candidates"])
    told: dict[str, Any] = {
        "target": target,
        "margin": float(photos.head.margins(query, label)[0]),
        "margins": [],
        "images": 0,
        "rows": ranking[: max(SETS)].tolist(),
        "set": len(SETS),
    }
    for place, count in enumerate(SETS):
        rows = ranking[1:2] if place == 1 else ranking[:count]
        x, head, iterations = craft(
            photos, rows, query, label,
            step=settings["step"], iterations=settings["iterations"], patience=settings["patience"],
        )  # fmt: skip
        told["images"] += iterations * count
        told["margins"].append(float(head.margins(query, label)[0]))
        if told["margins"][-1] < 0:
            model = verified(photos, rows, x)
            if model.predict(query)[0] != label[0]:
                told |= {"set": place, "iterations": iterations} | change(photos, rows, x, model)
                break
    return told | {"seconds": round(time.perf_counter() - start, 2)}


def many(photos: Photographs, size: np.ndarray, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """30 test photographs of dogs at once, by one training photograph."""
    right = np.flatnonzero((photos.head.margins(photos.test, photos.test_y) > 0) & (photos.test_y == 0))
    chosen = np.sort(np.random.default_rng(seed).choice(right, min(MANY, len(right)), replace=False))
    queries, labels = photos.test[chosen], photos.test_y[chosen]
    row = ranked(photos, photos.head.s_test(queries, labels), size, settings["candidates"])[:1]
    x, head, iterations = craft(
        photos, row, queries, labels, step=MANY_STEP, iterations=settings["many_iterations"], patience=MANY_PATIENCE
    )
    model = verified(photos, row, x)
    return {
        "queries": chosen.tolist(),
        "flipped": chosen[model.predict(queries) != labels].tolist(),
        "row": int(row[0]),
        "iterations": iterations,
        "loss_before": photos.head.loss(queries, labels),
        "loss_after": head.loss(queries, labels),
    } | change(photos, row, x, model)


def compute(
    targets: int = 300,
    seed: int = 0,
    network: str = "squeezenet",
    step: float = 0.1,
    iterations: int = ITERATIONS,
    patience: int = PATIENCE,
    candidates: int = CANDIDATES,
    many_iterations: int = MANY_ITERATIONS,
    raw_targets: int = 30,
    all: bool = False,
) -> dict[str, Any]:
    """Attack `targets` correctly classified test photographs drawn by seed, or all, and 30 dogs at once.

    The first `raw_targets` of them are attacked once more through a top layer on the features as they are.
    """
    photos = Photographs(network)
    chosen_settings = {"step": step, "iterations": iterations, "patience": patience, "candidates": candidates}
    right = np.flatnonzero(photos.head.margins(photos.test, photos.test_y) > 0)
    drawn = np.random.default_rng(seed).permutation(right)[: None if all else targets]
    file = report.progress_file("attack", {"network": network, **chosen_settings, "scale": SCALE})
    done = dict(finished(file))
    if "sizes" not in done:
        append(file, "sizes", sizes(photos).tolist())
    size = np.array(dict(finished(file))["sizes"])
    for target in tqdm(drawn.tolist(), desc="targets"):
        if str(target) not in done:
            append(file, str(target), single(photos, target, size, chosen_settings))
    key = f"many-{seed}-{many_iterations}"
    if key not in done:
        append(file, key, many(photos, size, seed, chosen_settings | {"many_iterations": many_iterations}))
    done = dict(finished(file))
    found = [done[str(target)] for target in drawn.tolist()]
    raw = as_they_are(network, drawn[:raw_targets], chosen_settings, file)
    settings = {
        "network": network, "targets": len(found), "seed": seed, "n": len(photos.y), "l2": L2, "scale": SCALE,
        "box": BOX, "many_step": MANY_STEP, "many_iterations": many_iterations, "many_patience": MANY_PATIENCE,
    } | chosen_settings | TOLD  # fmt: skip
    return {
        "settings": settings,
        "numbers": numbers(photos, found, done[key]) | raw,
        "arrays": arrays(found, done[key]),
    }


def as_they_are(network: str, targets: np.ndarray, settings: dict[str, Any], file: Path) -> dict[str, float]:
    """Rates on features that are not whitened: those that the network gives."""
    done = dict(finished(file))
    photos = Photographs(network, whiten=False)
    right = photos.head.margins(photos.test, photos.test_y) > 0
    targets = targets[right[targets]]
    if "raw-sizes" not in done:
        append(file, "raw-sizes", sizes(photos).tolist())
    size = np.array(dict(finished(file))["raw-sizes"])
    for target in tqdm(targets.tolist(), desc="raw features"):
        if f"raw-{target}" not in done:
            append(file, f"raw-{target}", single(photos, target, size, settings))
    done = dict(finished(file))
    place = np.array([done[f"raw-{target}"]["set"] for target in targets.tolist()])
    rates = {f"raw_rate_{name}": float((place <= last).mean()) for name, last in (("1", 1), ("2", 2), ("10", 5))}
    told = {"raw_targets": len(targets), "raw_test_right": int(right.sum())}
    return told | rates | {"raw_margin_median": float(np.median(photos.head.margins(photos.test, photos.test_y)))}


TOLD = {
    "photographs": "Imagenette, springers (0) and tenches (1), 224 × 224; test photographs that the model gets right",
    "features": "whitened on the training photographs, standard deviation `scale` in every direction; no intercept; "
    "raw_* are of features as the network gives them",
    "sets": "rank 1; rank 2 alone; top 2; top 3; top 5; top 10; the first that flips the target ends its tries",
    "ranking": "L1 norm of the pixel gradient, of the `candidates` rows whose feature gradient times a size per row is "
    "largest",
    "iteration": "ends at a flip, or when the loss has not risen by 1 % within `patience` iterations; the paper's step "
    "is 0.02 with 100 iterations",
    "success": "scikit-learn's LogisticRegression, fitted from scratch on recomputed features, calls the target wrong",
}


def numbers(photos: Photographs, found: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, float]:
    """Rates and sizes."""
    place = np.array([one["set"] for one in found])
    flips = [one for one in found if one["set"] < len(SETS)]
    told = {"targets": len(found), "test_right": int((photos.head.margins(photos.test, photos.test_y) > 0).sum())}
    for name, last in (("1_top", 0), ("1", 1), ("2", 2), ("3", 3), ("5", 4), ("10", 5)):
        told |= {f"rate_{name}": float((place <= last).mean()), f"flipped_{name}": int((place <= last).sum())}
    for key in ("pixel_linf", "same_8_bit"):
        told[f"{key}_{'max' if key == 'pixel_linf' else 'min'}"] = (max if key == "pixel_linf" else min)(
            one[key] for one in [*flips, group]
        )
    for key in ("pixel_l2", "feature_l2", "feature_to_centroid", "train_wrong", "test_accuracy"):
        told[f"{key}_median"] = float(np.median([one[key] for one in flips]))
    centroids = [photos.head.H[photos.y == label].mean(0) for label in (0, 1)]
    pixels = [photos.images[photos.y == label].mean(0, dtype=np.float64) for label in (0, 1)]
    loss = np.logaddexp(0, -photos.head.margins(photos.head.H, photos.y)).mean()
    return told | {
        "centroid_distance_features": float(np.linalg.norm(centroids[0] - centroids[1])),
        "centroid_distance_pixels": float(np.linalg.norm(pixels[0] - pixels[1])),
        "clean_test_accuracy": float((photos.head.margins(photos.test, photos.test_y) > 0).mean()),
        "clean_train_loss": float(loss),
        "clean_test_loss": photos.head.loss(photos.test, photos.test_y),
        "clean_margin_median": float(np.median(photos.head.margins(photos.test, photos.test_y))),
        "images_per_target": float(np.mean([one["images"] for one in found])),
        "multi_queries": len(group["queries"]),
        "multi_flipped": len(group["flipped"]),
        **{f"multi_{key}": group[key] for key in (
            "row", "iterations", "loss_before", "loss_after", "pixel_linf", "pixel_l2", "feature_l2",
            "feature_to_centroid", "test_accuracy", "train_wrong",
        )},
    }  # fmt: skip


def arrays(found: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    """One entry per target, and per flip."""
    flips = [one for one in found if one["set"] < len(SETS)]
    return {
        "target": [one["target"] for one in found],
        "set": [one["set"] for one in found],
        "margin": np.array([one["margin"] for one in found]),
        "first_row": [one["rows"][0] for one in found],
        "first_margin_after": np.array([one["margins"][0] for one in found]),
        "flip_feature_l2": np.array([one["feature_l2"] for one in flips]),
        "flip_feature_to_centroid": np.array([one["feature_to_centroid"] for one in flips]),
        "flip_set": [one["set"] for one in flips],
        "multi_queries": group["queries"],
        "multi_flipped": group["flipped"],
    }


def finished(file: Path) -> Iterator[tuple[str, Any]]:
    """What an earlier run has finished, line by line; a line that was cut off is computed again."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield tuple(json.loads(line))
            except ValueError:
                continue


def append(file: Path, key: str, value: Any) -> None:
    """One more finished thing."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([key, value]) + "\n")


def draw(result: dict[str, Any]) -> Figure:
    """The success rate by number of photographs, and how far they move between their features."""
    told, data = result["numbers"], {key: np.array(value) for key, value in result["arrays"].items()}
    figure, (left, right) = report.canvas(2, 9.6, 3.9)
    names = ("1", "2", "3", "5", "10")
    rates = [100 * told[f"rate_{name}"] for name in names]
    left.bar(range(len(names)), rates, color=report.BLUE, width=0.62, zorder=2)
    for place, name in enumerate(names):
        left.annotate(
            f"{told[f'flipped_{name}']}", (place, rates[place]), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=9, color=report.INK,
        )  # fmt: skip
    for place, paper in ((0, 57), (1, 77), (4, 100 * 590 / 591)):
        left.plot([place - 0.4, place + 0.4], [paper, paper], color=report.ORANGE, linewidth=2, zorder=3,
                  label="the paper, Inception v3" if place == 0 else None)  # fmt: skip
    raw = [100 * told[f"raw_rate_{name}"] for name in ("1", "2", "10")]
    left.scatter(
        (0, 1, 4), raw, s=42, facecolor="white", edgecolor=report.INK, zorder=4,
        label=f"features not whitened ({told['raw_targets']} photographs)",
    )  # fmt: skip
    report.style(left, title=f"Test photographs flipped, of {told['targets']} (whitened features)")
    left.set(
        xticks=range(len(names)),
        xticklabels=names,
        xlabel="training photographs changed (at most)",
        ylabel="%",
        ylim=(0, 128),
    )
    left.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=report.INK)
    share = data["flip_feature_l2"] / data["flip_feature_to_centroid"]
    right.hist(share, bins=24, color=report.BLUE, zorder=2)
    report.style(right, title="The same pixels after rounding, other features")
    right.set(xlabel="feature change / distance from the centroid of its class", ylabel="flips")
    return figure


if __name__ == "__main__":
    report.run("attack", compute, draw)
