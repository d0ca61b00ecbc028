"""Section 5.3: the committed result meets the paper's claims, and the small experiment finds the children again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from upweight import datasets

ROOT = Path(__file__).parents[2]


def committed():
    return json.loads((ROOT / "paper/results/hospital.json").read_text(encoding="utf-8"))


def test_four_children_are_responsible():
    numbers, arrays = committed()["numbers"], committed()["arrays"]
    assert (numbers["n"], numbers["features"]) == (19_980, 127)
    assert numbers["gradient_norm"] <= 1e-6
    assert numbers["harmful_ratio"] >= 20
    assert numbers["helpful_ratio"] >= 20
    assert numbers["most_harmful_are_the_readmitted_children"] == numbers["most_helpful_is_the_other_child"] == 1
    assert sorted(arrays["removed"]) == [9366, 11116, 13685, 19590]  # the authors' rows
    assert arrays["rows"][:3] == [13685, 9366, 11116]
    assert numbers["query"] == 1742
    assert numbers["children_flipped"] == numbers["children_right_before"] - numbers["children_right"] == 30
    assert (numbers["train_accuracy_before"], numbers["test_accuracy_before"]) == pytest.approx(
        (0.6239, 0.6812), abs=1e-4
    )


def test_the_child_indicator_is_first_where_the_coefficients_hide_it():
    numbers = committed()["numbers"]
    assert (numbers["place_signed"], numbers["place_absolute"], numbers["place_held"]) == (1, 2, 1)
    assert numbers["worst_place_held_of_one"] == 1
    assert numbers["place_by_coefficient"] == numbers["larger_coefficients"] + 1 > 10


def test_removals_really_do_what_was_predicted():
    numbers, arrays = committed()["numbers"], {k: np.array(v) for k, v in committed()["arrays"].items()}
    np.testing.assert_allclose(arrays["newton"], arrays["actual"], rtol=0.01)
    np.testing.assert_allclose(arrays["predicted"], arrays["actual"], rtol=0.15)
    assert numbers["all_four_removed"] == pytest.approx(numbers["all_four_removed_newton"], rel=1e-3)


@pytest.mark.data
@pytest.mark.skipif(datasets.local("diabetes130") is None, reason="UPWEIGHT_DATA has no diabetes130 folder")
def test_a_smaller_hospital_is_computed(tmp_path):
    from paper import hospital, report

    small = report.timed(hospital.compute, per_class=9_000)
    assert small["numbers"]["harmful_ratio"] > 10
    assert small["numbers"]["most_harmful_are_the_readmitted_children"] == 1
    assert small["numbers"]["gradient_norm"] < 1e-8
    np.testing.assert_allclose(small["arrays"]["newton"], small["arrays"]["actual"], rtol=0.02)
    report.write("hospital", small, tmp_path)
    hospital.draw(report.read("hospital", tmp_path)).savefig(tmp_path / "a.png", dpi=40)
