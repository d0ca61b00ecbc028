"""Small charts: the numbers stand where they belong, words say what is drawn, and nothing hostile is markup."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from upweight.show import svg

HOSTILE = "</title><script>alert(1)</script>\"'&"


def parsed(chart):
    return ElementTree.fromstring(chart)


def rects(chart):
    return [
        {key: float(value) for key, value in one.attrib.items() if key != "class"} for one in parsed(chart).iter("rect")
    ]


def every_chart(name=HOSTILE):
    return [
        svg.histogram([1, 0, 3], [0, 1, 2, 3], title=name, x=name, y=name, marks=[(1.0, name)]),
        svg.scatter([0, 1], [1, 2], title=name, x_name=name, y_name=name, kinds=[name, "b"], diagonal=True),
        svg.bars([name, "b"], [1, -2], title=name, x=name),
        svg.line({name: ([1, 2], [3, 4])}, title=name, x=name, y=name, marks=[(1.5, name)]),
        svg.scatter([], [], title=name, x_name=name, y_name=name),
    ]


def test_heights_of_a_histogram_are_its_counts():
    drawn = rects(svg.histogram([1, 0, 4, 2], [0, 1, 2, 3, 4], title="t", x="x"))
    assert len(drawn) == 3
    heights = np.array([one["height"] for one in drawn])
    assert np.allclose(heights / heights[1] * 4, [1, 4, 2], atol=0.05)
    lefts = np.array([one["x"] for one in drawn])
    assert np.allclose((lefts - lefts[0]) / (lefts[1] - lefts[0]) * 2, [0, 2, 3], atol=0.01)


def test_a_single_row_among_many_is_seen_on_a_logarithmic_scale():
    drawn = rects(svg.histogram([9_999, 1], [0, 1, 2], title="t", x="x", log=True))
    assert drawn[1]["height"] / drawn[0]["height"] == pytest.approx(np.log10(2) / 4, abs=0.01)
    assert re.findall(
        r'uw-tick"[^>]*text-anchor="end">([^<]*)', svg.histogram([9_999], [0, 1], title="t", x="x", log=True)
    ) == ["0", "1", "10", "100", "1,000", "10k"]


def test_dots_stand_at_their_numbers_and_the_diagonal_between_equal_ones():
    chart = svg.scatter([0, 1, np.nan], [0, 2, 1], title="t", x_name="predicted", y_name="actual", diagonal=True)
    dots = [(float(one.get("cx", "")), float(one.get("cy", ""))) for one in parsed(chart).iter("circle")]
    assert len(dots) == 2
    mark = next(one for one in parsed(chart).iter("line") if one.get("class") == "uw-mark")
    x1, y1, x2, y2 = (float(mark.get(key, "")) for key in ("x1", "y1", "x2", "y2"))
    slope = (y2 - y1) / (x2 - x1)
    assert dots[0][1] == pytest.approx(y1 + slope * (dots[0][0] - x1), abs=0.2)  # 0 = 0 lies on it
    assert dots[1][1] < y1 + slope * (dots[1][0] - x1) - 20  # 2 > 1 lies above it


def test_bars_go_left_of_zero_where_they_are_negative_and_say_their_sign():
    chart = svg.bars(["up", "down"], [1.0, -2.0], title="t", x="x")
    up, down = rects(chart)
    assert down["width"] == pytest.approx(2 * up["width"], rel=0.01)
    assert down["x"] + down["width"] == pytest.approx(up["x"], abs=0.2)
    assert "\N{MINUS SIGN}2" in chart


def test_a_line_breaks_where_a_number_is_missing():
    path = next(parsed(svg.line({"a": ([1, 2, 3, 4], [1, 2, np.nan, 4])}, title="t", x="x", y="y")).iter("path"))
    assert re.findall("[ML]", path.get("d", "")) == ["M", "L", "M"]


def test_powers_of_ten_are_equally_far_apart():
    chart = svg.line({"a": ([1, 10, 100], [1, 2, 3])}, title="t", x="x", y="y", log_x=True)
    at = [float(one.get("cx", "")) for one in parsed(chart).iter("circle")][1:]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)


def test_kinds_differ_in_shape_and_lines_in_dashes():
    chart = svg.scatter(range(4), range(4), title="t", x_name="x", y_name="y", kinds=list("abcd"))
    shapes = {one.get("d") for one in parsed(chart).iter("path")}
    assert len(shapes) == 3
    assert len(list(parsed(chart).iter("circle"))) == 2  # one in the legend
    assert svg.STYLE.count("stroke-dasharray") == 4


@pytest.mark.parametrize("chart", every_chart())
def test_a_chart_is_an_image_with_words_and_no_markup_of_the_user(chart):
    root = parsed(chart)
    assert root.get("role") == "img"
    assert root.get("aria-label", "").startswith(HOSTILE)
    assert root.find("title").text == HOSTILE
    assert root.find("desc").text
    assert not list(root.iter("script"))
    assert not [one for one in root.iter() if "style" in one.attrib or any(key.startswith("on") for key in one.attrib)]


def test_ten_thousand_dots_are_thinned_and_the_chart_says_so():
    chart = svg.scatter(range(10_000), range(10_000), title="t", x_name="x", y_name="y")
    assert len(list(parsed(chart).iter("circle"))) == svg.DOTS
    assert "2,000 dots of 10,000, evenly chosen." in chart


@pytest.mark.parametrize("numbers", [[0.0], [5.0, 5.0], [1e-300, -1e-300], [1e300, -1e300], [np.nan, np.inf, 1.0]])
def test_any_numbers_are_drawn(numbers):
    for chart in (
        svg.scatter(numbers, numbers, title="t", x_name="x", y_name="y", diagonal=True),
        svg.scatter(numbers, numbers, title="t", x_name="x", y_name="y", log_x=True),
        svg.bars([str(one) for one in numbers], numbers, title="t", x="x"),
        svg.line({"a": (numbers, numbers)}, title="t", x="x", y="y", log_x=True),
    ):
        assert "nan" not in re.sub('aria-label="[^"]*"|<text[^>]*>[^<]*|<desc>[^<]*', "", chart)


def test_a_chart_needs_neither_torch_nor_matplotlib():
    drawn = "from upweight.show import svg; svg.bars(['a'], [1], title='t', x='x')"
    code = f"{drawn}; import sys; print({{'torch', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
