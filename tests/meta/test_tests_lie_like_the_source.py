"""Tests of a package lie in a folder of its name, and a file is named after what it proves."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {path.parent.name for path in (ROOT / "src" / "upweight").glob("*/__init__.py")}


@pytest.mark.parametrize("kind", ["unit", "contracts"])
def test_folders_are_packages(kind):
    inside = {path.name for path in (ROOT / "tests" / kind).iterdir() if path.name != "__pycache__"}
    assert inside <= PACKAGES


def test_no_file_is_named_after_a_review():
    assert not [path.name for path in (ROOT / "tests").rglob("test_*.py") if "review" in path.name]
