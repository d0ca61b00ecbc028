"""Section 6: the committed sets really correct the predictions, and the small experiment runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from upweight import datasets

ROOT = Path(__file__).parents[2]


def committed():
    told = json.loads((ROOT / "paper/results/contrast.json").read_text(encoding="utf-8"))
    return told["numbers"], {key: np.array(value) for key, value in told["arrays"].items()}


def test_the_predicted_sets_really_correct():
    numbers, arrays = committed()
    assert numbers["queries"] == len(set(arrays["query"].tolist())) >= 100
    assert (arrays["label"] != arrays["wanted"]).all()
    for prefix in ("", "removal_"):
        assert numbers[f"{prefix}corrected"] == arrays[f"{prefix}corrected"].sum()
        assert numbers[f"{prefix}corrected_rate"] >= 0.8
        assert abs(numbers[f"{prefix}corrected_from_scratch"] - numbers[f"{prefix}corrected"]) <= 2
        assert numbers[f"{prefix}median_set_size"] == np.median(arrays[f"{prefix}size"])
        assert 0.9 < numbers[f"{prefix}calibration"] < 1.1
        assert ((arrays[f"{prefix}actual"] < 0) == (arrays[f"{prefix}corrected"] == 1)).all()


def test_other_orders_need_more_rows():
    numbers, arrays = committed()
    ours = numbers["median_set_size"]
    assert numbers["median_set_size_influence"] <= ours
    assert ours < numbers["median_set_size_nearest"] < numbers["median_set_size_loss"]
    assert numbers["sets_no_larger_than_by_loss"] >= 0.9 * numbers["queries"]
    assert (arrays["influence"] <= arrays["size"]).all()


@pytest.mark.data
@pytest.mark.skipif(datasets.local("mnist") is None, reason="UPWEIGHT_DATA has no mnist folder")
def test_a_few_sets_are_computed(tmp_path, monkeypatch):
    from paper import contrast, report

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(contrast, "MOST", 16)
    small = report.timed(contrast.compute, rows=400, queries=2)
    assert small["numbers"]["corrected"] == small["numbers"]["corrected_from_scratch"] == 2
    assert small["numbers"]["median_set_size_nearest"] >= 1
    report.write("contrast", small, tmp_path)
    contrast.draw(report.read("contrast", tmp_path)).savefig(tmp_path / "a.png", dpi=40)
    again = report.timed(contrast.compute, rows=400, queries=2)
    for key, array in small["arrays"].items():
        np.testing.assert_array_equal(again["arrays"][key], array)


def test_the_shortest_start_is_found():
    from paper import contrast

    for least in range(1, 21):
        asked = []

        def corrects(rows, least=least, asked=asked):
            asked.append(len(rows))
            return len(rows) >= least

        assert contrast.smallest(corrects, np.arange(20)) == least
        assert len(asked) < 12
    assert contrast.smallest(lambda rows: False, np.arange(5)) == 0
