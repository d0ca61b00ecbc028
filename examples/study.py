"""A Study for the command line, run in this folder: upweight top study:breast_cancer --query 3."""

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw


def breast_cancer() -> uw.Study:
    bunch = load_breast_cancer()
    X, y, n = bunch.data, bunch.target_names[bunch.target], 469
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000)).fit(X[:n], y[:n])
    influence = uw.explain(model, X[:n], y[:n])
    return uw.Study(influence, (X[n:], y[n:]), describe=lambda row: f"{y[row]}, radius {X[row, 0]:.1f}")
