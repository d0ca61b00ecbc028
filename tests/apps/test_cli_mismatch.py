"""`upweight mismatch` and `upweight contrast`: what the apps find, for one query or for all errors of a study."""

from __future__ import annotations

import json

import numpy as np
import pytest

import upweight as uw
from small import NAMES, XQ, YQ, ZQ, X, classifier, logistic
from upweight.apps import pictures

SOURCE = """
import numpy as np
from small import NAMESQ, XQ, ZQ, logistic, ridge
from upweight import Study

OTHER = np.where(NAMESQ == "yes", "no", "yes")


def errors():
    return Study(logistic(), (XQ, [OTHER[0], *NAMESQ[1:3], OTHER[3]]))


def right():
    return Study(logistic(), (XQ, NAMESQ))


def line():
    return Study(ridge(), (XQ, ZQ))


def alone():
    return Study(logistic(), (XQ,))
"""
OTHER = np.where(NAMES[:4] == "yes", "no", "yes")


def test_all_errors_of_a_study(upweight, tmp_path):
    said = uw.predict(logistic(), XQ).labels
    wanted = np.array([OTHER[0], *NAMES[1:3], OTHER[3]])
    wrong = np.flatnonzero(said != wanted)
    assert 0 < len(wrong) < 4
    (tmp_path / "source.txt").write_text("\n".join("ab"[row % 2] for row in range(40)))
    picture = tmp_path / "new" / "a.svg"
    code, out, _ = upweight(
        "mismatch", "cli_studies:errors", "-k", 3, "--groups", "source.txt", "--plot", picture, "--json"
    )
    assert code == 0
    numbers = json.loads(out)
    found = uw.apps.mismatch(logistic(), (XQ[wrong], wanted[wrong]), k=3, groups=np.arange(40) % 2)
    assert numbers["queries"] == len(wrong)
    assert numbers["harmful"]["rows"] == found.harmful.rows.tolist()
    assert numbers["harmful"]["values"] == pytest.approx(found.harmful.values.tolist())
    assert found.groups is not None
    assert {one["name"]: one["first_order"] for one in numbers["groups"]["groups"]} == pytest.approx(
        {"ab"[name]: value for name, value in zip(found.groups.names, found.groups.first_order, strict=True)}
    )
    assert picture.stat().st_size > 1000


def test_one_query(upweight):
    code, out, _ = upweight("mismatch", "cli_studies:right", "--query", 2)
    assert code == 0
    assert str(uw.apps.mismatch(logistic(), (XQ[2:3], NAMES[2:3]))) == out.strip("\n")
    code, out, _ = upweight("mismatch", "cli_studies:line", "--json")  # no classes: all queries
    assert code == 0
    assert json.loads(out)["queries"] == len(ZQ)


def test_the_smallest_sets(upweight):
    code, out, _ = upweight("contrast", "cli_studies:errors", "--json")
    assert code == 0
    numbers = json.loads(out)
    assert set(numbers) == {"labels changed", "rows removed"}
    found = uw.apps.contrast(logistic(), (XQ, np.array([OTHER[0], *NAMES[1:3], OTHER[3]])))
    assert numbers["labels changed"]["queries"] == len(found.answers)
    assert [a["rows"] for a in numbers["labels changed"]["answers"]] == [a.rows.tolist() for a in found.answers]
    query = found.answers[0].query
    code, out, _ = upweight("contrast", "cli_studies:errors", "--query", query, "--most", 30, "--refits", 2)
    assert code == 0
    assert "1 wrong predictions, labels changed" in out
    assert "1 wrong predictions, rows removed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mismatch", "cli_studies:right"), "right about all 4 queries"),
        (("mismatch", "cli_studies:right", "--query", 9), "Query 9 does not exist"),
        (("mismatch", "cli_studies:errors", "--groups", "nothing.txt"), "There is no file at nothing.txt"),
        (("contrast", "cli_studies:right"), "All 4 predictions"),
        (("contrast", "cli_studies:errors", "--query", 9), "Query 9 does not exist"),
        (("contrast", "cli_studies:alone"), "Give the study the pair"),
        (("contrast", "cli_studies:line"), "no classes"),
    ],
)
def test_what_is_refused(upweight, arguments, message):
    code, out, err = upweight(*arguments)
    assert code == 3
    assert not out
    assert message in err


def test_pictures_show_the_numbers():
    found = uw.apps.mismatch(logistic(), (XQ, NAMES[:4]), k=4)
    ax = pictures.responsible(found)
    widths = sorted(bar.get_width() for bar in ax.patches)
    np.testing.assert_allclose(widths, sorted([*found.helpful.values, *found.harmful.values]))
    assert found.features is not None
    assert found.features.held_by_row is not None
    bars = pictures.feature_effects(found, k=2).patches
    chosen = found.features.top(2)[::-1]
    np.testing.assert_allclose([bar.get_width() for bar in bars], found.features.held_by_row[:, chosen].ravel())
    kernel = uw.apps.mismatch(classifier(), (XQ, YQ))
    assert len(pictures.feature_effects(kernel).get_yticklabels()) == X.shape[1]
    told = uw.apps.contrast(logistic(), (XQ, np.array([OTHER[0], *NAMES[1:3], OTHER[3]])))
    ax = pictures.margins(told)
    points = ax.collections[0].get_offsets()
    np.testing.assert_allclose(np.asarray(points)[:, 1], [answer.margin for answer in told.answers])
