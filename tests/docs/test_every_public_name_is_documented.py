"""A name without a docstring, a promise or a place in the docs is not public."""

from __future__ import annotations

import inspect
import re

import generated
import pytest
import reference

import upweight as uw

METHODS = [name for name, member in inspect.getmembers(uw.Influence) if not name.startswith("_") and callable(member)]


@pytest.mark.parametrize("module", reference.MODULES)
def test_every_name_has_a_docstring_and_a_line_in_the_docs(module):
    home = reference.home(module)
    page = (generated.ROOT / "docs/api.md").read_text()
    for name in reference.names_of(home):
        assert getattr(home, name).__doc__, name
        assert f"| `{name}` |" in page, name


def test_every_question_has_a_place_in_math_or_choosing():
    pages = "".join(
        (generated.ROOT / page).read_text() for page in ("docs/math.md", "docs/how-to-choose.md", "README.md")
    )
    for name in METHODS:
        if name.startswith(("on_", "of_", "check")):
            assert f"`{name}" in pages, name


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(("on_", "of_"))])
def test_every_question_says_its_formula_or_its_counterfactual(name):
    text = inspect.getdoc(getattr(uw.Influence, name))
    assert re.search(r"[Ee]quation \d|change of each query|if a |if training|measured on its own", text), name
    parameters = [p for p in inspect.signature(getattr(uw.Influence, name)).parameters if p != "self"]
    assert "Args:" in text or len(parameters) <= 3, name
