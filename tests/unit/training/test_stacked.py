"""Stacked training equals training one by one, and both equal a plain loop with torch.optim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import upweight as uw
from small import XQ, YQ, N, X, Y, Z, classifier, refuses, regressor, ridge, row, seeded
from upweight.model.objective import L2
from upweight.training.minibatch import SGD, Adam, Placed, Shuffled

DRAW = np.random.default_rng(4)
HALF = (DRAW.random((5, N)) < 0.5).astype(float)
WITHOUT_3 = (np.arange(N) != 3).astype(float)


def mlp(p=0.0, dtype=torch.float64):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2)).to(dtype)


def dropping():
    return mlp(0.3)


def training(optimizer=None, batches=None, epochs=3, factory=mlp, **settings):
    return uw.StackedTraining(optimizer or SGD(0.1, 0.9), batches or Shuffled(8), epochs, factory, **settings)


def influence(penalty=0.1, **settings):
    return classifier(mlp().eval(), penalty=penalty, **settings)


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class Given(nn.Module):
    """Dropout with the masks that a generator of its own gives."""

    def __init__(self, p, generator):
        nn.Module.__init__(self)
        self.p, self.generator = p, generator

    def forward(self, x):
        kept = torch.rand((8, x.shape[1]), generator=self.generator) >= self.p
        return x * kept[: len(x)] / (1 - self.p)


def plain(weights, seed, optimizer, batches, *, epochs=3, penalty=0.1, p=0.0, share=1.0):
    """The training loop that anyone would write, with torch's own optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp()
    model[2] = Given(p, torch.Generator().manual_seed(seed))
    step = optimizer(model.parameters())
    draw = np.random.default_rng([seed, 1])
    for _ in range(epochs):
        order = draw.permutation(N)
        if isinstance(batches, Shuffled):
            order = order[weights[order] != 0]
        for start in range(0, len(order), batches.batch_size):
            rows = order[start : start + batches.batch_size]
            losses = cross_entropy(model(torch.from_numpy(X[rows])), torch.from_numpy(Y[rows]), reduction="none")
            loss = (torch.from_numpy(weights[rows]) * losses).sum() / len(rows)
            if penalty:
                loss = loss + share * penalty / 2 * sum((q**2).sum() for q in model.parameters())
            step.zero_grad()
            loss.backward()
            step.step()
    return flat(model)


@pytest.mark.parametrize("batches", [Shuffled(8), Placed(8)], ids=repr)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (SGD(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
        (Adam(0.02, eps=1e-6), lambda p: torch.optim.Adam(p, 0.02, eps=1e-6)),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_it_is_the_plain_loop_with_torchs_optimisers(ours, theirs, batches):
    bound = training(ours, batches, factory=dropping).bind(influence(penalty_per_example=False))
    found = bound.many(np.stack([HALF[0], WITHOUT_3]), [5, 6])
    for theta, weights, seed in zip(found, (HALF[0], WITHOUT_3), (5, 6), strict=True):
        torch.testing.assert_close(theta, plain(weights, seed, theirs, batches, p=0.3), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_weight_decay_of_the_optimiser_is_torchs(kind):
    torchs = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[kind]
    (found,) = training(kind(0.05, weight_decay=0.2)).bind(influence()).many(HALF[:1], [2])
    truth = plain(HALF[0], 2, lambda p: torchs(p, 0.05, weight_decay=0.2), Shuffled(8), penalty=0)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def test_a_folded_penalty_shrinks_with_the_rows():
    (found,) = training(SGD(0.1), Placed(8)).bind(influence(penalty_per_example=True)).many(HALF[:1], [2])
    share = HALF[0].sum() / N
    truth = plain(HALF[0], 2, lambda p: torch.optim.SGD(p, 0.1), Placed(8), share=share)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("together", [1, 2, 3, 8])
def test_stacked_is_one_by_one(together, dtype):
    def factory():
        return mlp(0.3, dtype)

    weights = np.concatenate([HALF, [WITHOUT_3, np.ones(N), 2.5 * HALF[1]]])  # different numbers of steps
    seeds = [0, 1, 2, 0, 1, 7, 7, 1]
    train = training(factory=factory, together=together).bind(influence())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for theta, line, seed in zip(train.many(weights, seeds), weights, seeds, strict=True):
        torch.testing.assert_close(theta, train(line, seed), rtol=tolerance, atol=tolerance)


def test_equal_seeds_share_everything_but_the_rows():
    train = training(batches=Placed(8), factory=dropping).bind(influence())
    ones, other, without = train.many(np.stack([np.ones(N), np.ones(N), WITHOUT_3]), [3, 4, 3])
    assert float((ones - without).norm()) < 0.3 * float((ones - other).norm())


def test_a_network_with_convolutions_and_a_linear_model_are_stacked_too():
    images = torch.from_numpy(DRAW.normal(size=(N, 1, 5, 5)))

    def cnn():
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(18, 2)
        ).double()

    explained = uw.explain(seeded(cnn).eval(), images, Y, loss=cross_entropy)
    train = training(factory=cnn).bind(explained)
    for theta, line in zip(train.many(HALF, range(5)), HALF, strict=True):
        seed = int(np.flatnonzero((line == HALF).all(1))[0])
        torch.testing.assert_close(theta, train(line, seed), rtol=1e-10, atol=1e-12)


def test_without_a_factory_training_goes_through_the_objective_from_the_fit():
    """Whole batches are gradient descent on R, whose minimum Newton's method finds."""
    explained = ridge()
    fitted = explained.objective.theta.clone()
    train = uw.StackedTraining(SGD(0.05), Placed(N), 2000).bind(explained)
    train(HALF[0])
    assert torch.equal(explained.objective.theta, fitted)
    weights = np.stack([WITHOUT_3, np.ones(N), HALF[0]])
    for theta, line in zip(train.many(weights, [0, 0, 0]), weights, strict=True):
        torch.testing.assert_close(theta, uw.Newton().bind(explained)(line).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 300), (0.9, 400)])
def test_stopping_early_is_the_damping_that_it_amounts_to(momentum, steps):
    """Shrinkage along every direction of curvature h, with t = 1/λ: 1 − e^{−ht} against ht/(1 + ht), apart by ≤ 1.3."""
    h = torch.logspace(-3, 0.5, 12, dtype=torch.float64)

    def loss(theta, example):
        return (h / 2 * (theta - 1) ** 2).sum() + 0 * example.sum()

    optimizer = SGD(0.02, momentum)
    explained = uw.Influence(uw.Objective(loss, torch.zeros(12, dtype=torch.float64)), np.ones((4, 1)))
    travelled = uw.StackedTraining(optimizer, Placed(4), steps).bind(explained)(np.ones(4))
    damping = optimizer.damping(steps)
    ratio = travelled / (h / (h + damping))
    assert float(ratio.min()) > 0.97
    assert float(ratio.max()) < 1.31
    torch.testing.assert_close(travelled, 1 - torch.exp(-h / damping), rtol=0.05, atol=0.01)


def test_a_regression_goes_through_its_own_loss():
    explained = regressor(penalty=0)

    def factory():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    (found,) = training(SGD(0.1), Placed(N), 1, factory).bind(explained).many(np.ones((1, N)), [0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory()
    mse_loss(model(torch.from_numpy(X)), torch.from_numpy(Z[:, None])).backward()
    truth = torch.cat([(p - 0.1 * p.grad).detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("form", ["flat", "dict"])
def test_training_can_start_anywhere(form):
    module = seeded(mlp)
    first = flat(module).clone()
    start = flat(module) if form == "flat" else module.state_dict()
    (path,) = training(start=start).bind(influence()).checkpoints(np.ones((1, N)), [9], [0, 1])
    torch.testing.assert_close(path[0], first)
    assert torch.equal(flat(module), first)
    assert not torch.equal(path[1], path[0])


def test_checkpoints_are_the_states_on_the_way():
    train = training(factory=dropping).bind(influence())
    (path,) = train.checkpoints(np.ones((1, N)), [1], [0, 1, 2, 3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = flat(mlp())
    torch.testing.assert_close(path[0], first)
    for epochs in (1, 2, 3):
        (theta,) = training(factory=dropping, epochs=epochs).bind(influence()).many(np.ones((1, N)), [1])
        assert torch.equal(path[epochs], theta)


def test_chance_is_the_models_own():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    explained = influence()
    train = training(factory=dropping).bind(explained)
    torch.set_rng_state(before)
    first = train.many(HALF, range(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, train.many(HALF, range(5)), strict=True))


def test_dropout_keeps_its_share_and_its_mean():
    train = training(batches=Shuffled(40), factory=dropping).bind(influence())
    chance = [torch.Generator().manual_seed(k) for k in range(200)]
    (factors,) = train._draws(chance)
    assert factors.shape == (200, 40, 4)
    assert sorted(set(factors.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert float(factors.mean()) == pytest.approx(1, abs=0.02)


def test_epochs_visit_every_row_once():
    for batches in (Shuffled(7), Placed(7)):
        rows, places = batches.epoch(WITHOUT_3, np.random.default_rng(0))
        visited = np.sort(rows[rows >= 0])
        kept = np.flatnonzero(WITHOUT_3) if isinstance(batches, Shuffled) else np.arange(N)
        assert visited.tolist() == kept.tolist()
        assert places.tolist() == (rows >= 0).sum(1).tolist()
        assert rows.shape == (6, 7)


def test_jobs_are_handed_over_together():
    asked = []

    class Several:
        together = 3

        def __call__(self, weights, seed=0):
            raise NotImplementedError

        def many(self, weights, seeds):
            asked.append((weights.shape, list(seeds), (weights == 0).sum(1).tolist()))
            return [torch.zeros(sum(p.numel() for p in mlp().parameters())) for _ in seeds]

    uw.leave_one_out(influence(), (XQ, YQ), [3, 8, 5], Several(), seed=2, seeds=2)
    assert asked == [
        ((3, N), [2, 2, 2], [0, 1, 1]),
        ((1, N), [2], [1]),
        ((3, N), [3, 3, 3], [0, 1, 1]),
        ((1, N), [3], [1]),
    ]


def test_leave_one_out_trains_side_by_side_with_drift_and_seed_noise():
    explained = influence()
    train = training(batches=Placed(8), epochs=10)
    found = uw.leave_one_out(explained, (XQ, YQ), [3, 8], train, seed=2, seeds=3)
    bound = train.bind(explained)

    def losses(weights, seed):
        model = mlp()
        nn.utils.vector_to_parameters(bound(weights, seed), model.parameters())
        return cross_entropy(model(torch.from_numpy(XQ)), torch.from_numpy(YQ), reduction="none").detach().numpy()

    control = np.stack([losses(np.ones(N), seed) for seed in (2, 3, 4)])
    without = np.stack([losses(WITHOUT_3, seed) for seed in (2, 3, 4)])
    np.testing.assert_allclose(found.by_seed[:, :, 0], without - control, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.actual[:, 0], (without - control).mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.control_by_seed, control - found.query_values, atol=1e-12)
    np.testing.assert_allclose(found.control, control.mean(0) - found.query_values, atol=1e-12)
    noise = (without - control).std(0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found.standard_error[:, 0], noise, rtol=1e-8)
    assert "3 seeds" in repr(found)
    assert "seed noise" in repr(found)
    assert 0 <= found.reliability <= 1


def test_reliability_is_the_share_of_the_variance_that_is_not_noise():
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(20, 100))
    for noise in (0.5, 2.0):
        by_seed = truth + noise * draw.normal(size=(5, 20, 100))
        found = uw.Outcomes(by_seed.mean(0), np.zeros(20), np.arange(100), by_seed=by_seed)
        assert found.reliability == pytest.approx(1 / (1 + noise**2 / 5), abs=0.03)
    assert uw.Outcomes(truth, np.zeros(20), np.arange(100)).reliability is None


class Odd(nn.Module):
    """Randomness that is no dropout."""

    def __init__(self):
        nn.Module.__init__(self)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.layer(x) + torch.randn_like(x[:, :1])


def normalised():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


BAD = [
    row("no optimiser", ValueError, "optimizer=0.1. Pass", lambda: uw.StackedTraining(0.1, Shuffled(8), 1)),
    row("batches as a number", ValueError, "batches=8. Pass", lambda: uw.StackedTraining(SGD(0.1), 8, 1)),
    row("batches as a class", ValueError, "batches=.*Pass", lambda: uw.StackedTraining(SGD(0.1), Shuffled, 1)),
    row("no epochs", ValueError, "epochs=0", lambda: training(epochs=0)),
    row("none together", ValueError, "together=0", lambda: training(together=0)),
    row("a module as factory", ValueError, "factory is a Tensor", lambda: training(factory=torch.ones(2))),
    row("no step", ValueError, "lr=0, with which nothing", lambda: SGD(0)),
    row("negative step", ValueError, "lr=-1", lambda: Adam(-1)),
    row("nan", ValueError, "momentum=nan", lambda: SGD(0.1, float("nan"))),
    row("momentum of one", ValueError, "momentum=1.0, with which", lambda: SGD(0.1, 1.0)),
    row("damping of no steps", ValueError, "steps=0", lambda: SGD(0.1).damping(0)),
    row("beta of one", ValueError, "betas=", lambda: Adam(betas=(0.9, 1.0))),
    row("no places", ValueError, "batch_size=0", lambda: Placed(0)),
    row("no module", ValueError, r"factory\(\) returned a int", lambda: training(factory=lambda: 3).bind(influence())),
    row(
        "another architecture",
        ValueError,
        "Build the same architecture",
        lambda: training(factory=lambda: nn.Linear(3, 2)).bind(influence()),
    ),
    row(
        "batch statistics",
        TypeError,
        "'1' \\(BatchNorm1d\\) is in training mode",
        lambda: training(factory=normalised).bind(classifier(normalised().eval())),
    ),
    row(
        "other randomness",
        TypeError,
        "cannot be trained in a stack",
        lambda: training(factory=Odd).bind(uw.Influence(uw.Objective.from_module(Linear(), cross_entropy), (X, Y))),
    ),
    row(
        "one seed for two",
        ValueError,
        "one line of n weights and one seed",
        lambda: training().bind(influence()).many(HALF[:2], [0]),
    ),
    row("no rows", ValueError, "no row with weight", lambda: training().bind(influence()).many(np.zeros((1, N)), [0])),
    row(
        "epochs backwards",
        ValueError,
        "ascending",
        lambda: training().bind(influence()).checkpoints(HALF[:1], [0], [2, 1]),
    ),
    row("a start of another size", ValueError, "start does not have", lambda: training(start=[1.0]).bind(influence())),
    row(
        "divergence",
        ArithmeticError,
        "1 of 1 models diverged",
        lambda: training(SGD(1e30), epochs=20).bind(influence(penalty=L2({"0.weight": 5.0}))).many(HALF[:1], [0]),
    ),
]


class Linear(nn.Module):
    """What Odd pretends to be."""

    def __init__(self):
        nn.Module.__init__(self)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(("deed", "kind", "text"), BAD)
def test_what_is_refused(deed, kind, text):
    refuses(deed, kind, text)


def test_an_objective_of_one_function_needs_no_factory_and_can_have_none():
    def loss(theta, example):
        return (theta @ example[0] - example[1]) ** 2

    explained = uw.Influence(uw.Objective(loss, torch.zeros(3, dtype=torch.float64)), (X, Z))
    theta = uw.StackedTraining(SGD(0.1), Placed(N), 500).bind(explained)(np.ones(N))
    truth = np.linalg.lstsq(X, Z, rcond=None)[0]
    np.testing.assert_allclose(theta.numpy(), truth, rtol=1e-6)
    refuses(
        lambda: uw.StackedTraining(SGD(0.1), Placed(N), 1, lambda: nn.Linear(3, 1)).bind(explained),
        TypeError,
        "the loss apart from the model",
    )
    assert repr(uw.StackedTraining(SGD(0.1), Placed(N), 1)).endswith("epochs=1, from θ̂)")
