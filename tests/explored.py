"""A run of digits, some of them with wrong labels, and a client that asks the explorer as a browser does."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from starlette.testclient import TestClient

import upweight as uw
from upweight.explore.comparing import together
from upweight.explore.guard import Keys
from upweight.explore.server import application

TRAIN, WRONG, ASKED = 500, 25, 60
HOST = "127.0.0.1:8123"


def digits():
    """X, y with the first WRONG labels of the training rows moved on by one, and the pictures."""
    bunch = load_digits()
    labels = bunch.target.copy()
    labels[:WRONG] = (labels[:WRONG] + 1) % 10
    return bunch.data / 16, labels, np.uint8(255 - bunch.images * 15.9)


def influence(**settings):
    """Of a model of the first TRAIN digits."""
    X, y, _ = digits()
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit(X[:TRAIN], y[:TRAIN])
    return uw.explain(model, X[:TRAIN], y[:TRAIN], **settings)


def queries():
    """(Xq, yq) of the digits behind them."""
    X, y, _ = digits()
    asked = slice(TRAIN, TRAIN + ASKED)
    return X[asked], y[asked]


def write(path, **settings):
    """A run folder of them, with pictures."""
    pictures = digits()[2]
    return uw.write_run(
        influence(**settings),
        path,
        *queries(),
        card=lambda row: pictures[row],
        query_card=lambda query: pictures[TRAIN + query],
        parts=2,
    )


def browser(path, other=None):
    """A client that has opened the link."""
    keys = Keys(8123)
    client = TestClient(application(together(path, other), [HOST], keys), base_url=f"http://{HOST}")
    assert client.get(f"/?token={keys.token}").status_code == 200
    return client


def post(client, path, told):
    """A change, as our own pages make it."""
    return client.post(path, json=told, headers={"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"})
