"""What stands before an estimator: text, categories, columns, components; and estimators that are refused."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.ensemble import StackingClassifier, StackingRegressor, VotingClassifier, VotingRegressor
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    Lasso,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    MultiTaskLasso,
    Perceptron,
    Ridge,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler, TargetEncoder
from sklearn.svm import SVC, LinearSVC, NuSVC, NuSVR

import upweight as uw
from estimators import NEW_CV, close
from small import ELASTIC

WORDS = np.array(str.split("good bad fine poor great awful film plot actor scene the a of and was is very quite"))
TIGHT = {"tol": 1e-12, "max_iter": 10_000}


def reviews(n=60):
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, size=8)) for _ in range(n)]
    return texts, np.array(["+" if ("good" in text) + ("great" in text) > ("bad" in text) else "-" for text in texts])


def table(n=60):
    pandas = pytest.importorskip("pandas")
    draw = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"age": draw.normal(40, 10, n), "town": draw.choice(["A", "B", "C"], n), "pay": draw.gamma(2, 3, n)}
    )
    return frame, frame["age"] / 10 + frame["pay"] + (frame["town"] == "B") + draw.normal(size=n)


@pytest.mark.parametrize("vectorizer", [CountVectorizer, TfidfVectorizer])
def test_text_goes_through_the_vectorizer_and_stays_sparse(vectorizer):
    texts, y = reviews()
    model = make_pipeline(vectorizer(), LogisticRegression(**TIGHT)).fit(texts[:50], y[:50])
    influence = uw.explain(model, texts[:50], y[:50])
    assert scipy.sparse.issparse(influence.examples.x)
    assert scipy.sparse.issparse(influence.encoder.examples(texts[50:], y[50:]).x)
    dense = uw.explain(model[-1], model[:-1].transform(texts[:50]).toarray(), y[:50])
    Zq = model[:-1].transform(texts[50:]).toarray()
    close(influence.on_loss(texts[50:], y[50:]).values, dense.on_loss(Zq, y[50:]).values, 1e-10)
    assert influence.feature_names == model[:-1].get_feature_names_out().tolist()
    moved = influence.of_perturbing([3], on=(texts[50:], y[50:]))
    assert moved.shape == (10, 1, len(influence.feature_names))
    swapped = influence.of_replacing([3], [texts[7]], [y[7]], on=(texts[50:], y[50:]))
    close(
        swapped.values[:, 0],
        dense.of_replacing([3], model[:-1].transform([texts[7]]).toarray(), [y[7]], on=(Zq, y[50:])).values[:, 0],
        1e-10,
    )


def test_columns_of_a_frame_keep_their_names():
    frame, y = table()
    towns = ColumnTransformer([("scaled", StandardScaler(), ["age", "pay"]), ("town", OneHotEncoder(), ["town"])])
    model = make_pipeline(towns, Ridge(alpha=0.5)).fit(frame[:50], y[:50])
    influence = uw.explain(model, frame[:50], y[:50])
    assert influence.feature_names == ["scaled__age", "scaled__pay", "town__town_A", "town__town_B", "town__town_C"]
    assert influence.of_perturbing([0], on=(frame[50:], y[50:])).shape == (10, 1, 5)
    out = uw.leave_one_out(influence, (frame[50:], y[50:]), [0, 1, 2], progress=False)
    close(influence.of_removing([0, 1, 2], on=(frame[50:], y[50:])).values, out.actual, 1e-8)


def test_names_come_from_the_frame_of_fit_or_there_are_none():
    frame, y = table()
    numbers = frame[["age", "pay"]]
    assert uw.explain(Ridge().fit(numbers, y), numbers, y).feature_names == ["age", "pay"]
    assert uw.explain(Ridge().fit(numbers.to_numpy(), y), numbers.to_numpy(), y).feature_names is None
    module = torch.nn.Linear(2, 1)
    plain = uw.explain(module, numbers.to_numpy(), y.to_numpy()[:, None], loss=torch.nn.functional.mse_loss)
    assert plain.feature_names is None


def test_principal_components_are_held_fixed():
    draw = np.random.default_rng(0)
    X, y = draw.normal(size=(50, 6)), draw.normal(size=50)
    model = make_pipeline(PCA(3), KernelRidge(kernel="rbf")).fit(X[:40], y[:40])
    influence = uw.explain(model, X[:40], y[:40])
    out = uw.leave_one_out(influence, (X[40:], y[40:]), [0, 5], progress=False)
    again = KernelRidge(kernel="rbf").fit(model[:-1].transform(X[1:40]), y[1:40])
    truth = (again.predict(model[:-1].transform(X[40:])) - y[40:]) ** 2 - (model.predict(X[40:]) - y[40:]) ** 2
    close(out.actual[:, 0], truth, 1e-8)


def test_a_lasso_moves_its_active_set_and_says_so():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(80, 12))
    y = X[:, :3] @ [2.0, -1.5, 1.0] + draw.normal(size=80)
    model = Lasso(alpha=0.25, tol=1e-12).fit(X, y)
    active = np.flatnonzero(model.coef_)
    assert 0 < len(active) < 12
    influence = uw.explain(model, X, y)
    assert f"active set ({len(active)} of 12 features)" in influence.objective.name
    moved = influence.of_perturbing([0, 1], on=(X[:2], y[:2]))
    assert moved.shape == (2, 2, 12)
    assert not np.delete(moved, active, 2).any()
    assert moved[:, :, active].all()
    rows = np.argsort(-np.abs(influence.on_loss(X[:4], y[:4]).values).max(0))[:12]
    out = uw.leave_one_out(influence, (X[:4], y[:4]), rows, progress=False)
    others = 0
    for row, actual in zip(rows, out.actual.T, strict=True):
        again = Lasso(alpha=0.25, tol=1e-12).fit(np.delete(X, row, 0), np.delete(y, row))
        others += not np.array_equal(np.flatnonzero(again.coef_), active)
        close(actual, (again.predict(X[:4]) - y[:4]) ** 2 - (model.predict(X[:4]) - y[:4]) ** 2, 1e-6)
    assert others  # some refits leave the active set, and are measured with all features
    with pytest.raises(uw.errors.UnsupportedModel, match="all 12 coefficients to zero"):
        uw.explain(Lasso(alpha=100.0).fit(X, y), X, y)
    with pytest.raises(uw.errors.UnsupportedModel, match="2 outputs"):
        uw.explain(Lasso(alpha=0.1).fit(X, np.stack([y, y], 1)), X, np.stack([y, y], 1))


def test_a_gram_matrix_is_taken_as_it_is():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(60, 4))
    y = (X[:, 0] + 0.5 * draw.normal(size=60) > 0).astype(int)
    K = X @ X.T + 0.1 * np.eye(60)
    model, same = SVC(kernel="precomputed", tol=1e-9).fit(K[:50, :50], y[:50]), KernelRidge(kernel="precomputed")
    with pytest.warns(uw.errors.TheoryWarning, match="0.001"):
        influence = uw.explain(model, K[:50, :50], y[:50])
    out = uw.leave_one_out(influence, (K[50:, :50], y[50:]), [int(model.support_[3])], progress=False)
    keep = np.delete(np.arange(50), model.support_[3])
    again = SVC(kernel="precomputed", tol=1e-9).fit(K[np.ix_(keep, keep)], y[keep])
    margin = (2 * y[50:] - 1) * again.decision_function(K[50:][:, keep])
    before = (2 * y[50:] - 1) * model.decision_function(K[50:, :50])
    close(out.actual[:, 0], np.maximum(0, 1 - margin) - np.maximum(0, 1 - before), 1e-6)
    same.fit(K[:50, :50], y[:50])
    assert uw.explain(same, K[:50, :50], y[:50]).check().rows_from_minimum < 1e-6


X = np.random.default_rng(0).normal(size=(40, 3))
Y = (X[:, 0] > 0).astype(int)
Z = X @ [1.0, 2.0, 3.0]
THREE = np.arange(40) % 3


REFUSED = {
    "calibrated": (CalibratedClassifierCV(LogisticRegression()), Y, "before calibration"),
    "one-vs-rest": (OneVsRestClassifier(LogisticRegression()), THREE, r"model.estimators_\[k\], X, y =="),
    "one-vs-one": (OneVsOneClassifier(LogisticRegression()), THREE, "use SVC"),
    "search": (GridSearchCV(LogisticRegression(), {"C": [1.0, 2.0]}), Y, r"explain\(model.best_estimator_, X, y\)"),
    "several outputs": (MultiOutputRegressor(Ridge()), np.stack([Z, Z], 1), "each of its estimators_"),
    "several tasks": (MultiTaskLasso(), np.stack([Z, Z], 1), "one Lasso per output"),
    "another target": (TransformedTargetRegressor(Ridge()), Z, "regressor_"),
    "nu classes": (NuSVC(nu=0.2), Y, "Refit as SVC"),
    "nu numbers": (NuSVR(), Z, "Refit as SVR"),
    "perceptron": (Perceptron(), Y, "loss='hinge'"),
    "sgd perceptron": (SGDClassifier(loss="perceptron"), Y, "loss='hinge'"),
    "sgd of three": (SGDClassifier(), THREE, "one binary model per class"),
    "sgd with l1": (SGDClassifier(penalty="l1"), Y, "penalty='l2'"),
    "sgd of a regression loss": (SGDClassifier(loss="squared_error", eta0=1e-3), Y, "RidgeClassifier"),
    "sgd that held rows out": (SGDRegressor(early_stopping=True), Z, "early_stopping=False"),
    "linear svc of three": (LinearSVC(), THREE, "SVC\\(kernel='linear'\\)"),
    "linear svc with l1": (LinearSVC(penalty="l1", dual=False), Y, "penalty='l2'"),
    "a kernel that is not positive": (SVC(kernel="sigmoid", gamma=2.0, coef0=-3.0), Y, "not positive"),
    "a network of several labels": (MLPClassifier(), np.stack([Y, 1 - Y], 1), "one model per label"),
    "a network that held rows out": (MLPClassifier(early_stopping=True), Y, "early_stopping=False"),
    "positive": (LinearRegression(positive=True), Z, "positive=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do_instead(name):
    model, y, advice = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    with pytest.raises(uw.errors.UnsupportedModel, match=advice):
        uw.explain(model, X, y)


def test_threshold_and_several_models_are_refused_with_lines_that_work():
    named = [("a", LogisticRegression()), ("b", LogisticRegression(C=2.0))]
    numbered = [("a", Ridge()), ("b", Ridge(alpha=2.0))]
    frozen = FrozenEstimator(LogisticRegression().fit(X, Y))
    followed(FixedThresholdClassifier(LogisticRegression()).fit(X, Y), X, Y)
    followed(TunedThresholdClassifierCV(LogisticRegression()).fit(X, Y), X, Y)
    followed(frozen, X, Y)
    followed(VotingClassifier(named).fit(X, WORD_OF[Y]), X, WORD_OF[Y], k=1)
    followed(StackingClassifier(named).fit(X, WORD_OF[Y]), X, WORD_OF[Y], k=1)
    before = [(name, model.fit(X, WORD_OF[Y])) for name, model in named]
    followed(StackingClassifier(before, cv="prefit").fit(X, WORD_OF[Y]), X, WORD_OF[Y], k=1)
    followed(VotingRegressor(numbered).fit(X, Z), X, Z, k=1)
    followed(StackingRegressor(numbered).fit(X, Z), X, Z, k=1)
    followed(MultiOutputRegressor(Ridge()).fit(X, np.stack([Z, -Z], 1)), X, np.stack([Z, -Z], 1), k=1)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"StandardScaler transforms X and predicts nothing"):
        uw.explain(StandardScaler().fit(X), X, Y)


WORD_OF = np.array(["no", "yes", "maybe"])


def followed(model, X, y, line=0, k=0):
    """The influence that the refusal's advice gives, its explain(…) typed as it stands, without a warning."""
    with pytest.raises(uw.errors.UnsupportedModel) as refused:
        uw.explain(model, X, y)
    text = str(refused.value)
    start = [match.start() for match in re.finditer(r"explain\(", text)][line]
    ends = [i for i in range(start, len(text)) if text[start : i + 1].count("(") == text[start : i + 1].count(")") > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return eval(
            text[start : ends[0] + 1], {"explain": uw.explain, "np": np, "model": model, "X": X, "y": y, "k": k}
        )


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a pipeline"])
def test_advice_on_one_vs_rest_and_other_targets_works_when_followed(inside):
    def fitted(estimator, y):
        return (make_pipeline(StandardScaler(), estimator) if inside else estimator).fit(X, y)

    sharp = LogisticRegression(**TIGHT)
    assert followed(fitted(OneVsRestClassifier(sharp), WORD_OF[THREE]), X, WORD_OF[THREE], k=2).n == len(X)
    assert followed(fitted(OneVsRestClassifier(sharp), WORD_OF[Y]), X, WORD_OF[Y], line=1).n == len(X)
    assert followed(fitted(GridSearchCV(sharp, {"C": [1.0]}), Y), X, Y).n == len(X)
    logged = TransformedTargetRegressor(Ridge(), func=np.log, inverse_func=np.exp)
    influence = followed(fitted(logged, np.exp(Z)), X, np.exp(Z))
    close(influence.examples.y.reshape(-1), Z, 1e-12)
    two = np.stack([Z, -Z], 1)
    assert followed(fitted(TransformedTargetRegressor(Ridge(), transformer=StandardScaler()), two), X, two).n == len(X)


@pytest.mark.parametrize("model", [SGDRegressor(), SGDClassifier(loss="log_loss"), LinearSVC(), Ridge()])
@pytest.mark.parametrize("scaled", [False, True], ids=["array", "pipeline"])
def test_float32_rows_are_no_other_model(model, scaled):
    small = (30 * X).astype(np.float32)
    y = Z if hasattr(model, "predict") and not hasattr(model, "decision_function") else Y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = make_pipeline(StandardScaler(), model) if scaled else model
        assert uw.explain(whole.fit(small, y), small, y).n == len(X)


@pytest.mark.parametrize(
    ("model", "retrain"),
    [
        (SVC(), None),
        (SVC(kernel="linear"), uw.Refit()),
        (LogisticRegression(**TIGHT), uw.Newton()),
        (LogisticRegression(**TIGHT), uw.Refit()),
        (MLPClassifier(solver="lbfgs", hidden_layer_sizes=(3,), alpha=1.0, max_iter=2000), uw.Refit()),
    ],
    ids=["svc", "linear svc", "newton", "refit", "network"],
)
def test_the_last_row_of_a_class_cannot_be_left_out(model, retrain, capfd):
    kept = np.concatenate([np.flatnonzero(THREE == 0)[:1], np.flatnonzero(THREE > 0)])
    rows, y = X[kept], WORD_OF[THREE[kept]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        influence = uw.explain(model.fit(rows, y), rows, y)
    refused = (
        "Without row\\(s\\) 0 no row of class 'no' is left, so fit\\(\\) solves another problem, of 2 instead of 3"
    )
    with pytest.raises(uw.errors.Undefined, match=refused):
        uw.leave_one_out(influence, (rows[1:3], y[1:3]), [0], retrain)
    assert not capfd.readouterr().out
    assert np.isfinite(uw.leave_one_out(influence, (rows[1:3], y[1:3]), [1], retrain).actual).all()


def test_newton_without_a_class_is_refused_even_where_the_objective_keeps_a_minimum():
    """With a penalised intercept, or none, it has one; but fit() has another problem, or none."""
    kept = np.concatenate([np.flatnonzero(Y == 0)[:1], np.flatnonzero(Y == 1)])
    rows, y = X[kept], Y[kept]
    for settings in ({"fit_intercept": False}, {"solver": "liblinear"}):
        influence = uw.explain(LogisticRegression(**settings | TIGHT).fit(rows, y), rows, y)
        with pytest.raises(uw.errors.Undefined, match="no row of class 0 is left"):
            uw.leave_one_out(influence, (rows[:3], y[:3]), [0], uw.Newton())
        assert np.isfinite(uw.leave_one_out(influence, (rows[:3], y[:3]), [1], uw.Newton()).actual).all()


def test_a_target_encoder_is_named_when_it_leaves_the_minimum():
    frame, y = table(200)
    towns = make_pipeline(ColumnTransformer([("town", TargetEncoder(), ["town"])], remainder="passthrough"), Ridge())
    with pytest.warns(uw.errors.TheoryWarning, match="TargetEncoder, whose fit_transform"):
        uw.explain(towns.fit(frame, y), frame, y)
    encoded = TargetEncoder().fit(frame[["town"]], y).transform(frame[["town"]])
    uw.explain(Ridge().fit(encoded, y), encoded, y)  # the advice; a warning would be an error


def test_cross_validated_logistic_regression_is_refused_where_it_is_not_one_fit():
    settings = NEW_CV | TIGHT | {"Cs": 2, "cv": 2}
    averaged = LogisticRegressionCV(refit=False, **settings).fit(X, Y)
    with pytest.raises(uw.errors.UnsupportedModel, match="refit=True"):
        uw.explain(averaged, X, Y)
    mixed = LogisticRegressionCV(**settings | ELASTIC | {"l1_ratios": (0.5,), "solver": "saga", "tol": 0.1}).fit(X, Y)
    with pytest.raises(uw.errors.UnsupportedModel, match=r"l1 share of 0\.5"):
        uw.explain(mixed, X, Y)


def test_refit_needs_an_estimator():
    influence = uw.explain(torch.nn.Linear(3, 1), X, Z[:, None], loss=torch.nn.functional.mse_loss)
    with pytest.raises(uw.errors.InvalidInput, match=r"Refit\(\) runs the fit"):
        uw.leave_one_out(influence, (X[:1], Z[:1, None]), [0], uw.Refit())
