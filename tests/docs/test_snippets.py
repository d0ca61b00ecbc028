"""Every Python block of README and docs runs, in the order of its page; every example runs and stays short."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest
from generated import ROOT, markdown_pages

PAGES = [path for path in markdown_pages() if "```python" in path.read_text()]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for package in ("transformers", "peft"):
        if any(f"from {package}" in block for block in blocks):
            pytest.importorskip(package)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which peft 0.21 still asks
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    assert "NaN" not in capsys.readouterr().out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_at_most_40_lines(example, capsys):
    assert len(example.read_text().splitlines()) <= 40
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out or example.name == "study.py"


def test_the_example_study_is_a_study():
    namespace = runpy.run_path(str(ROOT / "examples/study.py"))
    assert namespace["breast_cancer"]().influence.n == 469


def test_every_page_is_linked_from_the_readme_or_another_page():
    texts = {path: path.read_text() for path in markdown_pages()}
    for page in texts:
        if page.is_relative_to(ROOT / "docs"):
            assert any(page.name in text for path, text in texts.items() if path != page), page


def anchors(page: Path) -> set[str]:
    """What a link to a part of a page may name: its headings, as GitHub and MyST write them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", one) for one in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", markdown_pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        place = page.parent / target if target else page
        assert target.startswith("http") or place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), (target, anchor)
