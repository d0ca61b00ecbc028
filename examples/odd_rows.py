"""Find flipped labels by self-influence: python examples/odd_rows.py."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import upweight as uw

X, y = load_breast_cancer(return_X_y=True)
flipped = np.random.default_rng(0).choice(len(y), size=len(y) // 10, replace=False)
y[flipped] = 1 - y[flipped]

model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=1000)).fit(X, y)
self_scores = uw.explain(model, X, y).of_self()
inspected = self_scores.top(len(flipped)).rows
found = np.isin(inspected, flipped).sum()
print(
    f"{len(flipped)} of {len(y)} labels were flipped; the {len(inspected)} rows of largest self-influence hold {found}"
)
assert found > 0.6 * len(flipped)
