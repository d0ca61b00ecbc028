"""Where public names are used in what is run: doctests, the blocks of pages, notebooks, examples.

A result is used where a public function or method that returns it, by its annotation, is used.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import reference

import upweight as uw

ROOT = Path(__file__).parents[2]


@cache
def used_in() -> dict[str, list[Path]]:
    """Every public name to the pages, notebooks and examples in whose code it stands, the shortest first."""
    found: dict[str, list[Path]] = {name: [] for name in reference.entries()}
    for path, code in sorted(_sources(), key=lambda one: len(one[1])):
        for name in _names(code):
            if path not in found[name]:
                found[name].append(path)
    return found


@cache
def comes_from() -> dict[str, list[str]]:
    """Every public class to the public functions and methods of Influence that return it."""
    found: dict[str, list[str]] = {}
    for name, value in _callables():
        try:
            back = str(inspect.signature(value).return_annotation)
        except (TypeError, ValueError):
            continue
        for word in set(re.findall(r"[A-Z]\w+", back)):
            whole = reference.targets().get(word)
            if whole in reference.entries() and whole != name:
                found.setdefault(whole, []).append(name)
    return found


def without_example() -> list[str]:
    """The public names that are neither in a doctest nor in anything else that is run, nor returned by one that is."""
    shown = {name for name, entry in reference.entries().items() if ">>>" in _documentation(entry)}
    shown |= {name for name, places in used_in().items() if places}
    shown |= set(_methods_in_use())
    shown |= {name for name, makers in comes_from().items() if set(makers) & shown}
    kinds = {"module", "exception", "data"}
    return sorted(n for n, entry in reference.entries().items() if entry.kind not in kinds and n not in shown)


def _documentation(entry: reference.Entry) -> str:
    """What its page shows: the docstring, those of its members, and the example that a Loss gets there."""
    if isinstance(entry.value, uw.losses.Loss):
        return ">>>"
    texts = [inspect.getdoc(entry.value) or ""]
    if inspect.isclass(entry.value):
        texts += [inspect.getdoc(member) or "" for member in reference.members(entry.value).values()]
    return "\n".join(texts)


def _sources() -> Iterator[tuple[Path, str]]:
    """Code that tests or the site's build run, with the place where it stands."""
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md")]:
        if page.is_relative_to(ROOT / reference.FOLDER):
            continue
        if blocks := re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            yield page.relative_to(ROOT), "\n".join(blocks)
    for notebook in ROOT.glob("docs/tutorials/*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield notebook.relative_to(ROOT), "\n".join(code)
    for example in ROOT.glob("examples/*.py"):
        yield example.relative_to(ROOT), example.read_text()


def _names(code: str) -> set[str]:
    """The public names in a piece of code, by what its imports bind."""
    tree, bound, found = ast.parse(code), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {one.asname or one.name: one.name for one in node.names if one.name.split(".")[0] == "upweight"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "upweight":
            bound |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, *rest = ast.unparse(node).split(".")
            if first in bound:
                whole = ".".join([bound[first], *rest])
                found.add(reference._first(whole) if whole in reference.entries() else whole)
    return found & reference.entries().keys()


def _callables() -> Iterator[tuple[str, object]]:
    for name, entry in reference.entries().items():
        if entry.kind == "function":
            yield name, entry.value
        elif inspect.isclass(entry.value):
            for member, value in reference.members(entry.value).items():
                inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                yield f"{name}.{member}", inner


def _methods_in_use() -> Iterator[str]:
    """Methods whose name no other public class has, and that are called somewhere in what is run."""
    code = "\n".join(text for _, text in _sources())
    code += "\n".join(inspect.getdoc(value) or "" for _, value in _callables())
    owners: dict[str, list[str]] = {}
    for name, entry in reference.entries().items():
        if inspect.isclass(entry.value):
            for member in reference.members(entry.value):
                owners.setdefault(member, []).append(f"{name}.{member}")
    called = set(re.findall(r"\.(\w+)\b", code))
    return (names[0] for member, names in owners.items() if member in called and len(names) == 1)
