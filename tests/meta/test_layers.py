"""Imports point up the list of ARCHITECTURE.md only; a few libraries have one door each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "upweight"
LIST = re.search(r"src/upweight/\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.S).group(1)
ROOMS = re.findall(r"^  (\w+)(?:\.py|/)(?=\s)", LIST, re.M)
EVERY = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
EVERY = {name.removesuffix(".__init__"): path for name, path in EVERY.items()}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
PUBLIC = {
    alias.name: f"upweight.{node.module}" if node.module else f"upweight.{alias.name}"
    for node in ast.parse((SOURCE / "__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


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


def arrows(path: Path) -> set[str]:
    """Files of ours that a file imports, anywhere in it and for whatever: also for types, also through `uw.name`."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "upweight":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(
                    whole if whole in EVERY else PUBLIC.get(alias.name) if node.module == "upweight" else node.module
                )
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in EVERY and alias.name != "upweight"}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uw":
            found.add(PUBLIC[node.attr])
    return {name for name in found if name and EVERY[name] != path}


def test_the_top_level_holds_packages_only():
    top = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert top - packages == {"__init__.py", "__init__.pyi", "errors.py", "py.typed"}
    assert len(packages) <= 13
    assert {*packages, "errors"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_between_packages_point_up(path):
    for name in arrows(path):
        assert ROOMS.index(room(EVERY[name])) <= ROOMS.index(room(path)), f"{path.name} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    """Files whose imports are all done are taken away until none is left; what cannot be taken is a circle."""
    waiting = {
        path: {EVERY[name] for name in arrows(path)} for path in EVERY.values() if path != SOURCE / "__init__.py"
    }
    while free := [path for path, needed in waiting.items() if not needed & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert not waiting, {str(path.relative_to(SOURCE)) for path in waiting}


def test_influence_is_named_by_its_users_only():
    above = ROOMS[ROOMS.index("influence") + 1 :]
    for path in FILES:
        if "upweight.influence.face" in arrows(path):
            assert room(path) in above, path


@pytest.mark.parametrize(
    ("library", "door"),
    [
        ("torch.func", "transforms.py"),
        ("safetensors", "files.py"),
        ("torch.autograd", "calculus.py"),
        ("tyro", "console.py"),
        ("torch.distributed", "ranks.py"),
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
