"""The figures' scripts lie beside the source; a source distribution has none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if (ROOT / "paper").is_dir() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _root_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
