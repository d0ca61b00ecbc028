"""How many public names have an example that is run; the number may only grow."""

from __future__ import annotations

import usage

WITHOUT = 60  # of some 250 functions and classes; `usage.without_example()` lists them


def test_no_more_names_are_without_an_example():
    missing = usage.without_example()
    assert len(missing) <= WITHOUT, missing
    assert len(missing) > WITHOUT - 15, f"Lower WITHOUT to {len(missing)}."


def test_what_is_used_is_found():
    used = {name: [str(path) for path in paths] for name, paths in usage.used_in().items()}
    assert "docs/index.md" in used["upweight.explain"]
    assert "docs/tutorials/wrong-labels.ipynb" in used["upweight.apps.repair"]
    assert "docs/recipes/by-hand.md" in used["upweight.calculus.hvp"]
    assert "upweight.Influence.on_loss" in usage.comes_from()["upweight.Scores"]
