"""The explorer over a run of digits, some of them with wrong labels: asked as a browser asks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from starlette.testclient import TestClient

import upweight as uw
from upweight.explore.explorer import Explorer
from upweight.explore.guard import Keys
from upweight.explore.server import application

TRAIN, WRONG = 500, 25
HOST = "127.0.0.1:8123"


def digits():
    """X, y with the first WRONG labels of the training rows moved on by one, and the pictures."""
    bunch = load_digits()
    labels = bunch.target.copy()
    labels[:WRONG] = (labels[:WRONG] + 1) % 10
    return bunch.data / 16, labels, np.uint8(255 - bunch.images * 15.9)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run folder with its index; to be read only."""
    X, y, pictures = digits()
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit(X[:TRAIN], y[:TRAIN])
    path = tmp_path_factory.mktemp("explored") / "digits"
    influence = uw.explain(model, X[:TRAIN], y[:TRAIN])
    asked = slice(TRAIN, TRAIN + 60)
    uw.write_run(
        influence,
        path,
        X[asked],
        y[asked],
        card=lambda row: pictures[row],
        query_card=lambda query: pictures[TRAIN + query],
    )
    Explorer.open(path)
    return path


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(made, tmp_path / "digits")


def browser(path, keys=None, **more):
    """A client that has opened the link, and the keys."""
    keys = keys or Keys(8123)
    client = TestClient(application(Explorer.open(path, **more), [HOST], keys), base_url=f"http://{HOST}")
    assert client.get(f"/?token={keys.token}").status_code == 200
    return client


@pytest.fixture(scope="session")
def client(made):
    """A client of the run that is read only."""
    return browser(made)


def post(client, path, told):
    """A change, as our own pages make it."""
    return client.post(path, json=told, headers={"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"})
