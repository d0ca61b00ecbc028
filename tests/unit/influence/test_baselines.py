"""Baselines against dense arithmetic on gradients that autograd computed row by row, and their place beside scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

import upweight as uw
from cases import make
from oracles import dense_hessian, gradient
from small import N, X, Y, Z, classifier, net, pairs, refuses, regressor, row, seeded
from upweight import baselines

EVERY = [getattr(baselines, name) for name in baselines.__all__ if name != "bm25"]  # which needs tokens
NAMES = ("logistic", "softmax", "mlp", "cnn", "sklearn_logistic")


def gradients(case, X, y):
    return torch.stack([gradient(lambda t, x=x, y=y: case.problem.loss(t, x, y), case.theta) for x, y in zip(X, y)])  # noqa: B905


def close(ours, truth, tolerance=1e-9):
    truth = np.asarray(truth)
    assert np.abs(ours - truth).max() <= tolerance * np.abs(truth).max()


def inputs(case):
    return case.Xq.numpy(), case.yq.numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_dot_and_cosine(name, weighted):
    case = make(name, weighted=weighted)
    influence = case.influence()
    G, Gq = gradients(case, case.X, case.y), gradients(case, case.Xq, case.yq)
    close(baselines.gradient_dot(influence, *inputs(case)).values, Gq @ (G * case.problem.weights[:, None]).T)
    cosines = Gq @ G.T / Gq.norm(dim=1)[:, None] / G.norm(dim=1)
    close(baselines.gradient_cosine(influence, *inputs(case)).values, cosines)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folded", [False, True])
def test_relative_influence_in_both_norms(name, folded):
    case = make(name, folded=folded, weighted=True)
    influence = case.influence()
    G, Gq = gradients(case, case.X, case.y), gradients(case, case.Xq, case.yq)
    if folded:
        G = G + gradient(case.problem.penalty, case.theta) * case.n / case.problem.weights.sum()
    inverse = torch.linalg.inv(dense_hessian(case.problem, case.theta))
    influences = Gq @ inverse @ G.T
    lengths, sizes = (inverse @ G.T).norm(dim=0), ((G @ inverse) * G).sum(1).sqrt()
    close(baselines.relative_influence(influence, *inputs(case)).values, influences / lengths, 1e-7)
    close(baselines.loss_relative_influence(influence, *inputs(case)).values, influences / sizes, 1e-7)


def test_relative_influence_without_a_factorisation():
    case = make("mlp")
    exact, iterated = case.influence(), case.influence(solver=uw.solvers.CG(rtol=1e-10))
    for baseline in (baselines.relative_influence, baselines.loss_relative_influence):
        close(baseline(iterated, *inputs(case)).values, baseline(exact, *inputs(case)).values, 1e-7)
    found = baselines.relative_influence(iterated, *inputs(case))
    assert found.certificate.residual.max() <= 1e-10
    assert found.certificate.converged


def test_rows_that_move_nothing_have_no_relative_influence():
    influence = classifier(sample_weight=(np.arange(N) != 3).astype(float))
    for baseline in (baselines.relative_influence, baselines.loss_relative_influence):
        values = baseline(influence, X[:2], Y[:2]).values
        assert (values[:, 3] == 0).all()
        assert np.isfinite(values).all()
        assert (values[:, 4] != 0).all()


def test_training_loss_is_that_of_the_rows():
    influence = regressor()
    with torch.no_grad():
        losses = ((net(1)(torch.tensor(X)) - torch.tensor(Z[:, None])) ** 2)[:, 0]
    scores = baselines.training_loss(influence, X[:3], Z[:3, None])
    close(scores.values, -np.tile(losses, (3, 1)))


def neighbours(F, Fq, labels, labels_q):
    """The same by plain loops."""
    values = np.empty((len(Fq), len(F)))
    for q in range(len(Fq)):
        squares = ((F - Fq[q]) ** 2).sum(1)
        same = np.where(labels == labels_q[q], 1.0, -1.0) if labels is not None else 1.0
        values[q] = same / (1 + squares / squares.mean())
    return values


def test_neighbours_in_the_inputs():
    scores = baselines.nearest_neighbours(classifier(), X[:4] + 0.2, Y[:4])
    close(scores.values, neighbours(X, X[:4] + 0.2, Y, Y[:4]))
    own = baselines.nearest_neighbours(classifier(), X[:4], Y[:4])
    assert own.helpful(1).rows[:, 0].tolist() == [0, 1, 2, 3]
    assert own.helpful(1).values[:, 0] == pytest.approx(1)
    flipped = baselines.nearest_neighbours(classifier(), X[:4], 1 - Y[:4])
    assert flipped.harmful(1).rows[:, 0].tolist() == [0, 1, 2, 3]


def test_neighbours_in_the_layer_before_the_last():
    model = net()
    scores = baselines.nearest_neighbours(classifier(model), X[:4], Y[:4], embed=model[:-1])
    with torch.no_grad():
        F = model[:-1](torch.tensor(X)).numpy()
    close(scores.values, neighbours(F, F[:4], Y, Y[:4]))
    assert "embeddings" in scores.counterfactual


def test_neighbours_without_labels_all_help():
    scores = baselines.nearest_neighbours(regressor(), X[:4], Z[:4, None])
    close(scores.values, neighbours(X, X[:4], None, None))
    dataset = uw.explain(net(), pairs(), loss=torch.nn.functional.cross_entropy, penalty=0.1)
    close(baselines.nearest_neighbours(dataset, X[:4], Y[:4]).values, neighbours(X, X[:4], Y, Y[:4]))


def test_sparse_inputs_and_labels_of_several_entries():
    import scipy.sparse
    from sklearn.linear_model import LogisticRegression

    sparse = scipy.sparse.csr_matrix(X)
    model = LogisticRegression(tol=1e-10, max_iter=5000).fit(sparse, Y)
    scores = baselines.nearest_neighbours(uw.explain(model, sparse, Y), sparse[:4], Y[:4])
    close(scores.values, neighbours(X, X[:4], Y, Y[:4]))
    two = np.stack([Y, np.roll(Y, 1)], 1).astype(float)
    both = uw.explain(net(2), X, two, loss=mse_loss, penalty=0.1)
    labels = two[:, 0] * 2 + two[:, 1]
    close(baselines.nearest_neighbours(both, X[:4], two[:4]).values, neighbours(X, X[:4], labels, labels[:4]))


def test_random_numbers_follow_their_seed():
    influence = classifier()
    one, again = (baselines.random(influence, X[:4], Y[:4], seed=3).values for _ in range(2))
    other = baselines.random(influence, X[:4], Y[:4]).values
    assert np.array_equal(one, again)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.3
    assert 0.8 < one.std() < 1.2


@pytest.mark.parametrize("baseline", EVERY, ids=lambda baseline: baseline.__name__)
def test_every_baseline_ranks_but_predicts_nothing(baseline, tmp_path):
    influence = classifier()
    scores = baseline(influence, X[:3], Y[:3])
    assert scores.values.shape == (3, N)
    assert scores.counterfactual.startswith("none: ")
    assert scores.query_values == pytest.approx(influence.on_loss(X[:3], Y[:3]).query_values)
    assert scores.helpful(2).rows.shape == (3, 2)
    assert isinstance(refuses(lambda: scores.derivative, ValueError, "no derivative"), uw.errors.Undefined)
    outcomes = uw.Outcomes(np.zeros((3, 2)), np.zeros(3), np.array([0, 1]))
    refuses(lambda: uw.agreement(scores, outcomes), ValueError, "Compare like with like")
    subsets = uw.random_subsets(N, 4, fraction=0.5, seed=0)
    trained = np.random.default_rng(0).normal(size=(3, 4, 1))
    assert -1 <= uw.lds(scores, uw.SubsetOutcomes(trained, subsets)).value <= 1
    scores.save(tmp_path / "baseline.safetensors")
    assert repr(uw.Scores.load(tmp_path / "baseline.safetensors")) == repr(scores)


@pytest.mark.parametrize("baseline", EVERY, ids=lambda baseline: baseline.__name__)
def test_batches_and_blocks_of_queries_change_nothing(baseline, monkeypatch):
    whole = baseline(classifier(), X[:5], Y[:5]).values
    monkeypatch.setattr(baselines, "_BLOCK_NUMBERS", 2 * classifier().objective.size)
    small = baseline(classifier(batch_size=7), X[:5], Y[:5]).values
    assert small == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_baselines_that_need_no_curvature_do_not_bind_it():
    class Refusing:
        def bind(self, sweep):
            raise AssertionError("bound")

    influence = classifier(curvature=Refusing())
    for name in ("gradient_dot", "gradient_cosine", "training_loss", "nearest_neighbours", "random"):
        scores = getattr(baselines, name)(influence, X[:2], Y[:2])
        assert "no linear system" in repr(scores)


def test_gradients_are_never_all_in_memory(monkeypatch):
    """The largest batch of gradients that is formed is that of the sweep, not n."""
    from upweight.model import layers

    sizes = []
    honest = layers.gradients

    def watched(objective, batch):
        found = honest(objective, batch)
        sizes.append(len(found))
        return found

    influence = classifier(batch_size=8)
    monkeypatch.setattr(layers, "gradients", watched)
    for baseline in EVERY:
        baseline(influence, X[:3], Y[:3])
    assert 0 < max(sizes) <= 8


@pytest.mark.parametrize(
    ("deed", "kind", "text"),
    [
        row(
            "a failing embedding",
            ValueError,
            "embed failed on a batch of 2 inputs.*model\\[:-1\\]",
            lambda: _embed(seeded(lambda: torch.nn.Linear(7, 2))),
        ),
        row("a scalar", ValueError, "embed returned \\(\\) for a batch of 2", lambda: _embed(lambda x: x.sum())),
        row("one line too few", ValueError, "embed returned \\(1, 3\\)", lambda: _embed(lambda x: x[:1])),
        row("an array", ValueError, "embed returned ndarray", lambda: _embed(lambda x: x.numpy())),
        row("a bad seed", ValueError, "seed=-1", lambda: baselines.random(classifier(), X[:2], Y[:2], seed=-1)),
        row("no targets", ValueError, "have no y", lambda: baselines.gradient_dot(classifier(), X[:2])),
    ],
)
def test_refusals(deed, kind, text):
    refuses(deed, kind, text)


def _embed(function):
    return baselines.nearest_neighbours(classifier(), X[:2], Y[:2], embed=function)


def texts():
    """Rows of tokens, 0 behind their ends, with a model of next tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 7, 12)
    rows = [draw.integers(1, 9, length).tolist() for length in lengths]
    model = torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.Linear(3, 9)).double()
    return model, rows


def test_bm25_is_okapis_formula():
    model, rows = texts()
    padded = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask = (padded > 0).long()

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids).transpose(1, 2) + 0 * attention_mask[:, None]

    def loss(output, y):
        return torch.nn.functional.cross_entropy(output, y)

    data = [{"input_ids": x, "attention_mask": m, "labels": x} for x, m in zip(padded, mask, strict=True)]
    influence = uw.explain(Named(), data, loss=loss, damping=0.1)
    question = [{"input_ids": [3, 5, 3, 8], "attention_mask": [1, 1, 1, 0], "labels": [3, 5, 3, 8]}]
    found = baselines.bm25(influence, question, k1=1.5, b=0.6).values[0]
    mean = np.mean([len(row) for row in rows])
    for line, value in zip(rows, found, strict=True):
        expected = 0.0
        for token in (3, 5, 3):
            holding = sum(token in other for other in rows)
            f = line.count(token)
            idf = np.log(1 + (len(rows) - holding + 0.5) / (holding + 0.5))
            expected += idf * f * 2.5 / (f + 1.5 * (1 - 0.6 + 0.6 * len(line) / mean))
        assert value == pytest.approx(expected, rel=1e-12)
    assert found.max() > 0
