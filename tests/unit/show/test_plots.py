"""Plots by image, on fixed data, and by what is drawn: numbers where they belong, kinds that differ without colour.

The baselines are drawn by `python tests/unit/show/test_plots.py`; look at each before it is committed. A picture may be
off by a root mean square of 5 of 255, for fonts are rendered a little differently from machine to machine; the same
picture of other data is off by more, which is tested too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.testing.compare import compare_images

import upweight as uw
from upweight import plots
from upweight.evaluation.curves import MislabelCurve, RemovalCurve

BASELINES = Path(__file__).parent / "baselines"
TOLERANCE = 5
K = np.arange(30)
WAVE = np.sin(1.7 * K) * np.exp(-K / 20)
NOISE = np.cos(5.3 * K)


def _scores(values):
    card = uw.Certificate(np.zeros(1), True, 0.0, 0.0, 1.0, 1.0, np.zeros(1))
    return uw.Scores(values[None], "row removed", K, len(K), card)


def _agreement(sign):
    return plots.agreement(_scores(WAVE), uw.Outcomes((sign * WAVE + 0.05 * NOISE)[None], np.zeros(1), K))


def _path(sign):
    dampings = np.geomspace(1e-3, 1, 5)
    every = tuple(_scores(WAVE + sign * step * NOISE / 4) for step in (0, 0.5, 1.5, 3, 6) if sign)
    return plots.damping_path(uw.DampingPath(dampings, every))


def _removals(sign):
    grow = sign * np.outer([1.0, 2.0, 4.0], [0.8, 1.0, 1.3])
    return plots.removals(
        RemovalCurve(np.array([1, 5, 20]), {"influence": grow, "random": grow / 9}, None, np.zeros(3))
    )


def _wrong_labels(sign):
    share = np.linspace(0, 1, 100) ** (0.3 if sign > 0 else 3)
    found = MislabelCurve(0.9, 0.85, 0.95, share, 20)
    return plots.wrong_labels(
        {"self-influence": found, "random": MislabelCurve(0.5, 0.4, 0.6, np.linspace(0, 1, 100), 20)}
    )


def _pictures(sign):
    x, y = np.meshgrid(np.linspace(-1, 1, 12), np.linspace(-1, 1, 12))
    before = np.exp(-3 * (x**2 + y**2))
    return plots.before_and_after(before, before + sign * 0.02 * np.sign(x), said=("fish 97 %", "dog 95 %"))[0]


def _shares(sign):
    at = np.linspace(0, 0.3, 7)
    lines = {"influence": (at, at ** (1 / (2 + sign)), 0.02 + at / 20), "random": (at, at)}
    return plots.shares(lines, level=(0.8, "true labels"))


def _leverage(sign):
    frame = pytest.importorskip("pandas").DataFrame({"leverage": 0.05 + 0.04 * np.abs(WAVE), "loo_residual": WAVE})
    return plots.leverage_residual(frame.assign(studentized_residual=2 * sign * NOISE, cooks_distance=np.abs(WAVE)))


DRAWN = {
    "agreement": _agreement,
    "bars": lambda sign: plots.bars(["row 1", "row 2", "row 3"], sign * np.array([3.0, 1, -2]), quiet=[0, 1, 0]),
    "before_and_after": _pictures,
    "calibration": lambda sign: plots.calibration(sign * WAVE, 0.2 + np.abs(NOISE) * (1.5 + sign), measure="loss"),
    "class_matrix": lambda sign: plots.class_matrix(sign * WAVE[:6].reshape(2, 3), ["spam", "ham"], list("abc")),
    "damping_path": _path,
    "histogram": lambda sign: plots.histogram(
        sign * np.repeat(WAVE, 9) ** 3, marked=np.arange(270) < 40, label="flipped"
    ),
    "influence_against_distance": lambda sign: plots.influence_against_distance(
        sign * WAVE, K / 3 + NOISE, kinds={"fish, as the query": K % 2 == 0, "dog": K % 2 == 1}, marked=[0, 4]
    ),
    "leverage_residual": _leverage,
    "predicted_against_actual": lambda sign: plots.predicted_against_actual(WAVE, sign * WAVE * 1.2),
    "removals": _removals,
    "shares": _shares,
    "solved": lambda sign: plots.solved(
        {"CG": 0.5 ** (K[:20] * (1.5 + sign)), "LiSSA": (K[::3], 0.8 ** K[::3])}, promised=1e-6
    ),
    "wrong_labels": _wrong_labels,
}


def draw(name, file, sign=1):
    """One plot as a small PNG that looks alike everywhere: matplotlib's own font, no hinting, no settings of a user."""
    mpl.rcdefaults()
    with mpl.rc_context({"font.family": "DejaVu Sans", "text.hinting": "none"}):
        DRAWN[name](sign).figure.savefig(file, dpi=50, metadata={"Software": None})


@pytest.mark.parametrize("name", DRAWN)
def test_it_looks_as_it_did_and_other_data_look_different(name, tmp_path):
    draw(name, tmp_path / "now.png")
    assert compare_images(str(BASELINES / f"{name}.png"), str(tmp_path / "now.png"), TOLERANCE) is None
    draw(name, tmp_path / "other.png", sign=-1)
    assert compare_images(str(BASELINES / f"{name}.png"), str(tmp_path / "other.png"), TOLERANCE) is not None


def test_every_plot_has_a_picture():
    drawn = {name for name in plots.__all__ if callable(getattr(plots, name))} - {"new_axes", "note", "style"}
    assert drawn == set(DRAWN)
    assert {path.stem for path in BASELINES.glob("*.png")} == drawn
    assert sum(path.stat().st_size for path in BASELINES.glob("*.png")) < 200_000


@pytest.mark.parametrize("name", sorted(set(DRAWN) - {"before_and_after"}))
def test_it_draws_on_the_axes_that_it_is_given(name, monkeypatch):
    given = plots.new_axes()
    function = getattr(plots, name)
    monkeypatch.setattr(plots, name, lambda *rest, **more: function(*rest, **more, ax=given))
    assert DRAWN[name](1) is given
    assert given.has_data() or given.images
    assert len(given.figure.axes) == 1


def test_dots_stand_where_prediction_and_truth_say():
    ax = _agreement(1)
    dots = np.asarray(ax.collections[0].get_offsets())
    assert np.allclose(dots, np.stack([WAVE, WAVE + 0.05 * NOISE], 1))
    assert ax.get_xlabel() == "predicted change of loss"


def test_what_helps_is_above_zero_and_the_classes_differ_in_shape():
    ax = DRAWN["influence_against_distance"](1)
    own, other, ring = ax.collections
    assert np.allclose(np.asarray(own.get_offsets())[:, 1], WAVE[::2])
    assert len(own.get_paths()[0].vertices) != len(other.get_paths()[0].vertices)
    assert np.allclose(np.asarray(ring.get_offsets())[:, 0], (K / 3 + NOISE)[[0, 4]])


def test_bars_are_in_the_order_of_their_names_with_the_first_at_the_top():
    ax = DRAWN["bars"](1)
    assert [bar.get_width() for bar in ax.patches] == [3, 1, -2]
    assert ax.patches[0].get_y() > ax.patches[2].get_y()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize("name", ["shares", "removals", "solved", "wrong_labels", "damping_path"])
def test_lines_differ_in_dashes_or_shape(name):
    lines = [
        line for line in DRAWN[name](1).lines if line.get_marker() not in {"None", "_"}
    ]  # no levels, no ends of bars
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines if len(line.get_xdata()) > 2}
    count = sum(len(line.get_xdata()) > 2 for line in lines)
    assert count
    assert len(looks) == count


def test_the_colours_are_apart_for_the_colour_blind():
    """In lightness, or seen without the cones for green (Viénot, Brettel and Mollon, 1999)."""
    from matplotlib.colors import to_rgb

    from upweight.show.plots.style import COLORS

    def seen(color):
        linear = np.array(to_rgb(color)) ** 2.2
        return np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]) @ linear

    for place, one in enumerate(COLORS[:3]):
        for other in COLORS[place + 1 : 3]:
            assert np.abs(seen(one).clip(0, 1) ** (1 / 2.2) - seen(other).clip(0, 1) ** (1 / 2.2)).max() > 0.12


if __name__ == "__main__":
    BASELINES.mkdir(exist_ok=True)
    for each in sys.argv[1:] or DRAWN:
        draw(each, BASELINES / f"{each}.png")
