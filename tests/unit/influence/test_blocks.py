"""More queries than fit at once: in blocks, in a store, or reduced to their extremes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.influence import removal as room


@pytest.fixture(scope="module")
def fitted():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(80, 5))
    y = (X[:, 0] + draw.normal(size=80) > 0).astype(int)
    model = LogisticRegression(tol=1e-10).fit(X[:60], y[:60])
    return uw.explain(model, X[:60], y[:60]), X[60:], y[60:]


def test_blocks_are_the_whole_in_pieces(fitted):
    inf, Xq, yq = fitted
    whole = inf.on_loss(Xq, yq)
    blocks = list(inf.on_loss_in_blocks(Xq, yq, size=7))
    assert [len(block.values) for block in blocks] == [7, 7, 6]
    joined = uw.Scores.joined(blocks)
    np.testing.assert_allclose(joined.values, whole.values, rtol=1e-12)
    np.testing.assert_allclose(joined.query_values, whole.query_values, rtol=1e-12)
    assert joined.certificate.residual.shape == (20,)


def test_extremes_are_those_of_the_whole(fitted):
    inf, Xq, yq = fitted
    whole, kept = inf.on_loss(Xq, yq), uw.extremes(inf.on_loss_in_blocks(Xq, yq, size=6), k=4)
    np.testing.assert_array_equal(kept.helpful.rows, whole.helpful(4).rows)
    np.testing.assert_allclose(kept.harmful.values, whole.harmful(4).values, rtol=1e-12)
    with pytest.raises(uw.errors.InvalidInput, match="no blocks"):
        uw.extremes([])


def test_blocks_resume_in_a_store_and_refuse_other_work(fitted, tmp_path):
    inf, Xq, yq = fitted
    first = next(inf.on_loss_in_blocks(Xq, yq, size=10, store=tmp_path / "run"))
    again = list(inf.on_loss_in_blocks(Xq, yq, size=10, store=tmp_path / "run"))
    np.testing.assert_array_equal(again[0].values, first.values)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["queries-00000000", "queries-00000010"]
    with pytest.raises(uw.errors.StoreMismatch, match="other work"):
        next(inf.on_loss_in_blocks(Xq + 1, yq, size=10, store=tmp_path / "run"))
    with pytest.raises(uw.errors.InvalidInput, match="size"):
        inf.on_loss_in_blocks(Xq, yq, size=0)


@pytest.mark.parametrize("kind", [np.asarray, scipy.sparse.csr_matrix])
def test_queries_that_do_not_fit_in_memory_are_split_without_a_word_and_change_nothing(fitted, monkeypatch, kind):
    inf, Xq, yq = fitted
    whole = inf.on_loss(kind(Xq), yq)
    monkeypatch.setattr(room, "_BLOCK_BYTES", 8 * 3 * inf.objective.size)
    np.testing.assert_allclose(inf.on_loss(kind(Xq), yq).values, whole.values, rtol=1e-12)
