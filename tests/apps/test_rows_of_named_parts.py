"""Texts by the apps: rows and sources as for numbers, and no features, with the reason.

The oracles are the scores themselves, and the rows that were written down.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import upweight as uw

transformers = pytest.importorskip("transformers")

DRAW = np.random.default_rng(0)
LABELS = [k % 3 for k in range(8)]
SOURCES = ["web", "book", "book", "web", "mail", "mail", "web", "book"]


def built(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "causal":
            sizes = {"vocab_size": 30, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 1}
        settings = transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=16, num_labels=3)
        return transformers.BertForSequenceClassification(settings).eval()


def asked(kind):
    rows = [{"input_ids": DRAW.integers(5, 30, 4 + k % 3).tolist(), "id": f"text {k}"} for k in range(8)]
    if kind == "classifier":
        rows = [{**row, "label": label} for row, label in zip(rows, LABELS, strict=True)]
    return uw.explain(built(kind), rows, damping=1.0), rows[:2]


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_mismatch_names_rows_and_sources_and_says_why_no_features(kind):
    influence, queries = asked(kind)
    found = uw.apps.mismatch(influence, queries, groups=SOURCES, k=3)
    values = influence.on_loss(queries).values.mean(0)
    order = np.argsort(values)
    assert found.harmful.rows.tolist() == [row for row in order[:3] if values[row] < 0]
    assert found.helpful.rows.tolist() == [row for row in order[::-1][:3] if values[row] > 0]
    for name, value in zip(found.groups.names, found.groups.first_order, strict=True):
        own = [row for row, source in enumerate(SOURCES) if source == name]
        assert value == pytest.approx(values[own].sum(), rel=1e-6)
    assert found.features is None
    assert "rows are made of input_ids, attention_mask" in found.no_features
    assert f"no features: {found.no_features}" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["no_features"] == found.no_features


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_understand_names_rows_and_says_why_no_distances(kind):
    influence, queries = asked(kind)
    found = uw.apps.understand(influence, queries, k=2)
    values = influence.on_loss(queries).values
    assert found.helpful(1).rows.tolist() == np.argsort(-values[1])[:2].tolist()
    assert found.half[0] == next(
        k for k in range(9) if np.sort(abs(values[0]))[::-1][:k].sum() >= abs(values[0]).sum() / 2
    )
    assert np.isnan(found.distances).all()
    assert np.isnan(found.locality).all()
    assert "rows are made of input_ids, attention_mask" in found.no_distances
    assert found.no_distances in str(found)
    assert "nan" not in str(found)
    listed = found.to_dict()["queries"][0]["helpful"][0]
    assert (listed["distance"], listed["id"]) == (None, f"text {int(np.argmax(values[0]))}")
    if kind == "causal":
        assert found.predicted is None
        assert found.labels is None
        return
    assert found.labels.tolist() == LABELS
    said = [int(built(kind)(torch.tensor([row["input_ids"]])).logits.argmax()) for row in queries]
    assert found.predicted.tolist() == said


def test_embeddings_of_texts_give_distances():
    influence, queries = asked("causal")
    X = DRAW.normal(size=(8, 3))
    found = uw.apps.understand(influence, queries, X=X, Xq=X[:2] + 1)
    np.testing.assert_allclose(found.distances, np.linalg.norm(X[:2, None] + 1 - X[None], axis=2))
    assert not found.no_distances
    assert np.isfinite(found.locality).all()
