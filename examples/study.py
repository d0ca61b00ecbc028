"""A Study for the command line, run in this folder: upweight top study.py:breast_cancer --query 3."""

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import upweight as uw


def breast_cancer() -> uw.Study:
    bunch = load_breast_cancer()
    y, n = bunch.target_names[bunch.target], 469
    scaler = StandardScaler().fit(bunch.data[:n])
    X = scaler.transform(bunch.data)  # outside the model: `upweight attack` moves the inputs that the model takes
    model = LogisticRegression(tol=1e-8, max_iter=1000).fit(X[:n], y[:n])
    influence = uw.explain(model, X[:n], y[:n])
    return uw.Study(influence, (X[n:], y[n:]), describe=lambda row: f"{y[row]}, radius {bunch.data[row, 0]:.1f}")
