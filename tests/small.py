"""Small fitted models and data for the unit tests; each is made afresh or never changed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from jaxtyping import config
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import upweight as uw
from upweight.errors import UpweightError
from upweight.influence.certificate import Certificate
from upweight.influence.scores import Scores

N, D = 40, 3
_DRAW = np.random.default_rng(0)
X = _DRAW.normal(size=(N, D))
Y = (X @ [1.0, -1.0, 0.5] + _DRAW.normal(size=N) > 0).astype(np.int64)
NAMES = np.array(["no", "yes"])[Y]
Z = X @ [1.0, 2.0, -1.0] + _DRAW.normal(size=N)
XQ, YQ, NAMESQ, ZQ = X[:4] + 0.1, Y[:4], NAMES[:4], Z[:4] + 1


def changed(array, place, value):
    """A copy with one other entry."""
    other = np.array(array, dtype=np.result_type(array, type(value)))
    other[place] = value
    return other


@cache
def fitted(kind="logistic"):
    """A scikit-learn estimator at its minimum; shared, so never to be changed."""
    if kind == "logistic":
        return LogisticRegression(tol=1e-10, max_iter=5000).fit(X, NAMES)
    return {"ridge": Ridge(alpha=2.0), "linear": LinearRegression()}[kind].fit(X, Z)


def logistic(X=X, y=NAMES, **settings):
    return uw.explain(fitted(), X, y, **settings)


def ridge(X=X, y=Z, **settings):
    return uw.explain(fitted("ridge"), X, y, **settings)


def seeded(build):
    """What build() makes, from the same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def net(outputs=2, inputs=D, dtype=torch.float64):
    return seeded(lambda: nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))).to(dtype).eval()


# How LogisticRegression is told to use its l1_ratio: by `penalty`, until scikit-learn 1.8.
ELASTIC = {} if LogisticRegression().penalty == "deprecated" else {"penalty": "elasticnet"}


def classifier(model=None, X=X, y=Y, loss=cross_entropy, penalty=0.1, **settings):
    return uw.explain(model or net(), X, y, loss=loss, penalty=penalty, **settings)


def regressor(model=None, X=X, y=Z[:, None], loss=mse_loss, penalty=0.1, **settings):
    return uw.explain(model or net(1), X, y, loss=loss, penalty=penalty, **settings)


class Items:
    """A map-style Dataset of given items."""

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


def pairs(X=X, y=Y):
    return Items((torch.as_tensor(x), torch.as_tensor(np.asarray(label))) for x, label in zip(X, y, strict=True))


def row(name, kind, text, deed):
    """One line of a table of bad inputs: what is done, the builtin error, and what its text must say."""
    return pytest.param(deed, kind, text, id=name)


def refuses(deed, kind, text):
    """Outside the tests nothing checks annotations before the library does, so here nothing may either."""
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(kind, match=text) as refused:
            deed()
    finally:
        config.update("jaxtyping_disable", False)
    assert isinstance(refused.value, UpweightError)
    return refused.value


CARD = Certificate(
    np.array([1e-9, 2e-9]), True, 0.0, 1e-8, 0.3, 1.0, np.array([0.0, 1e-4]), "Hessian()", "Cholesky()", 3
)
VALUES = np.array([[0.5, -1.0, 0.5, 0.0, 2.0], [0.0, 0.0, -0.0, 0.0, -3.0]])
ROWS = np.array([10, 11, 12, 13, 14])


def made(**fields):
    """Scores of two queries and five rows, with other fields where they are given."""
    settings = {
        "values": VALUES,
        "counterfactual": "row removed",
        "rows": ROWS,
        "n": 40,
        "certificate": CARD,
        "scale": np.full(5, -1 / 40),
        "query_values": np.array([0.7, 0.1]),
    }
    return Scores(**settings | fields)


class Sentences(nn.Module):
    """Classes of sentences, from a mean over their words; asked with labels it tells its loss."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.words, self.head, self.factor = nn.Embedding(20, 4), nn.Linear(4, 3), factor

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        logits = self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))
        return {"logits": logits, "loss": None if labels is None else self.factor * cross_entropy(logits, labels)}


def sentences(labelled=True):
    draw = np.random.default_rng(0)
    found = [{"input_ids": draw.integers(0, 20, 3 + k % 4).tolist()} for k in range(12)]
    return [{**row, "labels": k % 3} if labelled else row for k, row in enumerate(found)]


class NextForCausalLM(nn.Module):
    """The next of 12 tokens, by this one."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 3), nn.Linear(3, 12)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])}


def sequences():
    """Rows of three to six tokens for it."""
    draw = np.random.default_rng(0)
    return [{"input_ids": draw.integers(0, 12, 3 + k % 4).tolist()} for k in range(8)]
