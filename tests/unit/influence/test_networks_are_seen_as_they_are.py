"""What a network holds is seen: code, buffers, labels, chance, precision and state; none of it is written into."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from two_classes import data, n, network
from upweight import errors
from upweight.model.layers.pieces import Product
from upweight.runs import identity
from upweight.training.minibatch import SGD, Placed
from upweight.training.retrainers import LBFGS


def _scaled(factor):
    def train(weights, seed=0):
        return BASE * factor

    return train


def _with_default(weights, seed=0, factor=1.0):
    return BASE * factor


class _Trainer:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, weights, seed=0):
        return BASE * self.factor

    def train(self, weights, seed=0):
        return BASE * self.factor


BASE = torch.full((8,), 0.1, dtype=torch.float64)
RETRAINERS = {
    "closure": _scaled,
    "partial": lambda factor: functools.partial(_with_default, factor=factor),
    "object": _Trainer,
    "method": lambda factor: _Trainer(factor).train,
}


@pytest.mark.parametrize("kind", RETRAINERS)
def test_retrainers_that_differ_in_what_they_hold_do_not_share_a_store(kind, tmp_path):
    torch.manual_seed(0)
    X, y = torch.randn(24, 3, dtype=torch.float64), torch.arange(24) % 2
    influence = uw.explain(nn.Linear(3, 2).double(), X, y, loss=cross_entropy, damping=0.1)
    masks, on = uw.random_subsets(24, 3), (X[:2], y[:2])
    first = uw.subset_retraining(influence, on, masks, RETRAINERS[kind](1.0), store=tmp_path / "kept").values
    again = uw.subset_retraining(influence, on, masks, RETRAINERS[kind](1.0), store=tmp_path / "kept").values
    np.testing.assert_array_equal(first, again)
    with pytest.raises(errors.StoreMismatch, match="retrain"):
        uw.subset_retraining(influence, on, masks, RETRAINERS[kind](3.0), store=tmp_path / "kept")


def _activated(act):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(act(self.a(x)))

    return Net


@pytest.mark.parametrize("same", [True, False])
def test_factories_whose_forward_passes_differ_have_another_digest(same):
    one, other = _activated(torch.tanh), _activated(torch.tanh if same else torch.relu)
    assert (identity.digest(one) == identity.digest(other)) == same
    assert (identity.digest([one(), one]) == identity.digest([other(), other])) == same


def _one_of(words):
    def train(weights, *, seed=0, rate=0.1):
        return rate if "a" in words else seed

    return train


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_one_of({"a", "b"}), _one_of({"a", "c"})),
        (lambda w, *, rate=0.1: rate, lambda w, *, rate=0.2: rate),
        (functools.partial(_one_of, torch.float32), functools.partial(_one_of, torch.float64)),
        (functools.partial(_one_of, range(3)), functools.partial(_one_of, range(4))),
    ],
    ids=["sets", "keywords", "precisions", "ranges"],
)
def test_what_a_function_holds_is_told_whatever_it_is(one, other):
    assert identity.digest(one) != identity.digest(other)
    assert identity.digest(one) == identity.digest(one)


class _Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, 6))
        self.top = nn.Linear(6, 2)

    def forward(self, x):
        return self.top(torch.cos(x @ self.frequencies))


def test_a_factory_that_draws_other_buffers_is_refused_and_one_that_copies_them_trains_to_the_minimum():
    torch.manual_seed(0)
    X, y = torch.randn(24, 3, dtype=torch.float64), torch.arange(24) % 2
    model = _Random().double().eval()
    influence = uw.explain(model, X, y, loss=cross_entropy, penalty=0.1, damping=0.0)
    recipe = {"optimizer": SGD(lr=0.5), "batches": Placed(24), "epochs": 300}
    with pytest.raises(
        errors.InvalidInput, match=r"not trained \(frequencies\) is probably drawn anew.*load_state_dict"
    ):
        uw.StackedTraining(**recipe, factory=lambda: _Random().double()).bind(influence)

    def same():
        module = _Random().double()
        module.load_state_dict(model.state_dict())
        module.top.reset_parameters()
        return module

    trained = uw.StackedTraining(**recipe, factory=same).bind(influence)(np.ones(24), 0)
    minimum = LBFGS(rtol=1e-8).bind(influence)(np.ones(24))
    torch.testing.assert_close(trained.double(), minimum, rtol=1e-3, atol=1e-4)


class _Pairs(torch.utils.data.Dataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], self.y[row]


def test_a_label_of_a_dataset_that_changed_anywhere_is_other_work(tmp_path):
    torch.manual_seed(0)
    X, y = torch.randn(100, 3, dtype=torch.float64), torch.arange(100) % 2
    model, other = nn.Linear(3, 2).double(), y.clone()
    other[40] = 1 - other[40]
    on, masks = (X[:2], y[:2]), uw.random_subsets(100, 2)
    settings = {"loss": cross_entropy, "penalty": 0.1, "damping": 0.0}
    first, second = (uw.explain(model, _Pairs(X, labels), **settings) for labels in (y, other))
    assert first.examples.fingerprint() == second.examples.fingerprint()  # row 40 is not among those looked at
    uw.subset_retraining(first, on, masks, store=tmp_path / "kept")
    with pytest.raises(errors.StoreMismatch, match="targets"):
        uw.subset_retraining(second, on, masks, store=tmp_path / "kept")


class _Tied(nn.Module):
    """The head's weight is the table too, through a function and not a module."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 12, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(nn.functional.embedding(x, self.head.weight))).mean(1))


def test_a_head_that_acts_before_itself_has_no_frozen_features():
    torch.manual_seed(0)
    model = _Tied().double().eval()
    X, y = torch.randint(0, 12, (30, 4)), torch.randint(0, 12, (30,))
    identity_curvature = uw.operators.Identity()
    influence = uw.explain(
        model, X, y, loss=cross_entropy, parameters=["head.weight"], curvature=identity_curvature, damping=0.0
    )
    G = torch.stack(
        [
            torch.autograd.grad(cross_entropy(model(X[i : i + 1]), y[i : i + 1]), [model.head.weight])[0].flatten()
            for i in range(30)
        ]
    )
    np.testing.assert_allclose(influence.on_loss(X[:3], y[:3]).values, (G[:3] @ G.T / 30).numpy(), rtol=1e-10)


def test_features_of_a_bfloat16_body_are_computed_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)).bfloat16().eval()
    X, y = torch.randn(30, 4), torch.arange(30) % 2
    influence = uw.explain(model, X, y, loss=cross_entropy, parameters=["2.weight", "2.bias"], damping=0.1)
    wide = nn.Sequential(nn.Linear(4, 64), nn.Tanh())
    wide.load_state_dict({name: t.float() for name, t in model.state_dict().items() if name.startswith("0")})
    np.testing.assert_allclose(uw.features(influence), wide(X).detach().numpy(), atol=1e-6)
    assert model[0].weight.dtype == torch.bfloat16


class _DropPath(nn.Module):
    """Random in training mode, and not named so; a branch is left out in one pass of fifty."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h + h * (torch.rand(len(x), 1) >= 0.02) if self.training else 2 * h)


@pytest.mark.parametrize("seed", range(5))
def test_rare_chance_is_seen(seed):
    torch.manual_seed(seed)
    X, y = torch.randn(30, 4), torch.arange(30) % 2
    with pytest.raises(errors.NotDeterministic, match=r"model\.eval"):
        uw.explain(_DropPath().train(), X, y, loss=cross_entropy, damping=0.1)
    uw.explain(_DropPath().eval(), X, y, loss=cross_entropy, damping=0.1)


def test_a_loss_that_draws_without_effect_is_no_chance():
    X, y = data()

    def loss(params, example):
        noise = torch.rand(())
        return ((params["w"] @ example[0]) - example[1]) ** 2 + 0 * noise

    params = {"w": torch.zeros(4, dtype=torch.float64)}
    influence = uw.Influence(uw.Objective(loss, params, penalty=0.1), (X, y.double()))
    assert influence.objective.route.examples == "loop"  # vmap follows no chance, whether it matters or not


class _Buffered(nn.Module):
    """Writes into a buffer in every pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.top = nn.Linear(4, 2)

    def forward(self, x):
        self.seen.add_(1.0)
        return self.top(x)


def test_the_module_is_never_written_into():
    X, y = data()
    model = _Buffered().double().eval()
    uw.explain(model, X, y, loss=cross_entropy, damping=0.1)
    assert float(model.seen) == 0


def test_an_embedding_that_shortens_its_rows_is_refused():
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 2)).eval()
    before = model[0].weight.detach().clone()
    with pytest.raises(errors.UnsupportedModel, match=r"shortens its rows.*set its max_norm to None"):
        uw.explain(model, torch.randint(0, 8, (20, 3)), torch.arange(20) % 2, loss=cross_entropy, damping=0.1)
    torch.testing.assert_close(model[0].weight, before)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_gauss_newton_of_many_outputs_forms_no_matrix_of_them(k, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5)).double().eval()  # 4 positions of 5 classes: 20 outputs
    X, y = torch.randint(0, 7, (10, 4)), torch.randint(0, 5, (10, 4))

    def loss(f, y):
        return cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum") / len(y)

    weights = np.linspace(0.5, 2, 10)
    settings = {"loss": loss, "damping": 0.1, "sample_weight": weights}
    kept = uw.explain(model, X, y, **settings).operator
    swept = uw.explain(model, X, y, curvature=uw.operators.GaussNewton(keep=0), **settings).operator
    assert type(kept) is not type(swept)
    V = torch.randn(k, kept.size, dtype=torch.float64)
    truth = V @ kept.matrix()
    if k < 20:
        monkeypatch.setattr(uw.calculus, "output_hessians", None)
    torch.testing.assert_close(swept.apply(V), truth, rtol=1e-9, atol=1e-12)


def test_names_of_parameters_may_come_from_a_generator():
    X, y = data()
    names = (name for name, _ in network().named_parameters() if name.startswith("2"))
    influence = uw.explain(network().eval(), X, y, loss=cross_entropy, parameters=names, damping=0.1)
    assert list(influence.objective.blocks) == ["2.weight", "2.bias"]


def test_scores_of_other_queries_are_said():
    X, y = data()
    influence = uw.explain(network().eval(), X, y, loss=cross_entropy, penalty=0.1, damping=0.0)
    masks = uw.random_subsets(n, 4)
    outcomes = uw.subset_retraining(influence, (X[:3], y[:3]), masks)
    with pytest.warns(errors.TheoryWarning, match="Are they other queries"):
        uw.lds(influence.on_loss(X[3:6], y[3:6]), outcomes, resamples=5)
    uw.lds(influence.on_loss(X[:3], y[:3]), outcomes, resamples=5)


def test_a_level_is_a_fraction():
    with pytest.raises(errors.InvalidInput, match=r"level=95\.0"):
        uw.mislabel_auc([0.9, 0.1, 0.8], [0], level=95.0)


def test_a_measure_is_tried_on_a_few_queries():
    X, y = data()
    influence = uw.explain(network().eval(), X, y, loss=cross_entropy, penalty=0.1, damping=0.0)
    calls = []

    def measure(params, example):
        calls.append(1)
        return influence.objective.outputs(params, example).reshape(-1)[0]

    many = X.repeat(40, 1), y.repeat(40)
    uw.subset_retraining(influence, many, uw.random_subsets(n, 1), measure=measure)
    assert len(calls) < 500


@pytest.mark.parametrize("around", ["nothing recorded", "autocast"])
def test_the_callers_state_of_torch_changes_nothing(around):
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 4, generator=draw), torch.arange(30) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3)).eval()

    def values():
        settings = {"loss": cross_entropy, "penalty": 0.05, "damping": 0.02, "curvature": uw.operators.Nystroem(20)}
        return uw.explain(model, X, y, **settings).on_loss(X[:3], y[:3]).values

    expected = values()
    with torch.no_grad() if around == "nothing recorded" else torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(values(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    with torch.inference_mode(), pytest.raises(errors.InvalidInput, match="inference_mode"):
        values()
    with torch.inference_mode():
        made = X * 1
    assert uw.explain(model, made, y, loss=cross_entropy, damping=0.1).on_loss(made[:1], y[:1]).values.shape == (1, 30)


def test_squares_whose_positions_cancel_are_not_negative():
    draw = torch.Generator().manual_seed(0)
    inputs, slopes = torch.randn(50, 1, 2, 30, generator=draw), torch.randn(1, 50, 1, 2, 40, generator=draw)
    inputs[:, :, 1], slopes[:, :, :, 1] = inputs[:, :, 0], -slopes[:, :, :, 0] * (1 + 1e-3)
    piece = Product("weight", None, inputs, slopes, (40, 30))
    truth = (slopes.double().transpose(-1, -2) @ inputs.double()).square().sum((2, 3, 4))
    torch.testing.assert_close(piece.squares().double(), truth, rtol=1e-4, atol=1e-12)


def test_reliability_leaves_out_what_moves_all_rows_of_a_query():
    """Noise of the control is common to a query's rows; a perfect prediction's correlation shows what is left."""
    draw = np.random.default_rng(0)
    signal, shared = draw.normal(size=(1, 4000)), 5 * draw.normal(size=(2, 1, 1))
    by_seed = signal + draw.normal(size=(2, 1, 4000)) + shared
    outcomes = uw.Outcomes(by_seed.mean(0), np.zeros(1), np.arange(4000), by_seed=by_seed)
    found = np.corrcoef(signal[0], outcomes.actual[0])[0, 1]
    assert np.sqrt(outcomes.reliability) == pytest.approx(found, abs=0.02)


def test_heads_of_checkpoints_may_stand_on_bodies_that_move():
    X, y = data()
    model = network()
    states, rates = [], [0.5, 0.4, 0.3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in rates:
        optimizer.zero_grad()
        cross_entropy(model(X), y).backward()
        optimizer.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    names = ["2.weight", "2.bias"]
    run = uw.checkpoints(model.eval(), states, X, y, loss=cross_entropy, parameters=names, damping=0.1)
    found = uw.TracIn(run, rates).on_loss(X[:2], y[:2]).values
    truth = np.zeros((2, n))
    for rate, state in zip(rates, states, strict=True):
        model.load_state_dict(state)
        last = [model[2].weight, model[2].bias]
        G = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(cross_entropy(model(X[i : i + 1]), y[i : i + 1]), last)]
                )
                for i in range(n)
            ]
        )
        truth += rate * (G[:2] @ G.T).numpy()
    np.testing.assert_allclose(found, truth, rtol=1e-8)
    assert uw.ensemble(run).on_loss(X[:2], y[:2]).values.shape == (2, n)
    with pytest.raises(errors.InvalidInput, match="input of row"):
        uw.ensemble([run[0], uw.explain(model, X + 1, y, loss=cross_entropy, parameters=names, damping=0.1)])


def test_training_starts_at_a_state_dict_with_buffers():
    X, y = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double().eval()
    influence = uw.explain(model, X, y, loss=cross_entropy, damping=0.1)
    training = uw.StackedTraining(SGD(lr=0.1), Placed(n), epochs=1, start=model.state_dict()).bind(influence)
    (start,) = training.checkpoints(np.ones((1, n)), [0], [0])[0]
    torch.testing.assert_close(start.double(), influence.objective.theta)


def test_rows_of_no_weight_are_not_removed_at_random():
    X, y = data()
    weights = np.ones(n)
    weights[::2] = 0
    influence = uw.explain(network().eval(), X, y, loss=cross_entropy, penalty=0.1, damping=0.0, sample_weight=weights)
    seen = []

    def train(given, seed=0):
        seen.append(np.flatnonzero(given == 0))
        return influence.objective.theta

    on = X[:2], y[:2]
    uw.removal_curve(influence, influence.on_loss(*on), on, counts=[3], retrain=train)
    assert max(map(len, seen)) == 3
    assert all((weights[rows] > 0).all() for rows in seen)
