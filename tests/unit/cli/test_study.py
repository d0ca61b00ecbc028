"""Which `module:function` names a Study, and what is said about all others."""

from __future__ import annotations

import sys

import pytest

from small import refuses
from upweight.cli.study import Study, load

SOURCE = """
from small import XQ, ZQ, ridge
from upweight import Study

ANSWER = 42


def good():
    return Study(ridge(), (XQ, ZQ), describe=lambda row: f"case {row}")


def number():
    return 3


def broken():
    import no_such_dependency
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with studies in it; nothing of it stays importable."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("studies_here", "package_here", "package_here.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "studies_here.py").write_text(SOURCE)
    (tmp_path / "package_here").mkdir()
    (tmp_path / "package_here" / "inner.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("studies_here", "package_here", "package_here.inner"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["studies_here:good", "package_here.inner:good"])
def test_a_function_in_the_working_directory_is_found(name):
    study = load(name)
    assert isinstance(study, Study)
    assert study.describe(3) == "case 3"
    assert study.retrain is None


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("studies_here", ValueError, "'studies_here' does not name a function"),
        ("studies_here:", ValueError, "does not name a function"),
        ("", ValueError, "'' does not name"),
        (":good", ValueError, "does not name a function"),
        ("no_such_study:good", FileNotFoundError, "no module 'no_such_study'"),
        ("package_here.nothing:good", FileNotFoundError, "no module 'package_here.nothing'"),
        ("studies_here:bad", ValueError, "'studies_here' has no function 'bad'"),
        ("studies_here:ANSWER", ValueError, "no function 'ANSWER'"),
        ("studies_here:number", ValueError, "returned a int.*Study"),
    ],
)
def test_other_names_are_refused(name, kind, text):
    refuses(lambda: load(name), kind, text)


def test_a_missing_dependency_of_the_study_is_the_studys_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load("studies_here:broken")
