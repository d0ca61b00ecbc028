"""What `upweight repair` works on: the rows of a Study, or those of a table with a model that is fitted here.

The model of a table is a Pipeline: numbers are imputed by the median, with a column that says where, and scaled;
categories become 0/1 columns, rare values together; texts become tf-idf; then a LogisticRegression, whose C is chosen
by cross-validation. Beside the scores of `apps.repair` stand the loss, and for more than two classes the margin, of
each row by a model that did not see its label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float
from numpy.typing import NDArray

import upweight as uw
from upweight import apps
from upweight.cli.study import Study
from upweight.cli.table import Table, write_corrected
from upweight.errors import require

_FOLDS = 5
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of C
_WORDS, _VALUES, _RARE = 500, 50, 10  # of a text and of a category at most; rows that a value of its own needs
_BY_NEWTON = 1_500  # parameters up to which a factorisation is faster than L-BFGS


@dataclass(frozen=True)
class Labelled:
    """Labelled rows with their model, and how their files are written.

    Args:
        influence: of the model.
        describe: turns a row into a few words.
        about: what was read and fitted, in words and as plain numbers; empty for a Study, which the user wrote.
        numbers: what each row is called in the file it comes from.
        scores: further orders of inspection, as `apps.repair` takes them.
        retrain: how to train again.
        test: trusted queries.
        write: writes all labels, corrected, to a file.
    """

    influence: uw.Influence
    describe: Callable[[int], str] | None
    write: Callable[[apps.Corrected, Path], Path]
    about: tuple[str, dict[str, Any]] = ("", {})
    numbers: NDArray[np.int64] | None = None
    scores: Callable[[uw.Influence], Mapping[str, Any]] | None = None
    retrain: Any = None
    test: tuple[Any, ...] | None = None


def of_study(study: Study) -> Labelled:
    """The training rows of a Study; its queries are the test rows."""

    def write(made: apps.Corrected, file: Path) -> Path:
        return apps.write_labels(made.labels, file, ids=made.influence.examples.ids, overwrite=True)

    return Labelled(study.influence, study.describe, write, retrain=study.retrain, test=study.queries)


def of_table(table: Table) -> Labelled:
    """The rows of a table, with a model fitted to them.  Cost: 21 fits.

    Raises:
        MissingExtra: if scikit-learn is not installed.
    """
    require("sklearn", "sklearn")
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(_pipeline(table), {"model__C": _STRENGTHS}, cv=_folds(), scoring="neg_log_loss")
    search.fit(table.frame, table.labels)
    model = search.best_estimator_[-1]

    def scores(influence: uw.Influence) -> dict[str, Float[NDArray[np.float64], " n"]]:
        return out_of_fold(model, influence)

    def write(made: apps.Corrected, file: Path) -> Path:
        return write_corrected(table, made.patch, file)

    told = {"C": float(model.C), "log_loss": -float(search.best_score_), "parameters": int(model.coef_.size)}
    tried = ", ".join(f"{C:g}" for C in _STRENGTHS)
    text = (
        f"LogisticRegression on {model.coef_.shape[1]} columns; C = {model.C:g} of {tried} "
        f"by {_FOLDS}-fold cross-validation: log loss {-search.best_score_:.4f}"
    )
    influence = uw.explain(search.best_estimator_, table.frame, table.labels)
    about = (f"{table}\n{text}", table.to_dict() | {"model": told})
    return Labelled(influence, table.describe, write, about, table.numbers, scores)


def out_of_fold(model: Any, influence: uw.Influence) -> dict[str, Float[NDArray[np.float64], " n"]]:
    """Each row's loss, and for more than two classes its margin, by the fit without its fold; larger is suspicious.

    For two classes the margin gives the order of the loss.  Cost: five fits, of the last step of the Pipeline.
    """
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_predict

    X, labels = uw.training_inputs(influence), uw.training_labels(influence)
    P: Any = cross_val_predict(
        clone(model), X if scipy.sparse.issparse(X) else np.asarray(X), labels, cv=_folds(), method="predict_proba"
    )
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    own = P[np.arange(len(codes)), codes]
    found = {"out-of-fold-loss": -np.log(np.maximum(own, np.finfo(float).tiny))}
    if P.shape[1] > 2:
        others = np.where(np.arange(P.shape[1]) == codes[:, None], -np.inf, P).max(1)
        found["out-of-fold-margin"] = others - own
    return found


def _folds() -> Any:
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(_FOLDS, shuffle=True, random_state=0)


def _pipeline(table: Table) -> Any:
    """The columns of a table as numbers, and a classifier on them that is fitted tightly enough to be explained."""
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    seen = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=_RARE, max_categories=_VALUES)
    categories = make_pipeline(SimpleImputer(strategy="constant", fill_value="(missing)"), seen)
    steps: Any = [
        ("numbers", numbers, table.named("number", "boolean", "date")),
        ("categories", categories, table.named("category")),
    ]
    steps += [(f"text {name}", TfidfVectorizer(max_features=_WORDS), name) for name in table.named("text")]
    columns: Any = ColumnTransformer([step for step in steps if step[2]], sparse_threshold=0.1)
    outputs = len(np.unique(table.labels))
    size = columns.fit_transform(table.frame).shape[1] * (1 if outputs == 2 else outputs)
    solver = "newton-cholesky" if size <= _BY_NEWTON else "lbfgs"
    return Pipeline([("columns", columns), ("model", LogisticRegression(solver=solver, tol=1e-8, max_iter=10_000))])
