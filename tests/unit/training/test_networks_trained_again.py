"""Networks trained again: subsets, stores, stacks, ceilings; equal queries and rows that a criterion ignores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import upweight as uw
from small import XQ, YQ, classifier
from two_classes import data, n, network
from upweight import errors
from upweight.model import per_row
from upweight.training.minibatch import SGD, Placed, Shuffled
from upweight.training.retrainers import LBFGS


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
    V = per_row.gradients(short.sweep, np.array(order))
    with pytest.raises(errors.NotConverged) as stopped:
        short.solver.prepare(short.operator, 1e-3).solve(V)
    known = stopped.value.solution
    assert known is not None
    assert known.x.shape == V.shape
    done = uw.solvers.CG(rtol=1e-6).prepare(short.operator, 1e-3).solve(V, state=known.state)
    assert done.converged
    assert torch.allclose(done.x[0], done.x[1], rtol=1e-4, atol=1e-6)


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
    G = per_row.gradients(influence.sweep, np.arange(n))
    assert per_row.typical_row(influence.sweep) == pytest.approx(float(G.square().sum(1).mean().sqrt()) / n)


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


@pytest.mark.parametrize("squared", [False, True])
def test_a_tied_weight_with_other_uses_is_left_on_a_diagonal_and_that_is_said(squared):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(60, 16), nn.Linear(16, 16)

        def forward(self, x):
            output = torch.tanh(self.inner(self.words(x).mean(1))) @ self.words.weight.T
            return output - (self.words.weight**2).sum(1) if squared else output

    x, y = torch.randint(0, 60, (20, 5)), torch.randint(0, 60, (20,))
    influence = uw.explain(Tied().eval(), x, y, loss=cross_entropy, penalty=0.1, curvature=uw.operators.EKFAC())
    if not squared:  # looked up and multiplied with: it has factors
        assert next(basis for basis in influence.operator.bases if "words" in basis.name).left is not None
        return
    with pytest.warns(uw.errors.TheoryWarning, match="960 of 1,232 parameters"):
        assert influence.operator.size == 1232


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
