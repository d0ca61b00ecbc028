"""The demo on five rows: what it finds, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from small import refuses
from upweight.cli import demo


@pytest.fixture(scope="module")
def found():
    return demo.run(rows=5)


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = demo.write_html(found, tmp_path_factory.mktemp("demo") / "new" / "folder")
    assert path.name == "index.html"
    return path.read_text(encoding="utf-8")


def test_the_query_is_a_mistake(found):
    assert found.label != found.predicted_label
    assert 0 < found.probability < 0.5
    assert found.loss == pytest.approx(-np.log(found.probability), rel=1e-6)


def test_the_model_is_at_its_minimum(found):
    assert found.check.ok
    assert found.check.rows_from_minimum < 0.1
    assert found.scores.certificate.residual.max() < 1e-8


def test_the_most_influential_rows_were_really_removed(found):
    values = found.scores.values[0]
    assert found.outcomes.rows.tolist() == np.argsort(-np.abs(values), kind="stable")[:5].tolist()
    assert found.removing.rows.tolist() == found.outcomes.rows.tolist()
    assert np.abs(found.outcomes.control).max() < 1e-6
    assert np.array_equal(np.sign(found.outcomes.actual[0]), np.sign(values[found.outcomes.rows]))


def test_predictions_agree_with_retraining(found):
    assert found.first_order.pearson > 0.99
    assert 0.9 < found.first_order.slope < 1.15
    assert abs(found.newton.slope - 1) < abs(found.first_order.slope - 1)


def test_the_numbers_are_json(found):
    numbers = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert numbers["retrained_rows"] == 5
    assert len(numbers["helpful"]) == len(numbers["harmful"]) == 5
    assert numbers["helpful"][0]["value"] > 0 > numbers["harmful"][0]["value"]


def test_the_text_tells_the_story(found):
    text = found.text()
    for part in (f"is an {found.label}", f"says {found.predicted_label}", "most helpful", "most harmful", "control"):
        assert part in text
    assert max(map(len, text.splitlines())) < 240


def test_the_page_loads_nothing_from_anywhere(page):
    addresses = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)


def test_the_page_shows_the_digits_and_the_plot(page, found):
    assert page.count("<img") == 1 + 8 + 8
    assert page.count("alt=") == page.count("<img")
    assert page.count('<svg class="uw-chart" role="img"') == 2
    assert f"is {found.label}, called {found.predicted_label}" in page
    for row in found.outcomes.rows:
        assert f'<th scope="row">{row}</th>' in page


@pytest.mark.parametrize("rows", [0, 1, -3, 1401, 2.5, "5"])
def test_an_impossible_number_of_rows_is_refused(rows):
    refuses(lambda: demo.run(rows), ValueError, f"rows={rows!r}")
