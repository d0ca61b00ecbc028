"""Imports point up the list of ARCHITECTURE.md only; a few libraries have one door each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "upweight"
LIST = re.search(r"src/upweight/\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.S).group(1)
ROOMS = re.findall(r"(?:^|\s\s)(\w+)(?:\.py|/)(?=\s)", LIST, re.M)
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")


def room(path: Path) -> str:
    inside = path.relative_to(SOURCE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> list[str]:
    """Modules imported when the file is: not those inside TYPE_CHECKING, nor inside functions."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_every_file_is_in_the_list_and_nothing_else_is():
    assert {room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_up(path):
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "upweight" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room(path)), f"{path.name} imports {module}"


@pytest.mark.parametrize(
    ("library", "door"),
    [
        ("torch.func", "transforms.py"),
        ("safetensors", "store.py"),
        ("torch.autograd", "calculus.py"),
        ("tyro", "console.py"),
    ],
)
def test_a_library_has_one_door(library, door):
    users = {
        path.name for path in FILES if any(name == library or name.startswith(library + ".") for name in imports(path))
    }
    called = {path.name for path in FILES if f"{library}." in path.read_text() and library.startswith("torch.")}
    assert users | called <= {door, "defaults.py"} if library == "torch.autograd" else users == {door}


def test_no_pickle_no_exec_no_bare_except():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"\bimport pickle|\bpickle\.|(?<!\.)\bexec\(|(?<!\.)\beval\(|except:", text), path


def test_nothing_asserts_for_users():
    """An assert may state what holds by construction, never check an argument."""
    asserts = [
        (path.name, ast.unparse(node.test))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert all("is not None" in text for _, text in asserts), asserts
