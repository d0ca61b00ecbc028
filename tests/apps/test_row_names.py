"""The apps and the command line call rows by their names, beside their numbers."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.apps import pictures

SOURCE = """
from apps.test_row_names import FRAME, LABELS, influence
from upweight import Study


def named():
    return Study(influence(), (FRAME[:3], LABELS[:3]))
"""

_DRAW = np.random.default_rng(0)
FRAME = pd.DataFrame(
    _DRAW.normal(size=(60, 3)), columns=list("abc"), index=[f"no. {i}" for i in _DRAW.permutation(60) + 1000]
)
LABELS = (FRAME.a + 0.5 * _DRAW.normal(size=60) > 0).map({True: "yes", False: "no"})
ON = FRAME[:3], LABELS[:3]


def influence():
    return uw.explain(LogisticRegression(tol=1e-9).fit(FRAME, LABELS), FRAME, LABELS)


def test_understand_names_the_rows_of_the_greatest_values():
    found = uw.apps.understand(influence(), ON, k=3)
    values = found.scores.to_pandas().iloc[1]
    helpful, harmful = found.helpful(1), found.harmful(1)
    assert helpful.ids.tolist() == values.sort_values(ascending=False).index[:3].tolist()
    assert harmful.ids.tolist() == values.sort_values().index[:3].tolist()
    assert LABELS.loc[helpful.ids].tolist() == helpful.labels.tolist()
    assert str(helpful.ids[0]) in str(found)
    told = json.loads(json.dumps(found.to_dict()))["queries"][1]
    assert [line["id"] for line in told["helpful"]] == helpful.ids.tolist()
    assert [FRAME.index[line["row"]] for line in told["helpful"]] == helpful.ids.tolist()


def test_mismatch_names_the_rows_that_stand_out():
    found = uw.apps.mismatch(influence(), ON, k=4)
    values = found.scores.to_pandas().mean()
    assert found.harmful.ids.tolist() == values.sort_values().index[:4].tolist()
    assert found.helpful.ids.tolist() == values.sort_values(ascending=False).index[:4].tolist()
    assert f"{found.harmful.values[0]:+.4g}  {found.harmful.ids[0]}" in str(found)
    assert found.to_dict()["helpful"]["ids"] == found.helpful.ids.tolist()


def test_a_review_has_the_names_and_comes_back(tmp_path):
    explained = influence()
    found = uw.apps.repair(explained, inspect=5, by="self-influence")
    own = pd.Series(explained.of_self().values, index=FRAME.index).sort_values(ascending=False)
    assert found.to_dict()["ids"] == own.index[:5].tolist()
    assert all(str(name) in str(found) for name in own.index[:5])
    file = uw.apps.write_review(found, tmp_path / "review.csv")
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert [line["id"] for line in lines] == own.index[:5].tolist()
    assert [LABELS[line["id"]] for line in lines] == [line["label"] for line in lines]
    lines[0]["correction"] = "no" if lines[0]["label"] == "yes" else "yes"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    assert list(uw.apps.read_review(explained, file)) == [FRAME.index.get_loc(own.index[0])]


def test_names_that_json_does_not_know_are_told_as_text():
    days = pd.date_range("2024-01-01", periods=60)
    frame = FRAME.set_axis(days)
    explained = uw.explain(LogisticRegression(tol=1e-9).fit(frame, LABELS.to_numpy()), frame, LABELS.to_numpy())
    found = uw.apps.repair(explained, inspect=2)
    assert [pd.Timestamp(name) for name in json.loads(json.dumps(found.to_dict()))["ids"]] == days[found.rows].tolist()


def test_without_names_nothing_is_added(tmp_path):
    plain = uw.explain(LogisticRegression(tol=1e-9).fit(FRAME.to_numpy(), LABELS), FRAME.to_numpy(), LABELS.to_numpy())
    found = uw.apps.repair(plain, inspect=2)
    assert "ids" not in found.to_dict()
    file = uw.apps.write_review(found, tmp_path / "review.csv")
    assert [line["id"] for line in csv.DictReader(file.read_text().splitlines())] == ["", ""]
    queries = FRAME[:1].to_numpy(), LABELS[:1].to_numpy()
    assert "id" not in uw.apps.understand(plain, queries).to_dict()["queries"][0]["helpful"][0]
    assert "ids" not in uw.apps.mismatch(plain, queries).to_dict()["helpful"]


@pytest.mark.parametrize("saved", [False, True])
def test_top_names_rows_also_from_a_file(upweight, saved):
    if saved:
        assert upweight("score", "cli_studies:named", "--out", "scores.st")[0] == 0
    source = "scores.st" if saved else "cli_studies:named"
    values = influence().on_loss(*ON).to_pandas().iloc[2]
    names = values.sort_values(ascending=False).index[:3].tolist()
    code, out, _ = upweight("top", source, "--query", 2, "-k", 3, "--json")
    assert code == 0
    assert [line["id"] for line in json.loads(out)["helpful"]] == names
    code, out, _ = upweight("top", source, "--query", 2, "-k", 3)
    assert code == 0
    assert all(f"{values[name]:+14.6g}  {name}\n" in out for name in names)


def names(rows) -> list[str]:
    return FRAME.index[np.asarray(rows)].tolist()


def test_attacks_name_the_rows_that_could_move_an_answer_and_those_that_did():
    explained = influence()
    found = uw.apps.vulnerability(explained, ON, k=3)
    assert names(found.top()) == [line["id"] for line in found.to_dict()["rows"]]
    assert [line.split("  ")[-1] for line in str(found).splitlines()[2:]] == names(found.top())
    some = uw.apps.vulnerability(explained, ON, rows=[7, 4])
    assert some.ids.tolist() == names([4, 7])
    made = uw.apps.attack(explained, ON, rows=[4, 7], iterations=2, level=1.0, step=0.5)
    assert str(made).startswith(f"Rows {', '.join(names([4, 7]))} changed by")
    assert made.to_dict()["ids"] == names([4, 7])


def test_label_changes_are_told_by_name_with_the_rows_that_they_turn():
    made = uw.apps.flip_labels(influence(), ON, 3)
    assert len(made.rows) == 3
    assert len(made.newly_wrong)
    told = made.to_dict()
    assert told["ids"] == names(made.rows)
    assert told["newly_wrong_ids"] == names(made.newly_wrong)
    lines = str(made).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("row ")) + 1
    assert [line.split("  ")[-1] for line in lines[start : start + 3]] == names(made.rows)
    assert lines[-1] == f"Training rows that are now called wrong: {', '.join(names(made.newly_wrong))}."


def test_contrast_names_the_rows_and_the_query():
    explained = influence()
    wrong = np.flatnonzero(uw.predict(explained, FRAME).labels != LABELS.to_numpy())[:1]
    found = uw.apps.contrast(explained, (FRAME.iloc[wrong], LABELS.iloc[wrong]))
    (answer,) = found.answers
    (told,) = found.to_dict()["answers"]
    assert len(answer.rows)
    assert told["query_id"] == names(wrong)[0]
    assert told["ids"] == names(answer.rows)
    assert f"query {names(wrong)[0]}, " in str(found)
    assert f"({', '.join(names(answer.rows)[:6])}" in str(found)


def test_features_and_pictures_are_of_rows_by_name():
    found = uw.apps.mismatch(influence(), ON, k=4)
    assert f"features of rows {', '.join(names(found.responsible))} (equation 5)" in str(found)
    one = found.features.of(found.responsible[:1])
    assert one.to_dict()["ids"] == names(found.responsible[:1])
    ticks = pictures.responsible(found).get_yticklabels()
    assert [tick.get_text() for tick in ticks][:1] == [f"row {found.helpful.ids[0]}"]


def test_corrections_are_written_with_names_and_read_by_number(tmp_path):
    explained = influence()
    other = {row: "no" if LABELS.iloc[row] == "yes" else "yes" for row in (5, 9)}
    made = uw.apps.corrected(explained, other)
    assert made.to_dict()["ids"] == names([5, 9])
    patch = uw.apps.write_patch(made.patch, tmp_path / "patch.csv", ids=explained.examples.ids)
    assert [line["id"] for line in csv.DictReader(patch.read_text().splitlines())] == names([5, 9])
    assert uw.apps.read_patch(explained, patch) == other
    labels = uw.apps.write_labels(made.labels, tmp_path / "labels.csv", ids=explained.examples.ids)
    told = list(csv.DictReader(labels.read_text().splitlines()))
    assert [line["id"] for line in told] == FRAME.index.tolist()
    assert {row: told[row]["label"] for row in other} == other


def test_understand_calls_a_query_by_its_name():
    found = uw.apps.understand(influence(), ON)
    assert str(found).startswith(f"Query {FRAME.index[0]}: ")
    assert [query["id"] for query in found.to_dict()["queries"]] == FRAME.index[:3].tolist()


def test_validate_names_the_rows_that_it_removes(upweight):
    code, out, _ = upweight("validate", "cli_studies:named", "--rows", 3, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["ids"] == names([pair["row"] for pair in told["pairs"]])
    _, out, _ = upweight("validate", "cli_studies:named", "--rows", 3)
    assert [line.split("  ")[-1] for line in out.splitlines()[1:4]] == told["ids"]
