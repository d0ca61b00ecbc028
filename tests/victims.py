"""Models for the tests of attacks: two digits by logistic regression, and a small network that counts its passes."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import upweight as uw

TIGHT = {"tol": 1e-12, "max_iter": 10_000}


@cache
def two_digits():
    """The influence of a classifier of fours and nines, trained on 200 of them, and all of them with their names."""
    X, y = load_digits(return_X_y=True)
    two = np.isin(y, (4, 9))
    X, names = X[two] / 16, np.where(y[two] == 4, "four", "nine")
    model = LogisticRegression(C=10.0, **TIGHT).fit(X[:200], names[:200])
    return uw.explain(model, X[:200], names[:200]), X, names


def loss_of(model, X, names):
    """The log loss of every row, by scikit-learn's own probabilities."""
    place = np.searchsorted(model.classes_, names)
    return -np.log(model.predict_proba(X)[np.arange(len(X)), place])


class Counting(nn.Module):
    """A body and a head; counts the examples that went through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh())
        self.head = nn.Linear(20, 3)
        self.passes = 0

    def forward(self, x):
        self.passes += len(x)
        return self.head(self.body(x))


def counted():
    net = Counting().eval()
    X = torch.rand(60, 1, 8, 8)
    y = torch.arange(60) % 3
    settings = {"loss": nn.functional.cross_entropy, "penalty": 0.01, "parameters": ["head.weight", "head.bias"]}
    return net, X, y, uw.retrained(uw.explain(net, X, y, **settings))
