"""`upweight attack`: the table of vulnerable rows, a crafted change, label flips."""

from __future__ import annotations

import json
from functools import partial

import pytest

SOURCE = """
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import upweight as uw


def flowers():
    X, y = load_iris(return_X_y=True)
    influence = uw.explain(LogisticRegression(tol=1e-10, max_iter=5000).fit(X, y), X, y)
    return uw.Study(influence, (X[[70, 3]], y[[70, 3]]))
"""


@pytest.fixture
def attack(upweight):
    return partial(upweight, "attack", "cli_studies:flowers")


def test_rows_are_ranked_and_changed(attack):
    code, out, _ = attack("--query", 1, "--rows", 2, "--level", 0.5, "--step", 0.2, "--iterations", 3, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["query"] == 1
    assert told["attack"]["rows"] == [line["row"] for line in told["vulnerability"]["rows"][:2]]
    assert told["attack"]["loss_after"] > told["attack"]["loss_before"]
    code, out, _ = attack("--query", 1, "--iterations", 2)
    assert code == 0
    assert "Query 1" in out
    assert "levels" in out


def test_labels_are_flipped(attack):
    code, out, _ = attack("--query", 1, "--flip", 2, "--json")
    assert code == 0
    assert len(json.loads(out)["rows"]) == 2


@pytest.mark.parametrize("setting", ["--rows=0", "--iterations=0", "--flip=-1"])
def test_a_count_of_none_is_named_by_its_own_name(attack, setting):
    code, _, err = attack("--query", 1, setting)
    assert code == 3
    assert f"{setting}." in err


def test_the_control_is_told(attack):
    code, out, _ = attack("--query", 1, "--level", 0.5, "--iterations", 2)
    assert code == 0
    assert "training again with nothing changed flips 0" in out
    code, out, _ = attack("--query", 1, "--flip", 1, "--json")
    assert code == 0
    assert json.loads(out)["loss_given"] == pytest.approx(json.loads(out)["losses"][0], rel=1e-4)


def test_a_query_that_does_not_exist(attack):
    code, _, err = attack("--query", 9)
    assert code == 3
    assert "9" in err
