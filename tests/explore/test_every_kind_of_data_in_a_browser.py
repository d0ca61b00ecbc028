"""Pictures, e-mails and a hospital's table, as `upweight demo --explore --data …` has them: from the link to the proof.

Each run is a small one of the demo's own studies. A person at a keyboard finds a query that the model gets wrong, reads
the rows behind it, reviews twenty labels, takes one back, exports what was found, and sees the proof.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from window import CHROMIUM, axe, chromium, judged, now, saved, served, until, window

import upweight as uw
from upweight import datasets
from upweight.cli import demo, main
from upweight.cli.studies import STUDIES
from upweight.explore.labels import labels_of
from upweight.explore.reviews import Reviews
from upweight.explore.showing import signed

pytest.importorskip("playwright")
if not Path(CHROMIUM).exists():
    pytest.skip("there is no chromium", allow_module_level=True)

SIZES = {"digits": (400, 80), "mnist": (400, 80), "enron1": (400, 80), "hospital": (600, 80)}
FOLDERS = {"mnist": "mnist", "enron1": "enron1", "hospital": "diabetes130"}
KEYS = "krdksrkkdkrkkskrkdkk"  # twenty


@dataclass(frozen=True)
class Opened:
    """A run of one kind of data, served."""

    kind: str
    run: uw.Run
    link: str
    browser: Any

    @property
    def wrong(self) -> int:
        """The query that the model gets wrong with the largest loss."""
        queries = self.run.queries
        losses = np.where(queries.labels != queries.predictions, queries.losses, -np.inf)
        return int(losses.argmax())


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=SIZES)
def opened(request, tmp_path_factory, browser):
    kind = request.param
    if kind in FOLDERS and datasets.local(FOLDERS[kind]) is None:
        pytest.skip(f"UPWEIGHT_DATA has no {FOLDERS[kind]} folder")
    folder = tmp_path_factory.mktemp(kind) / "run"
    demo.write_run(STUDIES[kind](*SIZES[kind]), folder, rows=3)
    with served(folder) as link:
        yield Opened(kind, uw.Run.open(folder), link, browser)


def test_from_the_link_to_the_proof(opened, tmp_path):
    run = opened.run
    with window(opened.browser, opened.link) as page:
        base = page.url.split("?")[0].rstrip("/")
        page.get_by_role("link", name="queries that the model gets wrong").click()
        first = page.locator("tbody tr[data-item]").first
        assert "wrong" in first.inner_text()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Why?").wait_for()
        assert page.url.endswith(f"/queries/{opened.wrong}")
        for side, most in (("Most helpful", run.scores.helpful(8)), ("Most harmful", run.scores.harmful(8))):
            cards = page.get_by_role("region", name=side).locator("li[data-item]")
            rows, values = most.rows[opened.wrong].tolist(), most.values[opened.wrong].tolist()
            assert [int(text.split()[1]) for text in cards.locator(".head a").all_inner_texts()] == rows
            assert cards.locator(".head .value").all_inner_texts() == [signed(value) for value in values]
            own = [run.rows.labels[row] for row in rows]
            assert cards.locator(".under .label").all_inner_texts() == [str(label) for label in own]
        page.wait_for_load_state("load")
        assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)"))
        verdicts = _review(page, base, run)
        page.goto(f"{base}/export")
        with page.expect_download() as download:
            page.get_by_role("link", name="Patch").press("Enter")
        patch = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        assert {int(line["row"]) for line in patch} == {one.row for one in verdicts.values() if one.wrong}
        _prove(opened, tmp_path)
        page.goto(f"{base}/proof")
        told = json.loads(page.request.get(f"{base}/proof.json").text())["proof"]
        assert told["relabelled"] + told["dropped"] == len(patch)
        assert f"{100 * told['accuracy']['after']:.2f}" in page.inner_text("main")
        assert page.troubles == []


def _review(page, base, run):
    """Twenty rows by key, one taken back; the verdicts that stand in the log."""
    page.goto(f"{base}/review?budget=24&controls=20")
    pressed = []
    for key in KEYS:
        row, label = now(page)
        if key == "r" and page.locator("[data-do=relabel]").is_hidden():
            key = "k"
        page.keyboard.press(key)
        pressed.append((row, label, key))
    until(page, "document.querySelector('#progress progress').value === 20")
    page.keyboard.press("u")
    saved(page, "taken back")
    log = Reviews(run.path, labels_of(run))
    entries = log.entries()
    assert [(one.row, judged(one.action)) for one in entries[:20]] == [(row, key) for row, _, key in pressed]
    assert all(str(one.old) == label for one, (_, label, _) in zip(entries, pressed, strict=False))
    assert [(one.row, one.action) for one in entries[20:]] == [(pressed[-1][0], "undo")]
    return log.verdicts()


def _prove(opened, folder):
    """`upweight prove` with the study that the run is of."""
    file = folder / "small.py"
    sizes = ", ".join(map(str, SIZES[opened.kind]))
    file.write_text(
        f"from upweight.cli.studies import STUDIES\n\n\ndef study():\n    return STUDIES[{opened.kind!r}]({sizes})\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["prove", f"{file}:study", "--run", str(opened.run.path)])
    assert end.value.code == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_and_is_accessible(opened, width, scheme):
    row = int(opened.run.scores.helpful(1).rows[opened.wrong, 0])
    places = ("", "queries?truth=wrong&sort=loss&down=1", f"queries/{opened.wrong}", "rows", f"rows/{row}", "slices")
    with window(opened.browser, opened.link, width, 844, color_scheme=scheme, reduced_motion="reduce") as page:
        base = page.url.split("?")[0].rstrip("/")
        for place in (*places, "trust", "review", "review/log", "proof", "export", "compare"):
            page.goto(f"{base}/{place}")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
            assert axe(page) == [], place
            if place == "review":
                above = "one.firstElementChild.getBoundingClientRect().top - one.getBoundingClientRect().top"
                shown = f"(one => {above})(document.querySelector('.judge:not([hidden]) .looks'))"
                assert page.evaluate(shown) > -1  # what is longer than its box begins at its top
        assert page.troubles == []
