"""Explain a misclassified digit, and check the answer by retraining: python examples/digits.py."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw

X, y = load_digits(return_X_y=True)
X, n = X / 16, 1400
model = LogisticRegression(C=1 / (0.01 * n), tol=1e-8, max_iter=2000).fit(X[:n], y[:n])
wrong = n + int(np.flatnonzero(model.predict(X[n:]) != y[n:])[0])
query = (X[wrong : wrong + 1], y[wrong : wrong + 1])

influence = uw.explain(model, X[:n], y[:n])
scores = influence.on_loss(*query)
print(scores)
for kind, top in (("helpful", scores.helpful(3)), ("harmful", scores.harmful(3))):
    rows = ", ".join(f"{row} (a {y[row]}): {value:+.4f}" for row, value in zip(top.rows[0], top.values[0], strict=True))
    print(f"most {kind}: {rows}")

most = np.argsort(-np.abs(scores.values[0]))[:20]
outcomes = uw.leave_one_out(influence, query, most)
print("first order:", uw.agreement(scores, outcomes))
print("Newton step:", uw.agreement(influence.of_removing(most, on=query), outcomes))
