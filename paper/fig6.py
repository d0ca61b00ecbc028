"""Figure 6: wrong labels among e-mails, found and corrected row by row.

Data: Enron1, 80 % to train on by NumPy's seed 0 (n = 4,137). Words of at least two letters, lower case, without
scikit-learn's English stop words and without those in fewer than five training e-mails: the paper's spaCy filter, as
near as scikit-learn alone comes. Counts as they are, logistic regression without an intercept, penalty 1e-4/2 ‖θ‖².
A tenth of the labels is flipped; rows are inspected from the most suspicious on, wrong labels are put right, and the
model is fitted again. With σᵢ = σ(−yᵢθᵀxᵢ), H the Hessian of the mean loss and the penalty, a row's suspicion is

    influence             σᵢ² xᵢᵀH⁻¹xᵢ, n times `of_self`: the change of the row's own loss if it is removed
    influence_published   σᵢ xᵢᵀH⁻¹xᵢ, what the authors' code computed when the paper came out
    newton                the same change by the removal's own Newton step: the row's curvature goes with it
    loss                  −log(1 − σᵢ)
    random                a random order

    python -m paper.fig6
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import expit, log_expit
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import upweight as uw
from paper import report
from upweight import datasets

DECAY = 1e-4
WAYS = ("influence", "influence_published", "newton", "loss", "random")
STEPS = 6  # of a twentieth of the rows each
WORDS = r"\b[a-zA-Z]{2,}\b"

PAPER = {  # read off the figure, at 0, 5, … 30 % inspected
    "accuracy": {
        "influence_published": [0.888, 0.938, 0.955, 0.962, 0.967, 0.970, 0.972],
        "loss": [0.888, 0.911, 0.932, 0.942, 0.950, 0.955, 0.960],
        "random": [0.888, 0.894, 0.898, 0.902, 0.907, 0.912, 0.916],
    },
    "found": {
        "influence_published": [0, 0.42, 0.62, 0.72, 0.79, 0.83, 0.86],
        "loss": [0, 0.36, 0.52, 0.62, 0.70, 0.75, 0.80],
        "random": [0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30],
    },
}
Split = tuple[Any, NDArray[np.int64], Any, NDArray[np.int64]]


def counts_of_words(mails: int) -> Split:
    """Training and test inputs and labels; fewer `mails` than all are the first of the shuffled ones."""
    mail = datasets.enron1()
    order = np.random.RandomState(0).permutation(len(mail.labels))[:mails]
    n = int(0.8 * len(order))
    labels = mail.labels[order].astype(np.int64)
    count = CountVectorizer(min_df=5, token_pattern=WORDS, stop_words="english")
    count.fit([mail.texts[row] for row in order[:n]])
    X, X_test = (
        scipy.sparse.csr_matrix(count.transform([mail.texts[row] for row in part]), dtype=np.float64)
        for part in (order[:n], order[n:])
    )
    return X, labels[:n], X_test, labels[n:]


def fitted(X: Any, y: NDArray[np.int64], start: NDArray[np.float64] | None = None) -> LogisticRegression:
    """The minimum of the mean loss + 1e-4/2 ‖θ‖², to a gradient of 1e-8 in every component."""
    model = LogisticRegression(
        C=1 / (DECAY * len(y)), fit_intercept=False, tol=1e-8, max_iter=20_000, warm_start=start is not None
    )
    if start is not None:
        model.coef_, model.intercept_, model.classes_ = start, np.zeros(1), np.array([0, 1])
    return model.fit(X, y)


def flipped_rows(n: int, repeat: int) -> NDArray[np.int64]:
    """A tenth of the rows, in whole twentieths: the authors' seeds."""
    return np.random.RandomState(120 + 2 * repeat).choice(n, 2 * (n // 20), replace=False)


def suspicions(
    influence: uw.Influence, X: Any, y: NDArray[np.int64], coef: NDArray[np.float64], seed: int
) -> dict[str, NDArray[np.float64]]:
    """How suspicious every row is, by each of the WAYS."""
    n = len(y)
    margin = (2 * y - 1) * (X @ coef[0])
    residual = np.maximum(expit(-margin), 1e-100)
    change = influence.of_self().values
    form = n * change / residual**2  # xᵀH⁻¹x
    step = residual * form / n / (1 - residual * (1 - residual) * form / n)
    return {
        "influence": n * change,
        "influence_published": residual * form,
        "newton": n * (log_expit(margin) - log_expit(margin - step)),
        "loss": -log_expit(margin),
        "random": np.random.RandomState(seed).permutation(n).astype(np.float64),
    }


def once(split: Split, repeat: int) -> dict[str, Any]:
    """One repeat: for every way and level, the share of wrong labels found, test accuracy and test loss."""
    X, y, X_test, y_test = split
    n = len(y)
    flips = flipped_rows(n, repeat)
    wrong = y.copy()
    wrong[flips] = 1 - wrong[flips]
    before = fitted(X, wrong)
    influence = uw.explain(before, X, wrong)
    scores = suspicions(influence, X, wrong, before.coef_, 120 + 2 * repeat + 1)
    found: dict[str, Any] = {way: [] for way in WAYS}
    accuracy: dict[str, Any] = {way: [] for way in WAYS}
    loss: dict[str, Any] = {way: [] for way in WAYS}
    for way, score in scores.items():
        order, model = np.argsort(-score, kind="stable"), before
        for step in range(STEPS + 1):
            seen = order[: step * (n // 20)]
            labels = wrong.copy()
            labels[seen] = y[seen]
            if step:
                model = fitted(X, labels, model.coef_.copy())
            found[way].append(float(np.isin(flips, seen).mean()))
            accuracy[way].append(float(model.score(X_test, y_test)))
            loss[way].append(float(-log_expit((2 * y_test - 1) * (X_test @ model.coef_[0])).mean()))
    slope = X.T @ (expit(X @ before.coef_[0]) - wrong) / n + DECAY * before.coef_[0]
    return {"found": found, "accuracy": accuracy, "loss": loss, "gradient": float(np.linalg.norm(slope))}


def compute(repeats: int = 40, mails: int = 5172) -> dict[str, Any]:
    """All repeats; finished ones are kept, and a run that was interrupted goes on with the next."""
    split = counts_of_words(mails)
    X, y, X_test, y_test = split
    file = report.progress_file("fig6", {"mails": mails, "words": X.shape[1]})
    done = json.loads(file.read_text()) if file.exists() else []
    for repeat in range(len(done), repeats):
        done.append(once(split, repeat))
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(done))
        partial.replace(file)
    done = done[:repeats]
    clean = fitted(X, y)
    table = {
        kind: np.array([[one[kind][way] for way in WAYS] for one in done]) for kind in ("found", "accuracy", "loss")
    }
    numbers: dict[str, Any] = {
        "repeats": repeats,
        "n": len(y),
        "words": X.shape[1],
        "test_rows": len(y_test),
        "flips": 2 * (len(y) // 20),
        "accuracy_clean": clean.score(X_test, y_test),
        "accuracy_flipped": table["accuracy"][:, 0, 0].mean(),
        "loss_flipped": table["loss"][:, 0, 0].mean(),
        "gradient_norm": max(one["gradient"] for one in done),
        "self_influence_error": closed_form_error(split),
        **means(table),
        **gaps(table),
    }
    return {
        "settings": {
            "penalty": DECAY,
            "words": WORDS,
            "stop_words": "scikit-learn's English ones",
            "min_df": 5,
            "seed_of_split": 0,
            "seeds": "120 + 2·repeat",
            "ways": list(WAYS),
            "repeats": repeats,
            "mails": mails,
        },
        "numbers": numbers,
        "arrays": {"inspected": np.arange(STEPS + 1) / 20}
        | {f"{kind}_mean_{way}": table[kind][:, w].mean(0) for kind in table for w, way in enumerate(WAYS)}
        | {f"{kind}_error_{way}": _error(table[kind][:, w]) for kind in table for w, way in enumerate(WAYS)}
        | {f"found_at_0.10_{way}": table["found"][:, w, 2] for w, way in enumerate(WAYS)},
    }


def means(table: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Mean and standard error of everything at every level."""
    numbers = {}
    for kind, values in table.items():
        for w, way in enumerate(WAYS):
            for step in range(1, STEPS + 1):
                name = f"{kind}_{way}_{step / 20:.2f}"
                numbers[name] = values[:, w, step].mean()
                numbers[f"{name}_standard_error"] = _error(values[:, w])[step]
    return numbers


def gaps(table: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """How much more than the loss each influence finds: the mean of the repeats' differences, and its error."""
    numbers = {}
    for way in ("influence", "influence_published", "newton"):
        differences = table["found"][:, WAYS.index(way)] - table["found"][:, WAYS.index("loss")]
        for step in range(1, STEPS + 1):
            name = f"found_gap{way.removeprefix('influence') if way != 'newton' else '_newton'}_{step / 20:.2f}"
            numbers[name] = differences[:, step].mean()
            numbers[f"{name}_standard_error"] = _error(differences)[step]
    return numbers


def closed_form_error(split: Split, rows: int = 100) -> float:
    """The largest relative difference between `of_self` and σ² xᵀH⁻¹x / n from a dense H, over some rows."""
    X, y, *_ = split
    n, d = X.shape
    wrong = y.copy()
    wrong[flipped_rows(n, 0)] ^= 1
    model = fitted(X, wrong)
    p = expit(X @ model.coef_[0])
    H = (X.T @ scipy.sparse.diags(p * (1 - p) / n) @ X).toarray()
    H[np.diag_indices(d)] += DECAY
    chosen = np.argsort(-np.abs(wrong - p), kind="stable")[:rows]
    x = X[chosen].toarray()
    solved = scipy.linalg.solve(H, x.T, assume_a="pos", overwrite_a=True)
    expected = (wrong - p)[chosen] ** 2 * (x * solved.T).sum(1) / n
    return float(np.abs(uw.explain(model, X, wrong).of_self(chosen).values / expected - 1).max())


def _error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard error over repeats, the first axis; 0 for a single one."""
    return values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1:])


LABELS = {
    "influence": "influence, σ² xᵀH⁻¹x",
    "influence_published": "as published, σ xᵀH⁻¹x",
    "loss": "loss",
    "random": "random",
}


def draw(result: dict[str, Any]) -> Figure:
    """Both of the paper's curves with standard errors, and what it shows itself as grey marks."""
    arrays = {key: np.array(value) for key, value in result["arrays"].items()}
    numbers = result["numbers"]
    figure, (left, right) = report.canvas(2, 11, 4.6)
    _curves(left, arrays, "accuracy")
    left.axhline(numbers["accuracy_clean"], color=report.INK, linewidth=1, linestyle="--", zorder=1)
    left.annotate("true labels", (0.3, numbers["accuracy_clean"]), xytext=(0, 3), textcoords="offset points",
                  ha="right", fontsize=8, color=report.INK)  # fmt: skip
    left.set_ylabel("test accuracy")
    report.style(left, title="Labels put right, model fitted again")
    _curves(right, arrays, "found")
    right.set_ylabel("share of the wrong labels found")
    right.legend(fontsize=8.5, frameon=False, loc="upper left")
    report.style(right, title="Wrong labels found")
    report.note(
        right,
        f"{numbers['repeats']} repeats; at 10 % inspected influence\n"
        f"finds {numbers['found_influence_0.10']:.1%}, loss {numbers['found_loss_0.10']:.1%}",
        x=0.5,
        y=0.2,
    )
    return figure


def _curves(ax: Axes, arrays: dict[str, NDArray[np.float64]], kind: str) -> None:
    at = arrays["inspected"]
    marks = {"influence_published": "D", "loss": "s", "random": "o"}
    for way, mark in marks.items():
        ax.plot(at, PAPER[kind][way], mark, color="#8d8d8d", markersize=4, alpha=0.8, linestyle=":", linewidth=0.8,
                label="paper" if way == "loss" else None, zorder=2)  # fmt: skip
    lines = {LABELS[way]: (at, arrays[f"{kind}_mean_{way}"], arrays[f"{kind}_error_{way}"]) for way in LABELS}
    uw.plots.shares(lines, ax)
    ax.legend().remove()


if __name__ == "__main__":
    report.run("fig6", compute, draw)
