"""What a folder keeps of trainings: back to the same bits, refused for another question, and gone on with."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch.nn.functional import cross_entropy

import upweight as uw
from small import XQ, YQ, N, X, Y, logistic, net
from upweight.errors import StoreMismatch, TheoryWarning
from upweight.training.counterfactuals import factors_of, found
from upweight.training.found import Found, _joined, _parts


def numbered():
    return uw.explain(LogisticRegression(tol=1e-10, max_iter=5000).fit(X, Y), X, Y)


def machine():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TheoryWarning)
        return uw.explain(SVC(kernel="linear", C=0.5).fit(X, Y), X, Y)


def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double().eval()
    return uw.explain(model, torch.from_numpy(X), torch.from_numpy(Y), loss=cross_entropy, penalty=0.1)


def trained_network(weights, seed=0):
    """A module whose running statistics training has moved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (
            cross_entropy(model(torch.from_numpy(X)), torch.from_numpy(Y), reduction="none") @ torch.from_numpy(weights)
        ).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "parts",
    [[None, 2.5, np.zeros((0, 3)), np.arange(6.0).reshape(2, 3)], [np.array([[np.pi]])], [None], [1.0, 1 / 3]],
    ids=["mixed", "matrix", "nothing", "numbers"],
)
def test_parts_are_joined_and_parted(parts):
    for before, after in zip(parts, _parts(_joined(parts), len(parts)), strict=True):
        assert (before is None) == (after is None)
        assert isinstance(after, float) == isinstance(before, float)
        assert before is None or (np.shape(before) == np.shape(after) and np.array_equal(before, after))


@pytest.mark.parametrize(
    ("influence", "retrain"),
    [(numbered, None), (machine, None), (network, trained_network)],
    ids=["logistic", "a penalty that moves", "running statistics"],
)
def test_a_training_is_kept_to_the_last_bit(influence, retrain, tmp_path):
    influence = influence()
    result = found(influence, factors_of(influence, [3, 7]), retrain, 0)
    again = Found.read(result.numbers(influence.objective), influence.objective)
    assert torch.equal(again.theta, result.theta)
    assert again.beside.keys() == result.beside.keys()
    for name, tensor in result.beside.items():
        assert again.beside[name].dtype == tensor.dtype
        assert torch.equal(again.beside[name], tensor)
    assert (again.penalty is None) == (result.penalty is None)
    direct = uw.retrained(influence, without=[3, 7], retrain=retrain)
    for _ in range(2):  # trained and kept, then read
        course = uw.Course(influence, tmp_path / "run", {"work": "one"}, retrain)
        kept = course.retrained(influence, without=[3, 7], retrain=retrain)
        assert torch.equal(kept.objective.theta, direct.objective.theta)
        before, after = (model.on_loss(XQ, YQ).values for model in (direct, kept))
        assert np.array_equal(before, after)
        assert np.array_equal(direct.penalty_share, kept.penalty_share)


def test_running_statistics_and_penalties_do_move():
    """Else the test above would keep nothing of them."""
    assert found(network(), np.ones(N), trained_network, 0).beside
    assert found(machine(), factors_of(machine(), [3]), None, 0).penalty is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": [1, 2]}, "rows: '2, "),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"on": (XQ + 1, YQ)}, "queries: "),
        ({"retrain": uw.LBFGS()}, "retrain: 'Newton.*there, 'LBFGS"),
        (
            {"measure": lambda params, example: (params["coef"] @ example[0])[0]},
            "measure: 'loss' there, '<lambda>' now",
        ),
        ({"influence": lambda: uw.explain(LogisticRegression(C=2.0).fit(X, Y), X, Y)}, "theta: "),
    ],
    ids=["rows", "seed", "queries", "retrainer", "measure", "model"],
)
def test_another_question_is_refused_with_the_differences(change, says, tmp_path):
    def ask(influence=lambda: uw.explain(LogisticRegression().fit(X, Y), X, Y), on=(XQ, YQ), rows=(0, 1), **settings):
        return uw.leave_one_out(influence(), on, list(rows), store=tmp_path / "run", **settings)

    ask()
    with pytest.raises(StoreMismatch, match=says):
        ask(**change)
    ask()


SEEDS = []


def by_chance(weights, seed):
    SEEDS.append(seed)
    return torch.randn(26, dtype=torch.float64)


def test_more_seeds_go_on(tmp_path):
    influence = uw.explain(net(), torch.from_numpy(X), torch.from_numpy(Y), loss=cross_entropy, penalty=0.1)
    on = torch.from_numpy(XQ), torch.from_numpy(YQ)
    whole = uw.leave_one_out(influence, on, [1, 2], by_chance, seeds=3)
    SEEDS.clear()
    uw.leave_one_out(influence, on, [1, 2], by_chance, seeds=2, store=tmp_path / "run")
    more = uw.leave_one_out(influence, on, [1, 2], by_chance, seeds=3, store=tmp_path / "run")
    assert SEEDS == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(more.by_seed, whole.by_seed)


def test_a_removal_curve_is_kept_whole(tmp_path):
    influence = logistic()
    queries = XQ, np.array(["no", "yes"])[YQ]
    scores, calls = influence.on_loss(*queries), []

    class Counting:
        def bind(self, influence):
            train = uw.Newton().bind(influence)
            return lambda weights, seed: (calls.append(weights), train(weights, seed))[1]

        def __repr__(self):
            return "Counting()"

    settings = {"counts": (2,), "retrain": Counting(), "seeds": 2}
    alone = uw.removal_curve(influence, scores, queries, **settings)
    assert len(calls) == 2 * (1 + 2 * len(XQ))
    for more in (len(calls), 0):
        before = len(calls)
        kept = uw.removal_curve(influence, scores, queries, **settings, store=tmp_path / "run")
        assert len(calls) - before == more
        for name in alone.changes:
            assert np.array_equal(kept.changes[name], alone.changes[name])
            assert np.array_equal(kept.flipped[name], alone.flipped[name])
        assert np.array_equal(kept.control, alone.control)


def test_models_trained_together_are_always_the_same_ones(tmp_path):
    """A missing one is trained again beside those that it was trained with; the others stay as they are."""
    asked = []

    class Together:
        together = 3

        def __call__(self, weights, seed=0):
            return self.many([weights], [seed])[0]

        def many(self, weights, seeds):
            asked.append((len(weights), tuple(seeds)))
            return [torch.full((26,), float(sum(w.sum() for w in weights))) for _ in weights]

    influence = uw.explain(net(), torch.from_numpy(X), torch.from_numpy(Y), loss=cross_entropy, penalty=0.1)
    on, masks = (torch.from_numpy(XQ), torch.from_numpy(YQ)), uw.random_subsets(N, 5, seed=1)
    whole = uw.subset_retraining(influence, on, masks, Together(), seeds=2, store=tmp_path / "run")
    assert asked == [(3, (0, 0, 0)), (2, (0, 0)), (3, (1, 1, 1)), (2, (1, 1))]
    (tmp_path / "run" / "chunk-000006.safetensors").unlink()
    asked.clear()
    again = uw.subset_retraining(influence, on, masks, Together(), seeds=2, store=tmp_path / "run")
    assert asked == [(3, (1, 1, 1))]
    assert np.array_equal(again.values, whole.values)


def test_a_training_that_fails_is_tried_again(tmp_path):
    """Rows 0 … of a class of one row; the others are kept."""
    x, y = np.r_[X[:12], X[:1] + 3], np.r_[Y[:12], 2]
    influence = uw.explain(LogisticRegression(max_iter=1000, tol=1e-8).fit(x, y), x, y)
    for _ in range(2):
        with pytest.warns(TheoryWarning, match="Training without 1 of 2 rows"):
            left = uw.leave_one_out(influence, (XQ, YQ), [1, 12], store=tmp_path / "run")
        assert np.isnan(left.actual[:, 1]).all()
        assert np.isfinite(left.actual[:, 0]).all()
    assert sorted(file.name[6:12] for file in (tmp_path / "run").glob("chunk-*")) == ["000000", "000001"]
