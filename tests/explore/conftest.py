"""Runs for the explorer: one to be read, copies to be changed, and a client of the first."""

from __future__ import annotations

import shutil

import pytest

from explored import browser, write
from upweight.explore.explorer import Explorer


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run folder with its index; to be read only."""
    path = tmp_path_factory.mktemp("explored") / "digits"
    write(path)
    Explorer.open(path)
    return path


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(made, tmp_path / "digits")


@pytest.fixture(scope="session")
def client(made):
    """A client of the run that is read only."""
    return browser(made)
