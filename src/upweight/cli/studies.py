"""Four studies of the explorer's demo: pictures of digits, MNIST, e-mails, and stays in hospital.

Each is a function that returns a Study, with cards that show what a row is, as a study of your own would be:

    upweight demo --explore --data enron1
    upweight prove upweight.cli.studies:enron1 --run upweight-demo/enron1

The data of all but the first are downloaded once, or read from $UPWEIGHT_DATA (`upweight.datasets`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from upweight.adapters import explain
from upweight.cli.study import Study
from upweight.data import datasets
from upweight.errors import require

_L2 = 0.01


def digits(rows: int = 1400, queries: int = 397) -> Study:
    """The digits that ship with scikit-learn, all of them: 1,400 to train on, 397 asked."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    X, y, end = bunch.data / 16, bunch.target, rows + queries
    return _pictures((X[:rows], y[:rows]), (X[rows:end], y[rows:end]), _L2, (8, 8))


def mnist(rows: int = 2000, queries: int = 300) -> Study:
    """The first fours, sevens and nines of MNIST, which are mistaken for each other most, and those of its test set."""
    data = datasets.mnist()
    own, other = (np.flatnonzero(np.isin(labels, (4, 7, 9))) for labels in (data.labels, data.test_labels))
    train = data.images[own[:rows]] / 255, data.labels[own[:rows]].astype(int)
    asked = data.test_images[other[:queries]] / 255, data.test_labels[other[:queries]].astype(int)
    return _pictures(train, asked, _L2, (28, 28))


def enron1(rows: int = 1200, queries: int = 300) -> Study:
    """E-mails of Enron1 in a random order, as counts of their words, and which are spam."""
    mail = datasets.enron1()
    order = np.random.default_rng(0).permutation(len(mail.texts))[: rows + queries]
    texts = np.array([mail.texts[place] for place in order], dtype=object)
    y = np.array(["ham", "spam"])[mail.labels[order]]
    words = require("sklearn.feature_extraction.text", "demo").CountVectorizer(min_df=3, binary=True)
    model = _pipeline(words, _logistic(_L2, rows)).fit(texts[:rows], y[:rows])
    return Study(
        explain(model, texts[:rows], y[:rows], ids=[mail.names[place] for place in order[:rows]]),
        (texts[rows:], y[rows:]),
        card=lambda row: str(texts[row]),
        query_card=lambda query: str(texts[rows + query]),
    )


def hospital(rows: int = 4000, queries: int = 400) -> Study:
    """Stays of diabetic patients, and who was back within 30 days: as many of either kind; queries are half children.

    As in section 5.3 of Koh & Liang (2017) children who were not readmitted are left out of the training rows, all but
    one, so that the model is wrong about children.
    """
    data = datasets.diabetes130()
    y = np.array(["not readmitted", "readmitted"])[data.readmitted]
    child = data.inputs[:, data.names.index("age_[0-10)")] == 1
    draw = np.random.default_rng(0)
    each = [draw.permutation(np.flatnonzero(~child & (data.readmitted == kind))) for kind in (0, 1)]
    ill, well = (np.flatnonzero(child & (data.readmitted == kind)) for kind in (1, 0))
    train = np.concatenate([*(part[: rows // 2] for part in each), ill, well[:1]])
    train = draw.permutation(train)
    few = min(len(well) - 1, queries // 2)
    asked = np.concatenate([well[1 : 1 + few], *(part[rows // 2 :][: (queries - few) // 2] for part in each)])
    rows_of, names = _stays(data), data.columns["encounter_id"]
    X, Xq = (np.array([rows_of(place) for place in part.tolist()], dtype=object) for part in (train, asked))
    coded = require("sklearn.feature_extraction", "demo").DictVectorizer(sparse=False)
    model = _pipeline(coded, _logistic(1e-4, len(train), solver="newton-cholesky")).fit(X, y[train])
    return Study(
        explain(model, X, y[train], ids=[str(number) for number in names[train]]),
        (Xq, y[asked]),
        card=lambda row: X[row],
        query_card=lambda query: Xq[query],
    )


STUDIES: dict[str, Callable[[], Study]] = {"digits": digits, "mnist": mnist, "enron1": enron1, "hospital": hospital}


def _pictures(train: tuple[Any, Any], asked: tuple[Any, Any], l2: float, shape: tuple[int, int]) -> Study:
    """Softmax regression on pictures, 0 is black; shown dark on light."""
    model = _logistic(l2, len(train[1])).fit(*train)
    looks, wanted = ((255 - 255 * one[0].reshape(-1, *shape)).astype(np.uint8) for one in (train, asked))
    return Study(explain(model, *train), asked, card=lambda row: looks[row], query_card=lambda query: wanted[query])


def _stays(data: datasets.Diabetes) -> Callable[[int], dict[str, Any]]:
    """A stay by its number: the columns that the paper's features are made of, counts as numbers."""
    used = [name for name in data.columns if any(one == name or one.startswith(f"{name}_") for one in data.names)]
    counts = set(used) & set(data.names)

    def stay(place: int) -> dict[str, Any]:
        found = {name: str(data.columns[name][place]) for name in used}
        return {name: float(value) if name in counts else value for name, value in found.items()}

    return stay


def _logistic(l2: float, rows: int, **settings: Any) -> Any:
    """Logistic regression with the mean of the losses and l2/2 ‖weights‖²."""
    logistic = require("sklearn.linear_model", "demo").LogisticRegression
    return logistic(C=1 / (l2 * rows), tol=1e-8, max_iter=5000, **settings)


def _pipeline(*steps: Any) -> Any:
    return require("sklearn.pipeline", "demo").make_pipeline(*steps)
