"""Which `module:function` or `file.py:function` names a Study, and what is said about all others."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from small import refuses
from upweight.cli.endings import StudyFailed
from upweight.cli.study import Study, load
from upweight.errors import InvalidInput

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


def needy(rows, *, seed):
    return good()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with studies in it; nothing of it stays importable."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "studies_here.py").write_text(SOURCE)
    (tmp_path / "package_here").mkdir()
    (tmp_path / "package_here" / "inner.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if name.partition(".")[0] in {"studies_here", "package_here", "inner"} or "_of_a_test" in name:
            del sys.modules[name]
    sys.modules |= before


@pytest.mark.parametrize(
    "name",
    [
        "studies_here:good",
        "package_here.inner:good",
        "studies_here.py:good",
        "./studies_here.py:good",
        "package_here/inner.py:good",
        "package_here/../studies_here.py:good",
        "{}/package_here/inner.py:good",
    ],
)
def test_a_function_is_found_by_its_module_or_its_file(name, folder):
    study = load(name.format(folder))
    assert isinstance(study, Study)
    assert study.describe(3) == "case 3"
    assert study.retrain is None


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("studies_here", ValueError, "'studies_here' does not name a function"),
        ("studies_here:", ValueError, "does not name a function"),
        ("studies_here.py", ValueError, "'studies_here.py' does not name a function.*studies_here.py:digits"),
        ("", ValueError, "'' does not name"),
        (":good", ValueError, "does not name a function"),
        ("no_such_study:good", FileNotFoundError, "no module 'no_such_study'"),
        ("package_here.nothing:good", FileNotFoundError, "no module 'package_here.nothing'"),
        ("nothing.py:good", FileNotFoundError, "no Python file at .*/nothing.py"),
        ("package_here/inner:good", FileNotFoundError, "no Python file at .*/inner"),
        ("./package_here:good", FileNotFoundError, "no Python file at .*/package_here"),
        ("studies_here:bad", ValueError, "'studies_here' has no function 'bad'. It has good, number, broken, needy;"),
        ("studies_here.py:bad", ValueError, "'studies_here.py' has no function 'bad'"),
        ("package_here:good", ValueError, "Write one into it: good"),
        ("studies_here:ANSWER", ValueError, "no function 'ANSWER'"),
        ("studies_here:number", ValueError, "returned a int.*Study"),
        ("studies_here.py:needy", ValueError, "needs rows, seed, and the command line calls it without arguments"),
    ],
)
def test_other_names_are_refused(name, kind, text):
    refuses(lambda: load(name), kind, text)


@pytest.mark.parametrize("name", ["studies_here", "studies_here.py", "package_here/inner.py"])
def test_what_the_study_raises_is_its_own_error(name):
    with pytest.raises(StudyFailed, match=f"{name}:broken") as failed:
        load(f"{name}:broken")
    assert isinstance(failed.value.__cause__, ModuleNotFoundError)


def test_a_dependency_with_the_first_letters_of_the_module_is_still_a_dependency(folder):
    (folder / "studies_here_of_a_test.py").write_text("import studies_here_of")
    with pytest.raises(StudyFailed):
        load("studies_here_of_a_test:good")


def test_what_to_write_instead_works():
    with pytest.raises(InvalidInput) as refused:
        load("studies_here.py:bad")
    assert isinstance(load(re.search(r"write (\S+), for", str(refused.value)).group(1)), Study)


def test_arguments_with_defaults_are_no_hindrance(folder):
    text = SOURCE.replace("def needy(rows, *, seed)", "def needy(rows=3, *, seed=0)")
    (folder / "studies_of_a_test.py").write_text(text)
    assert isinstance(load("studies_of_a_test.py:needy"), Study)


def test_a_file_imports_its_neighbours_and_what_lies_in_the_working_directory(folder):
    (folder / "package_here" / "neighbour_of_a_test.py").write_text("from studies_here import good")
    (folder / "package_here" / "outer_of_a_test.py").write_text("from neighbour_of_a_test import good")
    assert isinstance(load("package_here/outer_of_a_test.py:good"), Study)


@pytest.mark.parametrize("taken", ["random", "tabnanny", "torch", "__main__"])
def test_a_file_may_be_called_as_another_module_and_everybody_else_finds_the_other(folder, monkeypatch, taken):
    other = sys.modules.get(taken)
    if taken == "tabnanny":
        monkeypatch.delitem(sys.modules, taken, raising=False)  # not imported so far, as many are
    (folder / "package_here" / f"{taken}.py").write_text(f"import {taken}\n\nOTHER = {taken}\n{SOURCE}")
    study = load(f"package_here/{taken}.py:good")
    module = sys.modules[study.describe.__module__]
    assert module.__name__ == f"study_{taken}"
    assert module.OTHER is sys.modules[taken]
    assert Path(getattr(sys.modules[taken], "__file__", "")) != folder / "package_here" / f"{taken}.py"
    assert taken == "tabnanny" or sys.modules[taken] is other


def test_a_module_that_hides_the_file_is_named_with_the_way_out(folder):
    (folder / "random.py").write_text(SOURCE)
    with pytest.raises(InvalidInput, match="Another module of this name") as refused:
        load("random:good")
    assert isinstance(load(re.search(r"write (\S+)\.$", str(refused.value)).group(1)), Study)


@pytest.mark.parametrize("stem", ["kept_of_a_test", "kept-of.a_of_a_test"])
def test_classes_of_a_file_can_be_dataclasses_and_pickled(folder, stem):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass, field, KW_ONLY\n" + SOURCE
    text += "\n\n@dataclass\nclass Pair:\n    left: int\n    _: KW_ONLY\n    right: int = field(default=3)\n"
    (folder / f"{stem}.py").write_text(text)
    study = load(f"./{stem}.py:good")
    pair = sys.modules[study.describe.__module__].Pair(1)
    again = pickle.loads(pickle.dumps(pair))
    assert (again.left, again.right) == (1, 3)
    assert type(again) is type(pair)


def test_a_pickle_is_read_by_whoever_imports_the_file(folder):
    text = f"{SOURCE}\n\nclass Pair:\n    left = 1\n"
    (folder / "package_here" / "read_of_a_test.py").write_text(text)
    load("package_here/read_of_a_test.py:good")
    pickled = pickle.dumps(sys.modules["read_of_a_test"].Pair())
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).left)"
    path = os.pathsep.join(["package_here", *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickled,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    assert done.stdout == b"1\n"


def test_what_a_study_prints_is_no_result(folder, capsys):
    text = f"print('imported')\n{SOURCE}".replace("def good():\n", "def good():\n    print('called')\n")
    (folder / "loud_of_a_test.py").write_text(text)
    load("loud_of_a_test.py:good")
    assert capsys.readouterr() == ("", "imported\ncalled\n")
