"""Wrong labels found, in the order that planted flips choose, and corrected: python examples/repair.py [--full]."""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import upweight as uw

draw = np.random.default_rng(0)
if "--full" in sys.argv:  # Enron1's 5,172 e-mails, spam or not
    mail = uw.datasets.enron1()
    X, y = np.array(mail.texts, dtype=object), mail.labels.astype(int)
    model = make_pipeline(
        CountVectorizer(min_df=5, stop_words="english"), LogisticRegression(C=2.4, tol=1e-6, max_iter=9000)
    )
else:
    X, y = load_digits(return_X_y=True)
    X = X / 16
    model = make_pipeline(LogisticRegression(tol=1e-8, max_iter=1000))
order = draw.permutation(len(y))
train, test = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]

labels, classes = y[train].copy(), len(np.unique(y))
spoilt = draw.choice(len(labels), size=len(labels) // 10, replace=False)
labels[spoilt] = (labels[spoilt] + draw.integers(1, classes, len(spoilt))) % classes

influence = uw.explain(model.fit(X[train], labels), X[train], labels)
found = uw.apps.repair(influence, inspect=0.1)
print(f"Order: {found.chosen}. {found.why}\n{found.found(y[train])}")

right = {int(row): y[train][row] for row in found.rows}  # a person looks at each of them
made = uw.apps.corrected(influence, right, test=(X[test], y[test]))
print(made)
assert made.effect["test accuracy"] > 0  # beyond what training again does with nothing changed
