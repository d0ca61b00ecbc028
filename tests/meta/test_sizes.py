"""A file is one idea, and a function fits on a screen."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

SOURCE = Path(__file__).parents[2] / "src" / "upweight"
FILES = sorted(SOURCE.rglob("*.py"))


def test_files_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"}
    assert max(lengths.values()) <= 560, max(lengths, key=lengths.__getitem__)
    assert median(lengths.values()) <= 200


def test_functions_fit_on_a_screen():
    """At most 60 lines of code; a docstring does not count."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                assert node.end_lineno - first.lineno < 60, f"{path.name}: {node.name}"
