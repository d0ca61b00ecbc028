"""A run folder as one page: its numbers are the run's, nothing in it is anybody's markup, and it stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression

import upweight as uw
from upweight.cli.entry import main
from upweight.show.cards import looks
from upweight.show.health import health
from upweight.show.png import png, small

HOSTILE = "</p><script>alert('x')</script>\"&<img src=x onerror=alert(1)>"
N = 60
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, 3))
Y = np.where(X[:, 0] + 0.7 * DRAW.normal(size=N) > 0, HOSTILE, "no")
XQ = DRAW.normal(size=(9, 3))
YQ = np.where(XQ[:, 0] > 0, "no", HOSTILE)
YQ[:4] = np.where(XQ[:4, 0] > 0, HOSTILE, "no")
CHROMIUM = Path("/usr/bin/chromium")
VOID = {"br", "img", "meta"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "section", "div", "span", "p", "b", "u", "code"}
ALLOWED |= {"h1", "h2", "h3", "ul", "li", "img", "table", "caption", "thead", "tbody", "tr", "th", "td"}
ALLOWED |= {"svg", "desc", "rect", "line", "text", "circle", "path"}


class Read(HTMLParser):
    """What a page is made of; every element that opens is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], set(), []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert name != "src" or value.startswith("data:image/png;base64,")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def card(row):
    picture = (np.arange(48 * 48).reshape(48, 48) + row).astype(np.uint8)
    return [HOSTILE * 3, {HOSTILE: HOSTILE, "b": row}, picture, None][row % 4]


def influence():
    return uw.explain(LogisticRegression(tol=1e-8).fit(X, Y), X, Y, ids=[f"{HOSTILE}{row}" for row in range(N)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    uw.write_run(influence(), path, XQ, YQ, card=card, query_card=card)
    return path


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    return uw.write_report(folder, tmp_path_factory.mktemp("page") / "new" / "page.html", queries=9).read_text()


def test_what_users_name_is_text_and_nothing_can_run_or_load(page):
    read = Read(page)
    assert set(read.tags) <= ALLOWED, set(read.tags) - ALLOWED
    assert not {name for name in read.attributes if name.startswith("on") or name in {"style", "href", "srcset"}}
    assert HOSTILE in unescape(page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.search("<style>(.*?)</style>", page, re.S).group(1)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    assert "url(" not in style
    assert "@import" not in style


def test_its_values_are_those_of_the_run(folder, page):
    run, text = uw.Run.open(folder), Read(page).text
    worst = int(np.argmax(np.where(run.queries.labels != run.queries.predictions, run.queries.losses, -1)))
    first = page.split('<section class="query">')[1]
    assert f"query {worst}: wrong" in first
    helpful, harmful = run.scores.helpful(3), run.scores.harmful(3)
    for top, word in ((helpful, "helps"), (harmful, "harms")):
        for value in top.values[worst]:
            assert f"{value:+.3g} {word}" in first
    assert first.index(f"{helpful.values[worst, 0]:+.3g}") < first.index(f"{harmful.values[worst, 0]:+.3g}")
    wrong = run.queries.labels != run.queries.predictions
    assert f"{wrong.sum()} of 9 queries" in text
    assert f"{run.rows.self_influence.max():.3g}" in page.split("Rows to look at first")[1]
    assert all(words in text for words in ("Sound: ", "residual ≤", "How to read a value", "Nothing was trained again"))


def test_queries_are_the_wrong_ones_by_loss_and_then_the_least_sure(folder, page):
    run = uw.Run.open(folder)
    shown = re.findall(r'<section class="query"><h3>query (\d+): ([^<]*)', page)
    wrong = run.queries.labels != run.queries.predictions
    first = [int(query) for query, why in shown if why == "wrong"]
    rest = [int(query) for query, why in shown if why == "right, but least sure"]
    assert wrong[first].all()
    assert not wrong[rest].any()
    assert (np.diff(run.queries.losses[first]) <= 0).all()
    assert (np.diff(run.queries.margins[rest]) >= 0).all()
    assert len(rest) >= 3


def test_it_is_made_from_the_folder_without_torch_or_matplotlib(folder, tmp_path):
    code = (
        "import sys; from upweight.show.run_report import write_report;"
        f"write_report({str(folder)!r}, {str(tmp_path / 'page.html')!r});"
        "print(sorted({'torch', 'matplotlib', 'PIL', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_trainings_said_is_drawn(folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    explained, on = influence(), (XQ, YQ)
    run = uw.Run.open(copy)
    outcomes = uw.leave_one_out(explained, on, [0, 1, 2, 3])
    subsets = uw.subset_retraining(explained, on, uw.random_subsets(N, 4, 0.5, seed=0))
    uw.keep_evidence(run, outcomes, subsets, explained.damping_path(*on, dampings=[0.01, 0.1, 1.0]))
    text = uw.write_report(run, tmp_path / "page.html").read_text()
    close = np.corrcoef(run.scores.values[:, :4].ravel(), outcomes.actual.ravel())[0, 1]
    assert f"Correlation {close:.3f}" in text
    for title in ("4 rows really left out", "4 subsets really trained on", "Values along other dampings"):
        assert title in text
    assert "Nothing was trained again" not in text


def test_it_keeps_to_its_limit_and_says_what_it_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (N, 200, 200, 3)).astype(np.uint8)
    run = uw.write_run(influence(), tmp_path / "run", XQ, YQ, card=noise.__getitem__, query_card=noise.__getitem__)
    whole = uw.write_report(run, tmp_path / "whole.html", queries=9, limit=50_000_000).stat().st_size
    page = uw.write_report(run, tmp_path / "page.html", queries=9, limit=2_000_000)
    assert page.stat().st_size <= 2_000_000 < whole
    left = int(re.search(r"(\d+) more were chosen and left out", page.read_text()).group(1))
    assert page.read_text().count('<section class="query">') == 9 - left


def test_scores_alone_and_numbers_instead_of_classes_make_a_page(tmp_path):
    influence().on_loss(XQ, YQ, store=tmp_path / "alone")
    text = uw.write_report(tmp_path / "alone", tmp_path / "alone.html").read_text()
    assert "one of the largest losses" in text
    assert "Rows to look at first" not in text
    noisy = X[:, 1] + DRAW.normal(size=N)
    fit = uw.explain(LinearRegression().fit(X, noisy), X, noisy)
    run = uw.write_run(fit, tmp_path / "numbers", XQ, XQ[:, 1])
    assert "one of the largest losses" in uw.write_report(run, tmp_path / "numbers.html").read_text()


def test_the_command_writes_the_page(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "page.html").stat().st_size


def test_a_certificate_with_something_against_it_is_read_with_care(folder):
    from dataclasses import replace

    outline = uw.Run.open(folder).outline
    card = outline.certificate
    assert health(card, outline.query_values)[0]
    for change, words in (
        ({"converged": False}, "not solved"),
        ({"residual": np.array([0.5])}, "residual up to 0.5"),
        ({"min_curvature": -1.0}, "not positive"),
        ({"drift": np.full(9, 10.0)}, "not at a minimum"),
        ({"truncation": 0.5}, "stopped early"),
        ({"solver": ""}, "no linear system"),
    ):
        good, sentence = health(replace(card, **change), outline.query_values)
        assert not good
        assert words in sentence


def test_pictures_are_small_and_are_what_they_were():
    grey = np.arange(200 * 100, dtype=np.uint32).astype(np.uint8).reshape(200, 100)
    less = small(grey, 96)
    assert less.shape == (67, 34)
    for picture in (less, np.stack([less, less.T[:34, :34].repeat(2, 0)[:67], less], 2)):
        content = png(picture)
        data = content[content.index(b"IDAT") + 4 : content.index(b"IEND") - 8]
        lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(len(picture), -1)
        assert not lines[:, 0].any()
        assert np.array_equal(lines[:, 1:].reshape(picture.shape), picture)
        image = pytest.importorskip("PIL.Image")
        import io

        assert np.array_equal(np.asarray(image.open(io.BytesIO(content))), picture)


def test_words_in_common_are_underlined_and_columns_compared():
    assert (
        looks("Cheap pills & more", "row 1", "buy PILLS now")
        == '<p class="uw-text text">Cheap <u>pills</u> &amp; more</p>'
    )
    table = looks({"a": 1.0, "b": 5.0, "c": "x"}, "row 1", {"a": 1.0, "b": 2.0, "c": "y"})
    assert table.index(">c<") < table.index(">b<") < table.index(">a<")
    assert "+3" in table
    assert "differs" in table
    assert looks(None, "row 1") == ""


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no chromium")
def test_a_browser_finds_nothing_serious_against_it(page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    (tmp_path / "page.html").write_text(page)
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        said, asked = [], []
        for width, scheme in ((390, "dark"), (1280, "light")):
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
            view.on("console", lambda message: said.append(message.text))
            view.on("request", lambda request: asked.append(request.url))
            view.goto((tmp_path / "page.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            found = axe.Axe().run(view).response["violations"]
            serious = [one["id"] for one in found if one["impact"] in {"serious", "critical"}]
            assert not serious, [(one["id"], one["nodes"][0]["html"]) for one in found]
        strict = browser.new_page()  # with its policy in force, nothing of the page itself is refused
        strict.on("console", lambda message: said.append(message.text))
        strict.goto((tmp_path / "page.html").as_uri())
        assert strict.evaluate("getComputedStyle(document.body).maxWidth") != "none"
        browser.close()
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
