"""The demo's studies: what they hold is what the data say, and each is opened by one command."""

from __future__ import annotations

import numpy as np
import pytest

import upweight as uw
from small import refuses
from upweight import datasets
from upweight.cli import commands, demo, studies
from upweight.cli.study import Study, load

SMALL = (300, 40)
FOLDERS = {"mnist": "mnist", "enron1": "enron1", "hospital": "diabetes130"}


def has(kind):
    """Skips a test where the data are not there."""
    if kind in FOLDERS and datasets.local(FOLDERS[kind]) is None:
        pytest.skip(f"UPWEIGHT_DATA has no {FOLDERS[kind]} folder")


@pytest.mark.parametrize("kind", studies.STUDIES)
def test_a_run_shows_the_rows_as_the_data_have_them(kind, tmp_path):
    has(kind)
    study = studies.STUDIES[kind](*SMALL)
    rows, queries = study.influence.n, len(study.queries[1])
    run = uw.write_run(study.influence, tmp_path / "run", *study.queries, card=study.card, query_card=study.query_card)
    assert (len(run.rows), len(run.queries)) == (rows, queries)
    assert run.queries.labels.tolist() == list(study.queries[1])
    assert run.scores.certificate.converged
    assert run.scores.certificate.residual.max() < 1e-6
    if kind in ("digits", "mnist"):
        dark = 255 - 255 * np.asarray(study.influence.examples.x[7]).reshape(run.rows.cards[7].shape)
        np.testing.assert_allclose(run.rows.cards[7], dark, atol=1)
        assert np.abs(run.queries.cards[3] - (255 - 255 * study.queries[0][3].reshape(dark.shape))).max() <= 1
    elif kind == "enron1":
        mail = datasets.enron1()
        names = run.scores.ids.tolist()
        assert [mail.texts[mail.names.index(name)] for name in names] == run.rows.cards
        assert [name.split(".")[-2] for name in names] == run.rows.labels.tolist()
    else:
        _stays(run)


def _stays(run):
    """Rows and queries are stays of the file, and one child alone of the rows was not readmitted."""
    data = datasets.diabetes130()
    places = {name: place for place, name in enumerate(data.columns["encounter_id"].tolist())}
    for name, card, label in zip(run.scores.ids.tolist(), run.rows.cards, run.rows.labels.tolist(), strict=True):
        column = {key: values[places[name]] for key, values in data.columns.items()}
        assert {key: str(int(value)) if isinstance(value, float) else value for key, value in card.items()} == {
            key: column[key] for key in card
        }
        assert label == ("readmitted" if column["readmitted"] == "<30" else "not readmitted")
    child = np.array([card["age"] == "[0-10)" for card in run.rows.cards])
    assert (run.rows.labels[child] == "not readmitted").sum() == 1
    asked = np.array([card["age"] == "[0-10)" for card in run.queries.cards])
    assert asked.sum() == len(asked) // 2
    assert set(run.queries.labels[asked]) == {"not readmitted"}


def test_the_digits_are_those_of_the_story():
    study = studies.digits()
    bunch, model = demo._fitted()
    assert study.influence.n == demo._TRAIN
    np.testing.assert_array_equal(study.queries[0], bunch.data[demo._TRAIN :] / 16)
    weights = {name: value.numpy() for name, value in study.influence.objective.params.items()}
    np.testing.assert_allclose(weights["coef"].ravel(), model.coef_.ravel(), atol=1e-6)


def test_a_study_of_the_demo_is_named_as_any_other():
    assert isinstance(load("upweight.cli.studies:digits"), Study)


@pytest.mark.parametrize("rows", [0, -1, 1.5])
def test_rows_that_are_no_count_are_refused_before_the_work(rows, tmp_path):
    refuses(lambda: demo.write_run(studies.digits(*SMALL), tmp_path / "run", rows), ValueError, f"rows={rows!r}")
    assert not (tmp_path / "run").exists()


def test_the_demo_makes_a_run_of_the_data_that_are_named_and_opens_it(monkeypatch, tmp_path):
    made, seen = [], []
    monkeypatch.setattr(demo, "write_run", lambda study, folder, rows: made.append((study, folder, rows)) or folder)
    monkeypatch.setattr(commands, "opened", lambda folder: seen.append(folder) or 0)
    for kind in studies.STUDIES:
        monkeypatch.setitem(studies.STUDIES, kind, lambda kind=kind: kind)
        assert commands.demo(tmp_path, 7, explore=True, data=kind) == 0
    folders = [tmp_path / name for name in ("run", "mnist", "enron1", "hospital")]
    assert made == list(zip(studies.STUDIES, folders, [7] * 4, strict=True))
    assert seen == folders
