"""The tutorials: notebooks that the site's build runs; here, that they are kept without outputs and come one by one."""

from __future__ import annotations

import json
import re

import pytest
from generated import ROOT

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))


def cells(notebook, kind):
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_five_and_each_is_on_the_front_page():
    front = (ROOT / "docs/index.md").read_text()
    assert len(TUTORIALS) == 5
    for notebook in TUTORIALS:
        assert f"tutorials/{notebook.name}" in front


@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_checks_what_it_says_and_its_links_lead_somewhere(notebook):
    assert any("assert " in code for code in cells(notebook, "code"))
    for text in cells(notebook, "markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert (notebook.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    nbclient.NotebookClient(nbformat.read(notebook, as_version=4), timeout=120).execute()
