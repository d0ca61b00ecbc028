"""A person with a keyboard: twenty rows judged, one taken back, exported, and the proof; two windows at once agree."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from window import CHROMIUM, axe, chromium, now, saved, served, until, window

import upweight as uw
from upweight.explore.labels import labels_of
from upweight.explore.reviews import Reviews

pytest.importorskip("playwright")
if not Path(CHROMIUM).exists():
    pytest.skip("there is no chromium", allow_module_level=True)

TRAIN, TEST, WRONG = 500, 300, 40
TRUTH = load_digits().target
BUDGET = "?budget=40&controls=25"


def study() -> uw.Study:
    X, y = load_digits().data / 16, TRUTH.copy()
    draw = np.random.default_rng(0)
    spoilt = draw.choice(TRAIN, WRONG, replace=False)
    y[spoilt] = (y[spoilt] + draw.integers(1, 10, WRONG)) % 10
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit(X[:TRAIN], y[:TRAIN])
    asked = slice(TRAIN, TRAIN + TEST)
    return uw.Study(uw.explain(model, X[:TRAIN], y[:TRAIN]), (X[asked], TRUTH[asked]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with pictures, its link, and a browser."""
    path, one = tmp_path_factory.mktemp("digits") / "run", study()
    pictures = np.uint8(255 - load_digits().images * 15.9)
    uw.write_run(
        one.influence,
        path,
        *one.queries,
        card=lambda row: pictures[row],
        query_card=lambda query: pictures[TRAIN + query],
    )
    with served(path) as link, chromium() as browser:
        yield path, link, browser


def judge(page):
    """Say by key what is true of the row at hand."""
    row, label = now(page)
    page.keyboard.press("k" if str(TRUTH[row]) == label else str(TRUTH[row]))
    return row


def test_a_session_by_keyboard_alone(made, tmp_path, monkeypatch):
    path, link, browser = made
    with window(browser, link, reduced_motion="reduce") as page:
        base = page.url.split("?")[0].rstrip("/")
        page.goto(f"{base}/review{BUDGET}")
        assert axe(page) == []
        assert "drawn at random" not in page.inner_text("#judges")
        rows = [judge(page) for _ in range(20)]
        until(page, "document.querySelector('#progress progress').value === 20")
        assert len(set(rows)) == 20
        first_known = now(page)[0]
        page.keyboard.press("u")
        saved(page, f"Row {rows[-1]}: taken back")
        assert now(page)[0] == rows[-1]
        page.keyboard.press("w")
        page.keyboard.type("k is no key here")
        page.keyboard.press("Enter")
        page.keyboard.press("d")
        saved(page, f"Row {rows[-1]}: dropped")
        assert now(page)[0] == first_known
        page.keyboard.press("s")
        saved(page, "cannot be told")
        log = Reviews(path, labels_of(uw.Run.open(path)))
        entries, labels = log.entries(), log.labels
        assert [one.row for one in entries[:20]] == rows
        for one in entries[:19]:
            right = TRUTH[one.row] == labels.given(one.row)
            assert (one.action, one.new) == (
                ("keep", labels.given(one.row)) if right else ("relabel", int(TRUTH[one.row]))
            )
        assert [(one.action, one.why) for one in entries[20:]] == [
            ("undo", ""),
            ("drop", "k is no key here"),
            ("skip", ""),
        ]
        says = page.inner_text("#progress")
        wrong = sum(labels.given(one.row) != TRUTH[one.row] for one in entries[:19])
        assert wrong > 5
        assert "22 of 40 looked at" not in says
        assert "21 of 40 looked at" in says
        assert axe(page) == []
        page.goto(f"{base}/rows/{rows[0]}")
        assert "History" in page.inner_text("main")
        page.goto(f"{base}/review/log")
        assert axe(page) == []
        assert page.locator("tbody tr").count() == 23
        page.goto(f"{base}/export")
        assert axe(page) == []
        with page.expect_download() as download:
            page.get_by_role("link", name="Patch").press("Enter")
        lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
        changed = {one.row for one in log.verdicts().values() if one.wrong}
        assert {int(line["row"]) for line in lines} == changed
        _prove(path, monkeypatch, tmp_path)
        page.goto(f"{base}/proof")
        assert axe(page) == []
        told = json.loads(page.request.get(f"{base}/proof.json").text())["proof"]
        assert told["relabelled"] + told["dropped"] == len(changed)
        assert f"{100 * told['accuracy']['after']:.2f}" in page.inner_text("main")
        assert page.troubles == []


def _prove(path, monkeypatch, folder):
    from upweight.cli import main

    (folder / "judged.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom {Path(__file__).stem} import study\n"
    )
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    with pytest.raises(SystemExit) as end:
        main(["prove", f"{folder / 'judged.py'}:study", "--run", str(path)])
    assert end.value.code == 0


def test_two_windows_agree(made):
    path, link, browser = made
    with window(browser, link) as one, window(browser, link) as other:
        base = one.url.split("?")[0].rstrip("/")
        queue = "?budget=60&controls=0&by=loss"
        one.goto(f"{base}/review{queue}")
        other.goto(f"{base}/review{queue}")
        row = now(one)[0]
        assert now(other)[0] == row
        other.evaluate("setInterval = () => 0")
        one.keyboard.press("d")
        saved(one)
        other.keyboard.press("k")
        saved(other, f"Row {row} was not written: meanwhile ")
        assert "said drop" in other.inner_text("#told")
        assert now(other)[0] == row
        log = Reviews(path, labels_of(uw.Run.open(path)))
        assert log.verdict(row).action == "drop"
        other.keyboard.press("k")  # after it was told, the same window may say otherwise
        saved(other, f"Row {row}: kept")
        assert log.verdict(row).action == "keep"
        second = now(other)[0]
        other.keyboard.press("s")
        saved(other, f"Row {second}: cannot be told")
        until(one, f"document.querySelector('.judge[data-row=\"{second}\"]').dataset.action === 'skip'")
        assert now(one)[0] != second
        assert one.inner_text("#progress").splitlines()[0] == other.inner_text("#progress").splitlines()[0]
        expected = ["Failed to load resource: the server responded with a status of 409 (Conflict)"]
        assert (one.troubles, other.troubles) == ([], expected)


def test_a_verdict_that_is_not_kept_comes_back(made):
    _, link, browser = made
    with window(browser, link) as page:
        page.goto(page.url.split("?")[0].rstrip("/") + "/review?by=margin&budget=30")
        page.route("**/review/decide*", lambda route: route.abort())
        row = now(page)[0]
        page.keyboard.press("k")
        until(page, "document.querySelector('#told').classList.contains('care')")
        assert now(page)[0] == row
        page.unroute("**/review/decide*")
        page.keyboard.press("k")
        saved(page, f"Row {row}: kept. Saved.")


def test_the_next_row_is_there_within_a_tenth_of_a_second(made):
    _, link, browser = made
    with window(browser, link) as page:
        page.goto(page.url.split("?")[0].rstrip("/") + "/review?by=random&budget=90")
        now(page)
        script = """async () => {
          const times = [];
          for (let k = 0; k < 15; k += 1) {
            const before = document.querySelector('.judge:not([hidden])');
            const start = performance.now();
            document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 's', bubbles: true, cancelable: true }));
            await new Promise(requestAnimationFrame);
            if (document.querySelector('.judge:not([hidden])') === before) throw new Error('no next row');
            times.push(performance.now() - start);
            await new Promise((done) => setTimeout(done, 30));
          }
          return times;
        }"""
        times = page.evaluate(script)
        assert statistics.median(times) < 100, times


def test_the_page_is_read_without_javascript(made):
    _, link, browser = made
    with window(browser, link, java_script_enabled=False) as page:
        base = page.url.split("?")[0].rstrip("/")
        page.goto(f"{base}/review?by=loss&at=0")
        assert "Verdicts are sent by JavaScript" in page.inner_text("main")
        assert page.locator(".toolbar button:not([disabled])").count() == 0
        first = page.locator(".judge:not([hidden])").get_attribute("data-row")
        page.click("a[rel=next]")
        assert page.locator(".judge:not([hidden])").get_attribute("data-row") != first
        assert page.troubles == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_pages_fit_and_are_accessible(made, width, scheme):
    _, link, browser = made
    with window(browser, link, width, 844, color_scheme=scheme) as page:
        base = page.url.split("?")[0].rstrip("/")
        for place in ("review?by=margin&budget=200", "review/log", "proof", "export"):
            page.goto(f"{base}/{place}")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
            assert axe(page) == [], place
