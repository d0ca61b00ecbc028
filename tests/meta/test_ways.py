"""The pictures in ARCHITECTURE.md name files and functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "upweight"
STEPS = re.findall(r"^ +([\w/]+\.py): (\w+)", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
PLACES = re.findall(r"`((?:[a-z_]+/)+\w+\.(?:py|pyi))`", (ROOT / "docs/where-to-put.md").read_text())


def test_there_are_three_ways():
    assert len(STEPS) >= 18


@pytest.mark.parametrize(("file", "name"), STEPS, ids=lambda value: str(value).replace("/", "."))
def test_a_step_is_there(file, name):
    tree = ast.parse((SOURCE / file).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined, f"{file} defines no {name}"


@pytest.mark.parametrize("place", sorted(set(PLACES) - {"apps/NAME.py"}))
def test_a_place_is_there(place):
    if "NAME" in place:
        assert (SOURCE / place).parent.is_dir()
    else:
        assert any((base / place).is_file() for base in (SOURCE, ROOT)), place
