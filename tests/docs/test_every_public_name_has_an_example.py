"""Every public function and class has an example that is run."""

from __future__ import annotations

import usage


def test_no_name_is_without_an_example():
    assert not usage.without_example()


def test_what_is_used_is_found():
    used = {name: [str(path) for path in paths] for name, paths in usage.used_in().items()}
    assert "docs/index.md" in used["upweight.explain"]
    assert "docs/tutorials/wrong-labels.ipynb" in used["upweight.apps.repair"]
    assert "docs/recipes/by-hand.md" in used["upweight.calculus.hvp"]
    assert "upweight.Influence.on_loss" in usage.comes_from()["upweight.Scores"]
