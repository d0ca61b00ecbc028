"""How far can one training row that nobody sees change move an answer: python examples/attack.py [--full]."""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw

if "--full" in sys.argv:  # MNIST, 4 against 9: 5,000 rows of 784 pixels
    data = uw.datasets.mnist()
    X, y, train, level = data.images / 255.0, data.labels.astype(int), 5000, 1 / 255
else:
    X, y = load_digits(return_X_y=True)
    X, train, level = X / 16, 260, 1 / 16
two = np.flatnonzero(np.isin(y, (4, 9)))[: train + 100]
X, y = X[two], y[two]
test = (X[train:], y[train:])

model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(X[:train], y[:train])
influence = uw.explain(model, X[:train], y[:train])
ranked = uw.apps.vulnerability(influence, test, level=level)
weakest = int(np.argmax(ranked.by_query / ranked.query_losses.clip(1e-3)))
on = (test[0][[weakest]], test[1][[weakest]])
print(ranked)

made = uw.apps.attack(influence, on, count=10, level=level, step=0.1, iterations=20, test=test)
print(made)
assert made.rounds_back
assert made.loss[1] > made.loss[0]

flips = uw.apps.flip_labels(influence, on, 5, test=test)
print(flips)
