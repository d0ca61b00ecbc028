"""Which few labels would correct a wrong prediction, really tried: python examples/contrast.py [--full]."""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw

if "--full" in sys.argv:  # a hundred wrong digits of MNIST
    data = uw.datasets.mnist()
    shrink = lambda images: (images / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)  # noqa: E731
    X, y, k = shrink(data.images[:5000]), data.labels[:5000].astype(int), 100
    Xq, yq = shrink(data.test_images), data.test_labels.astype(int)
else:
    X, y = load_digits(return_X_y=True)
    X, y, Xq, yq, k = X[:1000] / 16, y[:1000], X[1000:] / 16, y[1000:], 12

model = LogisticRegression(C=1 / (0.01 * len(X)), tol=1e-8, max_iter=5000).fit(X, y)
wrong = np.flatnonzero(model.predict(Xq) != yq)[:k]
influence = uw.explain(model, X, y)
for ask in (uw.apps.contrast, uw.apps.contrast_by_removal):
    found = ask(influence, (Xq[wrong], yq[wrong]))
    print(found if k < 20 else str(found).splitlines()[0])
    assert found.corrected_rate >= 0.8
