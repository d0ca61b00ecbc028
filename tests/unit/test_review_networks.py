"""What reviews of the code for networks found wrong, one test each."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from small import XQ, YQ, classifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight import errors, identity, scoring
from upweight.minibatch import SGD, Placed, Shuffled
from upweight.pieces import Product
from upweight.retrain import LBFGS

n = 24


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return X, (X[:, 0] + torch.randn(n, generator=draw, dtype=torch.float64) / 2 > 0).long()


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()


def test_training_on_a_subset_takes_the_rows_share_of_a_folded_penalty_along():
    """Both batchings then minimise the same R, whose minimum L-BFGS finds on its own."""
    X, y = data()
    torch.manual_seed(1)
    model = nn.Linear(4, 2).double()
    influence = uw.explain(model, X, y, loss=cross_entropy, penalty=0.1, penalty_per_example=True)
    weights = np.ones(n)
    weights[::2] = 0
    truth = LBFGS(rtol=1e-8).bind(influence)(weights)
    for batches in (Shuffled(n), Placed(n)):
        theta = uw.StackedTraining(SGD(lr=0.5), batches, epochs=3000).bind(influence)(weights, 0)
        assert torch.allclose(theta, truth, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 0, 0, 1], [0] * 6 + [1] * 3, [2, 1, 0, 2, 1, 0]])
def test_equal_queries_are_solved_as_fast_as_one_of_each(order):
    X, y = data()
    settings = {"loss": cross_entropy, "damping": 1e-3, "solver": uw.solvers.CG(rtol=1e-8)}
    influence = uw.explain(network(), X, y, **settings)
    once = influence.on_loss(X[sorted(set(order))], y[sorted(set(order))])
    many = influence.on_loss(X[order], y[order])
    place = {row: line for line, row in enumerate(sorted(set(order)))}
    assert np.allclose(many.values, once.values[[place[row] for row in order]], rtol=1e-5, atol=1e-9)
    assert many.certificate.converged
    assert many.certificate.sweeps <= 2 * once.certificate.sweeps


def test_equal_queries_that_are_not_solved_in_time_can_go_on():
    X, y = data()
    settings = {"loss": cross_entropy, "damping": 1e-3}
    order = [0, 0, 1, 0]
    short = uw.explain(network(), X, y, solver=uw.solvers.CG(rtol=1e-8, max_sweeps=4), **settings)
    V = scoring.gradients(short.sweep, np.array(order))
    with pytest.raises(errors.NotConverged) as stopped:
        short.solver.prepare(short.operator, 1e-3).solve(V)
    known = stopped.value.solution
    assert known is not None
    assert known.x.shape == V.shape
    done = uw.solvers.CG(rtol=1e-6).prepare(short.operator, 1e-3).solve(V, state=known.state)
    assert done.converged
    assert torch.allclose(done.x[0], done.x[1], rtol=1e-4, atol=1e-6)


def test_a_label_that_the_criterion_ignores_is_refused():
    X, y = data()
    y[5] = -100
    with pytest.raises(errors.InvalidInput, match="ignore_index"):
        uw.explain(network(), X, y, loss=cross_entropy)


def test_a_written_out_curvature_is_damped_like_the_one_it_stands_for():
    X, y = data()
    settings = {"loss": cross_entropy, "penalty": 1e-4}
    plain = uw.explain(network(), X, y, curvature=uw.operators.EKFAC(), **settings)
    dense = uw.explain(network(), X, y, curvature=uw.operators.Dense(uw.operators.EKFAC()), **settings)
    assert dense.damping == pytest.approx(plain.damping, rel=0.2)
    assert dense.damping > 0


def test_rows_of_equal_suspicion_are_found_in_no_order():
    curve = uw.mislabel_auc(np.zeros(30), np.arange(3))
    assert curve.found_in(0.1) == pytest.approx(0.1)
    assert uw.mislabel_auc(np.zeros(30), np.arange(27, 30)).found_in(0.1) == pytest.approx(0.1)


def test_self_scores_of_some_rows_cannot_be_matched_with_row_numbers():
    X, y = data()
    scores = uw.explain(network(), X, y, loss=cross_entropy, damping=0.1).of_self([10, 11, 12])
    with pytest.raises(errors.InvalidInput, match="rows between 10 and 12"):
        uw.mislabel_auc(scores, [2])


def test_the_ceiling_of_noisy_outcomes_is_not_biased():
    """Signal and noise of equal variance: reliability ½ with one seed, ⅔ with two; the ceilings are their roots."""
    draw = np.random.default_rng(0)
    signal = draw.standard_normal((300, 30))
    values = signal[:, :, None] + draw.standard_normal((300, 30, 2))
    subsets = uw.random_subsets(n, 30)
    outcomes = uw.SubsetOutcomes(values, subsets, np.arange(2), "loss")
    influence = uw.explain(network(), *data(), loss=cross_entropy, damping=0.1)
    top = uw.lds(uw.baselines.random(influence, *_queries(300)), outcomes, resamples=2)
    assert top.ceiling == pytest.approx(np.sqrt(2 / 3), abs=0.03)
    assert top.one_seed_ceiling == pytest.approx(np.sqrt(1 / 2), abs=0.03)


@pytest.mark.parametrize("changed", ["start", "dropout", "activation"])
def test_stored_outcomes_of_another_training_are_refused(changed, tmp_path):
    """Factories share their name, and given parameters show in no repr."""

    def training(**other: object) -> uw.StackedTraining:
        settings = {"start": 0.0, "dropout": 0.0, "activation": nn.Tanh} | other

        def factory() -> nn.Module:
            drop = nn.Dropout(settings["dropout"])
            return nn.Sequential(nn.Linear(4, 6), settings["activation"](), drop, nn.Linear(6, 2)).double()

        start = torch.full((6 * 5 + 7 * 2,), settings["start"], dtype=torch.float64)
        return uw.StackedTraining(SGD(lr=0.1), Shuffled(8), epochs=1, factory=factory, start=start)

    X, y = data()
    names = network().state_dict()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 2)).double().eval()
    model[0].weight.data, model[3].weight.data = names["0.weight"], names["2.weight"]
    influence = uw.explain(model, X, y, loss=cross_entropy, damping=0.1)
    subsets = uw.random_subsets(n, 3)
    uw.subset_retraining(influence, (X[:2], y[:2]), subsets, training(), store=tmp_path)
    other = {"start": 0.1, "dropout": 0.5, "activation": nn.ReLU}[changed]
    with pytest.raises(errors.InvalidInput if changed == "activation" else errors.StoreMismatch):
        uw.subset_retraining(influence, (X[:2], y[:2]), subsets, training(**{changed: other}), store=tmp_path)
    uw.subset_retraining(influence, (X[:2], y[:2]), subsets, training(), store=tmp_path)  # the same goes on


def _queries(q: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(q, 4, generator=draw, dtype=torch.float64), torch.randint(0, 2, (q,), generator=draw)


def test_a_large_offset_does_not_move_neighbours():
    X, y = data()
    influence = uw.explain(network(), X, y, loss=cross_entropy, damping=0.1)
    near = uw.baselines.nearest_neighbours(influence, X[:3], y[:3]).values
    far = uw.baselines.nearest_neighbours(influence, X[:3], y[:3], embed=lambda x: x + 1e8).values
    assert np.allclose(near, far, atol=1e-5)


def test_the_typical_row_equals_its_definition():
    X, y = data()
    influence = uw.explain(network(), X, y, loss=cross_entropy, damping=0.1)
    G = scoring.gradients(influence.sweep, np.arange(n))
    assert scoring.typical_row(influence.sweep) == pytest.approx(float(G.square().sum(1).mean().sqrt()) / n)


def test_a_model_that_vmap_follows_but_not_its_gradient_goes_one_by_one():
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            f = self.inner(x)
            return f * (1 + nn.functional.one_hot(f.argmax(1), 2))

    X, y = data()
    influence = uw.explain(OneHot().double(), X, y, loss=cross_entropy, damping=0.1)
    assert np.isfinite(influence.on_loss(X[:2], y[:2]).values).all()


# ---- found by reading again ------------------------------------------------------------------------------------------


def test_two_functions_of_one_name_are_two_retrainers(tmp_path):
    influence = classifier()

    def made(factor):
        if factor > 1:

            def train(weights, seed=0):
                return influence.objective.theta * 2
        else:

            def train(weights, seed=0):
                return influence.objective.theta * 1

        return train

    masks = uw.random_subsets(influence.n, 2)
    uw.subset_retraining(influence, (XQ, YQ), masks, made(1), store=tmp_path / "run")
    uw.subset_retraining(influence, (XQ, YQ), masks, made(1), store=tmp_path / "run")
    with pytest.raises(uw.errors.StoreMismatch, match="retrain"):
        uw.subset_retraining(influence, (XQ, YQ), masks, made(2), store=tmp_path / "run")


def test_recurrent_cells_left_on_a_diagonal_are_said():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    x, y = torch.randn(20, 5, 4), torch.randint(0, 2, (20,))
    influence = uw.explain(Recurrent().eval(), x, y, loss=cross_entropy, penalty=0.1, curvature=uw.operators.EKFAC())
    with pytest.warns(uw.errors.TheoryWarning, match="768 of 1,090 parameters"):
        assert influence.operator.size == 1090


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_cannot_be_explained_say_why(kind):
    class Words(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.table, self.head = kind(20, 4, **settings), nn.Linear(4, 2)

        def forward(self, x):
            f = self.table(x)
            return self.head(f if f.ndim == 2 else f.mean(1))

    x, y = torch.randint(0, 20, (30, 5)), torch.randint(0, 2, (30,))
    with pytest.raises(uw.errors.UnsupportedModel, match="scale_grad_by_freq"):
        uw.explain(Words(scale_grad_by_freq=True).eval(), x, y, loss=cross_entropy)
    if kind is nn.EmbeddingBag:
        with pytest.raises(uw.errors.UnsupportedModel, match=r"nn\.Embedding and a mean"):
            uw.explain(Words().eval(), x, y, loss=cross_entropy)


def test_a_module_that_mixes_its_batch_cannot_be_retrained_in_a_stack():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x - x.mean(0) if self.training else x)

    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    influence = uw.explain(Mixing().eval(), x, y, loss=cross_entropy, damping=0.1)
    training = uw.StackedTraining(SGD(lr=0.1), uw.minibatch.Shuffled(4), epochs=1, factory=Mixing)
    with pytest.raises(uw.errors.UnsupportedModel, match="mixes the examples"):
        uw.leave_one_out(influence, (x[:1], y[:1]), [0], training)


@pytest.mark.parametrize(
    ("loss", "cut"),
    [
        (lambda f, t: nn.functional.mse_loss(f[:, 0], t), 0.5),
        (lambda f, t: nn.functional.binary_cross_entropy_with_logits(f[:, 0], t), 0.0),
        (lambda f, t: nn.functional.binary_cross_entropy(f[:, 0].clamp(0.01, 0.99), t), 0.5),
        (lambda f, t: (f[:, 0] - 3 * t - 1).square().mean(), None),
    ],
    ids=["least squares", "logits", "probabilities", "shifted"],
)
def test_a_single_output_changes_its_class_where_both_cost_the_same(loss, cut):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

        def forward(self, x):
            return x * self.slope

    x = torch.tensor([[-2.0], [1.0], [1.9], [2.1], [3.0]], dtype=torch.float64)
    y = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    influence = uw.explain(Line(), x, y, loss=loss, penalty=0.1)
    expected = None if cut is None else (0.25 * x[:, 0] > cut).long().tolist()
    said = uw.predict(influence, x).labels
    assert (None if said is None else said.tolist()) == expected
    curve = uw.removal_curve(
        influence, influence.on_loss(x, y), (x, y), counts=[1], retrain=lambda w, seed: influence.objective.theta
    )
    assert (curve.flipped is None) == (cut is None)


def test_rows_in_perfect_order_leave_an_interval():
    curve = uw.mislabel_auc(np.arange(20.0), np.arange(10, 20))
    assert curve.auc == 1
    assert curve.high == 1
    assert curve.low == pytest.approx(0.05 ** (1 / 10))


# ---- the second look -------------------------------------------------------------------------------------------------


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
