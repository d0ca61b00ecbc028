"""The site: a page for every public name, docstrings that become what they mean, figures that stand in a result."""

from __future__ import annotations

import html
import inspect
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import inventories
import look
import pytest
import reference
from generated import ROOT

import upweight as uw

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = (
    ("a_million_rows", "ten_queries_seconds", "2.00"),
    ("a_million_rows", "ten_more_queries_seconds", "0.67"),
    ("a_million_rows", "self_influence_seconds", "0.97"),
    ("a_million_rows", "seconds_to_read_the_data", "0.039"),
    ("linear_models_at_the_speed_of_memory", "one_query_seconds", "0.50"),
    ("linear_models_at_the_speed_of_memory", "numpy_cg_seconds", "2.72"),
    ("linear_models_at_the_speed_of_memory", "passes_over_the_data", "9"),
    ("linear_models_at_the_speed_of_memory", "hundred_queries_seconds", "10.7"),
    ("linear_models_at_the_speed_of_memory", "hundred_queries_limit_seconds_of_flops", "8.0"),
    ("linear_models_at_the_speed_of_memory", "self_influence_seconds", "40.3"),
    ("linear_models_at_the_speed_of_memory", "self_influence_over_flop_bound_float64", "1.30"),
    ("linear_models_at_the_speed_of_memory", "peak_memory_gigabytes", "1.86"),
    ("sparse_text_stays_sparse", "queries_seconds", "3.06"),
    ("sparse_text_stays_sparse", "dense_queries_over_sparse", "11.1"),
    ("sparse_text_stays_sparse", "peak_memory_gigabytes", "0.82"),
    ("scores_cost_a_few_passes", "scores_seconds.1", "8.2"),
    ("scores_cost_a_few_passes", "scores_seconds.10", "15.2"),
    ("scores_cost_a_few_passes", "scores_seconds.100", "33.5"),
    ("sparse_categories", "self_influence_seconds", "8.6"),
    ("sparse_categories", "self_influence_over_one_query", "315"),
    ("sparse_categories", "scipy_over_ours", "4.1"),
    ("scores_cost_a_few_passes", "forward_backward_seconds", "5.6"),
    ("certified_solve", "CG.seconds", "3.4"),
    ("certified_solve", "EKFAC alone.seconds", "0.66"),
    ("certified_solve", "EKFAC alone.smallest_pearson", "0.58"),
    ("larger_than_memory", "5,000,000 rows.seconds", "14.7"),
    ("larger_than_memory", "growth_in_bytes_a_row", "9.9"),
)


def test_every_public_name_has_a_page_that_says_something():
    entries = reference.entries()
    assert {f"upweight.{name}" for name in uw.__all__} <= entries.keys()
    pages = [entry.page for entry in entries.values()]
    assert len({str(page).lower() for page in pages}) == len(pages)  # also on disks that do not tell LDS from lds
    for name, entry in entries.items():
        text = reference.page(entry)
        said = re.sub(r"(?s)^---.*?---|```\{py.*?```|^#.*?$|In \[.*?\)|^\|.*?$|Written in.*", "", text, flags=re.M)
        assert re.search(r"\w", said), name


@pytest.mark.parametrize("name", ["upweight.Influence", "upweight.Scores", "upweight.Index", "upweight.solvers.CG"])
def test_the_page_of_a_class_has_all_its_methods_and_arguments(name):
    entry = reference.entries()[name]
    text = reference.page(entry)
    for member, value in inspect.getmembers(entry.value):
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert f"{name}.{member}" in text, member
    for argument in list(inspect.signature(entry.value).parameters):
        assert f"* `{argument}`: " in text or f"| `{argument}` | " in text, argument


def test_a_docstring_becomes_markdown():
    text = """A sum: `CG(rtol=1e-6)` and `nothing_public`, a*b*c, x_y, <none>; equation 2.

    values[q, i] = S_q * g
    second line

More, with InvalidInput.
* a point about `on_loss`
* another

Cost: one sweep,
and more.

Args:
    first: what it is,
        going on.
    second: else.

Raises:
    InvalidInput: if `first` is wrong.

>>> 1 + 1
2

References: Koh and Liang (2017)."""
    out = reference.markdown(text)
    assert "{py:obj}`CG(rtol=1e-6) <upweight.solvers.CG>` and `nothing_public`, a\\*b\\*c, x\\_y, \\<none\\>" in out
    assert "[equation 2](/docs/math.md#equations)" in out
    assert "```text\nvalues[q, i] = S_q * g\nsecond line\n```" in out
    assert "* a point about {py:obj}`on_loss <upweight.Influence.on_loss>`\n* another\n" in out
    assert "**Cost:** one sweep, and more.\n" in out
    assert "* `first`: what it is, going on.\n* `second`: else.\n" in out
    assert "* {py:obj}`InvalidInput <upweight.errors.InvalidInput>`: if `first` is wrong.\n" in out
    assert "```pycon\n>>> 1 + 1\n2\n```" in out
    assert "**References:** Koh and Liang (2017)." in out


def test_a_page_leads_to_what_it_names_once_and_keeps_its_code():
    text = """# About `CG`

`uw.explain(…)` and `CG()`, `CG()` again; `influence.on_loss(…)`, `check`, [`CG`](x.md), Ridge and Ridge.

```python
model = Ridge()  # `CG`
```
"""
    out = reference.with_names(text)
    assert out == text.replace(
        "`uw.explain(…)` and `CG()`, `CG()` again; `influence.on_loss(…)`",
        "{py:obj}`uw.explain(…) <upweight.explain>` and {py:obj}`CG() <upweight.solvers.CG>`, `CG()` again; "
        "{py:obj}`influence.on_loss(…) <upweight.Influence.on_loss>`",
    ).replace("Ridge and Ridge.", "{py:obj}`Ridge <sklearn.linear_model.Ridge>` and Ridge.")


def test_what_is_documented_elsewhere_is_looked_up_in_what_is_kept():
    """What an annotation, an error or a page names; written and read again without Sphinx, and as Sphinx reads it."""
    assert inventories.ways()["Tensor"] == "torch.Tensor"
    assert inventories.ways()["os.PathLike"] == "os.PathLike"
    assert "{py:obj}`Tensor <torch.Tensor>`" in reference.linked("A `Tensor`.")
    for project in inventories.SITES:
        kept = inventories.read(inventories.KEPT / f"{project}.inv")
        assert kept
        assert all("$" not in rest.split()[2].removesuffix("$") for rest in kept.values())  # expanded at the end alone
    loader = pytest.importorskip("sphinx.util.inventory").InventoryFile
    with (inventories.KEPT / "scikit-learn.inv").open("rb") as stream:
        found = loader.load(stream, "https://x", lambda *parts: "/".join(parts))
    address = found["py:class"]["sklearn.linear_model.Ridge"].uri
    assert address == "https://x/modules/generated/sklearn.linear_model.Ridge.html#sklearn.linear_model.Ridge"


def test_no_docstring_loses_a_word():
    """Whatever a docstring says stands on its page, whichever way its lines are put together."""
    for entry in reference.entries().values():
        doc = inspect.getdoc(entry.value) or ""
        if isinstance(entry.value, uw.losses.Loss):
            continue
        words = re.findall(r"[A-Za-z]{3,}", doc)
        shown = re.findall(r"[A-Za-z]{3,}", reference.markdown(doc))
        missing = [word for word in words if word not in set(shown)]
        assert not missing, (entry.name, missing)
        assert len(shown) >= len(words), entry.name


def test_the_list_of_names_leads_to_the_pages():
    text = reference.with_links((ROOT / "docs/api.md").read_text())
    linked = set(re.findall(r"\]\(/(docs/reference/\S+\.md)\)", text))
    assert linked >= {str(entry.page) for entry in reference.entries().values() if entry.kind != "module"}


@pytest.mark.parametrize(("file", "key", "shown"), FIGURES)
def test_a_figure_of_the_costs_is_that_of_a_result(file, key, shown):
    value = json.loads((RESULTS / f"{file}.json").read_text())["numbers"]
    for part in key.split("."):
        value = value[part]
    digits = len(shown.partition(".")[2])
    assert abs(value - float(shown)) <= 0.5001 * 10**-digits
    assert re.search(rf"(?<![\d.]){re.escape(shown)}(?!\d)", (ROOT / "docs/costs.md").read_text())


def test_the_citation_names_the_last_version_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## (\d+\.\d+\.\d+)$", changelog, re.M)
    assert changelog.startswith("# Changelog\n\n## Unreleased\n")
    assert f"\nversion: {released[1]}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert uw.__version__ == version("upweight")
    except PackageNotFoundError:
        assert uw.__version__ == "0+unknown"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with every warning an error."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "-c", "docs", "-d", folder / "doctrees", "."]
    done = subprocess.run([*command, folder / "html"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_is_small_and_whole(site):
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < 15e6
    for entry in reference.entries().values():
        assert (site / entry.page.with_suffix(".html")).exists(), entry.name
    assert not {file.name for file in site.glob("_images/*")} & {file.name for file in site.glob("_downloads/*/*")}
    index = (site / "searchindex.js").read_text()
    assert "docs/trust" in index
    assert "docs/reference/classes/upweight.solvers.CG" in index


@pytest.mark.slow
def test_no_internal_link_is_dead(site):
    """Every address within the site is a file, and what stands behind # is in it; nothing is loaded from elsewhere."""
    pages = {file: file.read_text() for file in site.rglob("*.html")}
    places = {file: set(re.findall(r"\bid=\"([^\"]+)\"", text)) for file, text in pages.items()}
    dead, elsewhere = set(), set()
    for file, text in pages.items():
        for kind, address in re.findall(r"\b(href|src)=\"([^\"]*)\"", text):
            where, _, place = html.unescape(address).partition("#")
            if re.match(r"[a-z]+:|//", where):
                elsewhere |= {address} if kind == "src" and not where.startswith("data:") else set()
                continue
            target = (file.parent / unquote(where.partition("?")[0])).resolve() if where else file
            known = target in places and (not place or unquote(place) in places[target])
            if not (known or (target.exists() and not place) or place in _PLACES):
                dead.add((str(file.relative_to(site)), address))
    assert not dead
    assert not elsewhere


_PLACES = {"svg-sun", "svg-moon", "svg-toc", "svg-menu", "svg-arrow-right"}  # drawn by the theme in every page


@pytest.mark.slow
def test_the_site_is_read_alone_on_a_telephone_and_by_everybody(site):
    """No request goes elsewhere, nothing is wider than the page, search answers, axe finds nothing serious."""
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python.sync_playwright")
    with look.browsed(site) as (browser, address):
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            for path in look.PAGES:
                page.goto(f"{address}/{path}.html")
                assert look.overflow(page) <= 0, (path, width)
                assert not look.faults(page), (path, scheme)
            page.goto(f"{address}/search.html?q=leverage")
            page.wait_for_selector("#search-results li")
            assert all(url.startswith((address, "data:")) for url in asked)
