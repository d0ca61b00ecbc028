"""Which rows and features are responsible for a model's errors: python examples/mismatch.py [--full]."""

import sys

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import upweight as uw

if "--full" in sys.argv:  # the paper's section 5.3 and its split: 24 children in the training set, 3 of them readmitted
    data = uw.datasets.diabetes130()
    X, y, names, kind = data.inputs.astype(float), data.readmitted, data.names, "age_[0-10)"
    source, penalty, draw = data.columns["age"], 1e-4, np.random.RandomState(2)
    classes = [np.flatnonzero(y == 1), np.flatnonzero(y == 0)]
    for rows in classes:
        draw.shuffle(rows)
    train = np.concatenate([rows[:10_000] for rows in classes])
    draw.shuffle(train)
else:  # tumours: one band of texture, in which most are benign
    X, y = load_breast_cancer(return_X_y=True)
    band = np.digitize(X[:, 1], np.quantile(X[:, 1], np.arange(1, 8) / 8))
    names, kind = ["smoothness", "symmetry", *(f"texture_{b}" for b in range(8))], "texture_1"
    X = np.column_stack([(X[:, [4, 8]] - X[:, [4, 8]].mean(0)) / X[:, [4, 8]].std(0), np.eye(8)[band]])
    source, penalty, train = band, 1e-3, np.arange(0, len(y), 2)
    y = 1 - y  # 1 is malignant

of_kind = X[:, names.index(kind)] == 1
left_out = train[(y[train] == 0) & of_kind[train]][:-1]  # all of this kind but the last that are not of class 1
test, train = np.setdiff1d(np.arange(len(y)), train), train[~np.isin(train, left_out)]
model = LogisticRegression(C=1 / (len(train) * penalty), fit_intercept=False, solver="newton-cholesky", tol=1e-10)
model.fit(X[train], y[train])

errors = test[of_kind[test] & (model.predict(X[test]) != y[test])]
influence = uw.explain(model, X[train], y[train])
found = uw.apps.mismatch(influence, (X[errors], y[errors]), feature_names=names, groups=source[train])
print(found)
shown = found.responsible
print(f"{of_kind[train][shown].sum()} of the {len(shown)} rows that stand out have {kind}")
