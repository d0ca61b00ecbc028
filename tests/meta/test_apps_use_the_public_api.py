"""If an app needs a private name, the API is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import upweight as uw

APPS = sorted((Path(__file__).parents[2] / "src" / "upweight" / "apps").glob("*.py"))
MODULES = ("upweight", "upweight.errors")


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.name)
def test_an_app_imports_public_modules_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("upweight"):
            assert node.module in MODULES or node.module.startswith("upweight.apps"), f"{path.name}: {node.module}"
            for alias in node.names:
                assert node.module != "upweight" or alias.name in uw.__all__, f"{path.name}: {alias.name}"
        elif isinstance(node, ast.Import):
            assert all(not a.name.startswith("upweight.") for a in node.names), path.name


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.name)
def test_an_app_uses_public_names_only(path):
    own = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            public = not node.attr.startswith("_") or node.attr.startswith("__")
            assert public or mine or node.attr in own, f"{path.name}: .{node.attr}"
            if isinstance(node.value, ast.Name) and node.value.id == "uw":
                assert node.attr in uw.__all__, f"{path.name}: uw.{node.attr}"
