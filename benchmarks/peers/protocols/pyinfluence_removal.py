"""pyinfluence's removal and detection curves, `docs/images/_generate.py` of its repository: the figures of its README.

Ridge on 200 synthetic rows, ten of which have a spoilt target: the most harmful rows are left out, and the mean loss of
50 queries is looked at; and the share of the ten among the rows of the largest self-influence.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import steps
from sklearn.linear_model import Ridge

LIBRARY, TITLE = "pyinfluence", "Spoilt targets, a removal curve (pyinfluence)"
DOCUMENTED = (
    "`docs/images/_generate.py` of its repository, which draws the figures of its README: Ridge(alpha=1) on 200 "
    "synthetic rows of 8 features, the targets of ten of them moved by 8 to 12; the rows that are said to harm 50 "
    "queries most are left out, 5 %, 10 %, … 30 %, and the model is fitted again: its `removal_curve`. Beside it the "
    "share of the ten among the ten rows of the largest self-influence."
)
SMALLER = "nothing"
FRACTIONS = np.linspace(0.0, 0.3, 7)


def scenario() -> tuple[np.ndarray, ...]:
    """Its rows, targets, queries, and which rows are spoilt: the same draws in the same order."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(200, 8))
    beta = draw.normal(size=8)
    y = X @ beta + 0.1 * draw.normal(size=200)
    spoilt = draw.choice(np.arange(100, 150), size=10, replace=False)
    y[spoilt] += draw.choice([-1, 1], size=10) * (8 + 4 * draw.uniform(size=10))
    Xq = draw.normal(size=(50, 8))
    return X, y, Xq, Xq @ beta + 0.1 * draw.normal(size=50), spoilt


def theirs(folder: Path) -> None:
    """Scores of the queries and self-influence, with its damping of 1e-3."""
    from pyinfluence import InfluenceFunctions, self_influence

    X, y, Xq, yq, _ = scenario()
    model = Ridge(alpha=1.0).fit(X, y)

    def attributor() -> Any:
        return InfluenceFunctions(mode="loss", damping=1e-3).fit(model, X, y)

    steps.scored(folder, "pyinfluence, InfluenceFunctions", lambda: attributor().explain(Xq, yq), again=True)
    np.save(folder / "self-pyinfluence.npy", self_influence(attributor()))


def ours(folder: Path) -> None:
    """The same estimator: on_loss, Newton steps of single rows, of_self."""
    import upweight as uw

    X, y, Xq, yq, _ = scenario()
    model = Ridge(alpha=1.0).fit(X, y)
    steps.scored(folder, "upweight, on_loss", lambda: uw.explain(model, X, y).on_loss(Xq, yq).values, again=True)

    def steps_of_newton() -> Any:
        return uw.explain(model, X, y).of_removing(range(len(X)), on=(Xq, yq)).values

    steps.scored(folder, "upweight, of_removing", steps_of_newton, again=True)
    np.save(folder / "self-upweight.npy", uw.explain(model, X, y).of_self().values)


def measured(folder: Path) -> None:
    """pyinfluence's own `removal_curve` on every library's scores."""
    from pyinfluence import removal_curve

    X, y, Xq, yq, spoilt = scenario()
    model = Ridge(alpha=1.0).fit(X, y)
    rows: list[list[Any]] = []
    random = None
    for facts, scores in steps.every(folder):
        if scores is None:
            rows.append([facts["name"], facts["error"], *[None] * len(FRACTIONS), None])
            continue
        given = SimpleNamespace(
            explain=lambda *_, scores=scores: scores, model_=model, X_train_=X, y_train_=y, mode="loss", fit=None
        )
        curve = removal_curve(given, Xq, yq, fractions=FRACTIONS, n_random=5, random_state=0)
        random = curve["random_mean"]
        own = np.load(folder / f"self-{facts['name'].partition(',')[0]}.npy")
        found = len(set(np.argsort(-np.abs(own))[: len(spoilt)]) & set(spoilt.tolist())) / len(spoilt)
        rows.append([facts["name"], *map(float, curve["by_influence"]), found, facts["processor_seconds"]])
    rows.append(["random rows", *map(float, random), None, None])
    columns = ["library, method", *(f"{fraction:.0%} left out" for fraction in FRACTIONS)]
    steps.told(folder, [*columns, "spoilt among 10", "processor s"], rows)


STEPS = (("pyinfluence", "theirs"), ("upweight", "ours"), ("pyinfluence", "measured"))

if __name__ == "__main__":
    steps.main(theirs=theirs, ours=ours, measured=measured)
