"""What a right answer rests on, for two models: python examples/understand.py [--full]."""

import sys
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

import upweight as uw

if "--full" in sys.argv:  # the same digits of MNIST
    data = uw.datasets.mnist()
    X, y, train = data.images / 255.0, data.labels.astype(int), 2000
else:
    X, y = load_digits(return_X_y=True)
    X, train = X / 16, 260
two = np.flatnonzero(np.isin(y, (4, 9)))[: train + 100]
X, y = X[two], y[two]
rows, queries = (X[:train], y[:train]), (X[train:], y[train:])
gamma = 30 / X.shape[1]

warnings.simplefilter("ignore", uw.errors.TheoryWarning)  # a hinge has kinks; it is explained by a smooth one
machine = uw.explain(SVC(gamma=gamma).fit(*rows), *rows, loss=uw.losses.smooth_hinge(0.1))
line = uw.explain(LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(*rows), *rows)
near = uw.apps.understand(machine, queries, X=rows[0], k=3)
far = uw.apps.understand(line, queries, X=rows[0], k=3)
print(near)
print()
print(uw.apps.side_by_side({"kernel machine": near, "logistic regression": far}))
assert np.median(near.half) < np.median(far.half)
