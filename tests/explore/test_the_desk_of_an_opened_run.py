"""What the pages review by is what the commands review by: labels from the index are those of the run's files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import labels_of, made

import upweight as uw
from explored import browser, post
from upweight.explore.explorer import Explorer
from upweight.show.run import Run


def test_labels_of_the_index_are_those_of_the_run(tmp_path):
    run = made(tmp_path / "run")
    there, here = Explorer.open(run.path).desk.labels, labels_of(run)
    assert (there.work, there.classes) == (here.work, here.classes)
    assert there.ids.tolist() == here.ids.tolist()
    for name in ("codes", "said"):
        assert getattr(there, name).tolist() == getattr(here, name).tolist()
    assert there.scores.keys() == here.scores.keys()
    for name, values in here.scores.items():
        np.testing.assert_array_equal(there.scores[name], values)


def test_a_row_is_not_told_apart_before_it_is_decided(folder):
    client = browser(folder)
    told = client.get("/review.json?budget=60&controls=30").json()
    assert {name for item in told["items"] for name in item} == {
        *(
            "id",
            "name",
            "place",
            "address",
            "card",
            "label",
            "label_class",
            "says",
            "suggestion",
            "source",
            "suggested",
            "verdict",
            "kind",
        ),
    }
    assert [item["kind"] for item in told["items"]] == [None] * len(told["items"])
    row = told["items"][0]["id"]
    answer = post(client, "/review/decide?budget=60&controls=30", {"row": row, "action": "keep", "seen": 0})
    assert answer.status_code == 200
    assert answer.json()["kind"]["control"] in {True, False}
    assert answer.json()["progress"]["looked"] == 1
    assert client.get(f"/rows/{row}.json").json()["history"][0]["action"] == "keep"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"row": 0, "action": "keep", "seen": 5}, 409),
        ({"row": "0", "action": "keep", "seen": 0}, 400),
        ({"row": 500, "action": "keep", "seen": 0}, 400),
        ({"row": -1, "action": "keep", "seen": 0}, 400),
        ({"row": True, "action": "keep", "seen": 0}, 400),
        ({"row": 0, "action": "burn", "seen": 0}, 400),
        ({"row": 0, "action": ["keep"], "seen": 0}, 400),
        ({"row": 0, "action": "relabel", "seen": 0}, 400),
        ({"row": 0, "action": "relabel", "class": 99, "seen": 0}, 400),
        ({"row": 0, "action": "keep", "seen": 0, "why": "x" * 3000}, 400),
        ({"row": 0, "action": "keep", "seen": 0, "why": {}}, 400),
        ({}, 400),
    ],
)
def test_what_makes_no_sense_is_not_written(folder, sent, status):
    client = browser(folder)
    assert post(client, "/review/decide", sent).status_code == status
    assert client.get("/review/log.json").json()["total"] == 0


def test_a_write_from_elsewhere_is_refused(folder):
    client, sent = browser(folder), {"row": 0, "action": "keep", "seen": 0}
    for headers in (
        {},
        {"origin": "http://elsewhere.example"},
        {"origin": "http://127.0.0.1:8123", "sec-fetch-site": "cross-site"},
    ):
        assert client.post("/review/decide", json=sent, headers=headers).status_code == 403
    assert client.get("/review/log.json").json()["total"] == 0
    assert not (Run.open(folder).path / "reviews.sqlite").exists()


def test_every_export_is_downloaded(folder):
    client = browser(folder)
    for number, kind in enumerate(
        ("csv", "jsonl", "parquet", "cleanlab", "label-studio", "label-studio-setup", "patch")
    ):
        answer = client.get(f"/export/{number}?budget=10")
        assert answer.status_code == 200, kind
        assert answer.headers["content-disposition"].startswith("attachment; filename=")
    assert client.get("/export/99").status_code == 404


def test_a_row_may_have_the_label_of_a_query_alone(tmp_path):
    """No training row has class 2, and the model says it of none; a query has it."""
    module = torch.nn.Linear(2, 3).double()
    torch.nn.init.zeros_(module.weight)
    module.bias.data = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    X, y = torch.arange(12, dtype=torch.float64).reshape(6, 2), torch.tensor([0, 1] * 3)
    influence = uw.explain(module, X, y, loss=torch.nn.functional.cross_entropy, penalty=0.1)
    run = uw.write_run(influence, tmp_path / "run", X[:2], torch.tensor([0, 2]))
    assert labels_of(run).classes == Explorer.open(run.path).desk.labels.classes == (0, 1, 2)
