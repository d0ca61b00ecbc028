"""The three answers of the site's front page: ten lines each, alone, and true when the rows are really left out."""

from __future__ import annotations

import ast
import re
from functools import cache

import numpy as np
import pytest
import torch
from generated import ROOT

import upweight as uw

BLOCKS = dict(re.findall(r"## A (.+?)\n\n```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.S))


@cache
def answer(name: str) -> tuple[uw.Influence, uw.Scores, dict]:
    """A block as it stands, in a namespace of its own, and the influence and scores that its last line prints."""
    tree = ast.parse(BLOCKS[name])
    printed = tree.body.pop().value.args[0]
    namespace: dict = {}
    torch.manual_seed(0)
    exec(compile(tree, name, "exec"), namespace)
    namespace["influence"] = eval(ast.unparse(printed.func.value), namespace)
    asked = ", ".join(ast.unparse(argument) for argument in printed.args)
    namespace["queries"] = eval(f"({asked},)", namespace)
    return namespace["influence"], namespace["influence"].on_loss(*namespace["queries"]), namespace


def test_there_are_three_of_at_most_ten_lines_that_print():
    assert set(BLOCKS) == {"scikit-learn model", "torch module", "language model"}
    for block in BLOCKS.values():
        assert len([line for line in block.splitlines() if line.strip()]) <= 10
        assert block.strip().splitlines()[-1].startswith("print(")


def test_the_estimator_is_told_what_refits_say():
    influence, scores, namespace = answer("scikit-learn model")
    rows = np.argsort(-np.abs(scores.values).max(0))[:10]
    assert uw.agreement(scores, uw.leave_one_out(influence, namespace["queries"], rows)).pearson > 0.9
    assert np.allclose(scores.query_values, -np.log(probabilities(namespace)))


def probabilities(namespace: dict) -> np.ndarray:
    """What scikit-learn itself gives the ten patients' own classes."""
    X, y = namespace["queries"]
    return namespace["model"].predict_proba(X)[np.arange(len(y)), y]


def test_the_module_is_told_what_training_without_rows_says():
    influence, scores, namespace = answer("torch module")
    rows = np.argsort(-np.abs(scores.values).max(0))[:8]
    outcomes = uw.leave_one_out(influence, namespace["queries"], rows, uw.LBFGS())
    assert uw.agreement(scores, outcomes).pearson > 0.8


def test_the_language_model_names_the_sentence_itself():
    pytest.importorskip("transformers")
    _, scores, _ = answer("language model")
    assert scores.helpful(1).ids[0][0] == "clara lives in lima"
    assert scores.values[0, 2] > 1.3 * np.abs(np.delete(scores.values[0], 2)).max()
