"""The derivative through a recorded training is what real trainings with other weights do: loops of torch.optim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import upweight as uw
from upweight.runs import threads

N, D, BATCH = 24, 3, 6
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=DRAW, dtype=torch.float64)
Y = torch.randint(0, 2, (N,), generator=DRAW)
XQ, YQ = torch.randn(3, D, generator=DRAW, dtype=torch.float64), torch.tensor([0, 1, 1])


class Attention(nn.Module):
    """Two layers of attention over the features as positions."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(1, 4)
        self.inner = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.leave = nn.Linear(4, 2)

    def forward(self, x):
        h = self.enter(x[..., None])
        for inner, norm in zip(self.inner, self.norms, strict=True):
            q, k, v = inner(norm(h)).chunk(3, -1)
            h = h + torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return self.leave(h.mean(-2))


class Heads(Attention):
    """The same with two heads, by torch's own attention, each position seeing those before it."""

    def forward(self, x):
        h = self.enter(x[..., None])
        for inner, norm in zip(self.inner, self.norms, strict=True):
            parts = inner(norm(h)).unflatten(-1, (3, 2, 2)).unbind(-3)
            heads = nn.functional.scaled_dot_product_attention(
                *(one.transpose(-2, -3) for one in parts), is_causal=True
            )
            h = h + heads.transpose(-2, -3).flatten(-2)
        return self.leave(h.mean(-2))


MODELS = {
    "linear": lambda: nn.Linear(D, 2),
    "MLP": lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)),
    "attention": Attention,
    "heads": Heads,
}
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
    "momentum": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.8, dampening=0.1, weight_decay=0.01
    ),
    "Nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, nesterov=True),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.02, eps=1e-4),
    "AdamW": lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
        ],
        lr=0.05,
        eps=1e-4,
    ),
}


def built(name):
    torch.manual_seed(1)
    return MODELS[name]().double()


def trained(model, optimizer, weights=None, *, epochs=3, clip=None, parts=1, penalty=0.0, recording=None):
    """The loop that anyone would write; `weights` multiply the losses of the rows."""
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    order = torch.Generator().manual_seed(7)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    for _ in range(epochs):
        for rows in torch.randperm(N, generator=order).split(BATCH):
            optimizer.zero_grad()
            for part in rows.chunk(parts):
                losses = cross_entropy(model(X[part]), Y[part], reduction="none")
                loss = (weights[part] * losses).mean() / parts
                loss = loss + penalty / 2 / parts * sum(p.square().sum() for p in model.parameters())
                loss.backward()
                if recording is not None:
                    recording.batch(part, 1 / parts)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
    return model


def by_reruns(model, optimizer, rows, size=1e-6, **settings):
    """−df/du of these rows: trainings with the weight of one row moved up and down."""

    def losses(row, move):
        weights = torch.ones(N, dtype=torch.float64)
        weights[row] += move
        fresh = built(model)
        trained(fresh, OPTIMIZERS[optimizer](fresh), weights, **settings)
        return cross_entropy(fresh(XQ), YQ, reduction="none").detach()

    return np.stack([((losses(row, -size) - losses(row, size)) / (2 * size)).numpy() for row in rows], 1)


def recorded(model, optimizer, *, clip=None, penalty=0.0, **settings):
    fresh = built(model)
    stepping = OPTIMIZERS[optimizer](fresh)
    recording = uw.Recording(fresh, stepping, X, Y, loss=cross_entropy, penalty=penalty or None, clip=clip)
    with recording:
        trained(fresh, stepping, clip=clip, penalty=penalty, recording=recording, **settings)
    return recording


ROWS = [0, 5, 11, 23]


@pytest.mark.parametrize(
    ("model", "optimizer", "settings"),
    [
        ("linear", "SGD", {}),
        ("linear", "momentum", {"penalty": 0.05}),
        ("MLP", "Nesterov", {"clip": 0.3}),
        ("MLP", "Adam", {"parts": 2}),
        ("MLP", "AdamW", {"clip": 0.3, "parts": 3}),
        ("attention", "momentum", {}),
        ("attention", "AdamW", {"clip": 0.5}),
        ("heads", "AdamW", {"clip": 0.5}),
    ],
    ids=str,
)
def test_it_is_the_derivative_of_real_trainings(model, optimizer, settings):
    through = uw.through(recorded(model, optimizer, **settings), since=0, second_moment="through")
    scores = through.on_loss(XQ, YQ, check=False)
    expected = by_reruns(model, optimizer, ROWS, **settings)
    np.testing.assert_allclose(scores.values[:, ROWS], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_parameters_in_bfloat16():
    model, rows = built("linear").bfloat16(), torch.tensor([4, 9, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    before = [block.detach().double() for block in model.parameters()]
    recording = uw.Recording(model, optimizer, X.bfloat16(), Y, loss=cross_entropy)
    with recording:
        cross_entropy(model(X.bfloat16()[rows]), Y[rows]).backward()
        recording.batch(rows)
        optimizer.step()
    found = uw.through(recording, since=0).on_loss(XQ.bfloat16(), YQ, check=False)

    def gradients(blocks, x, y):
        leaves = [block.clone().requires_grad_() for block in blocks]
        losses = cross_entropy(x.bfloat16().double() @ leaves[0].T + leaves[1], y, reduction="none")
        return torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]) for loss in losses]
        )

    after = [block.detach().double() for block in model.parameters()]
    expected = 0.25 / 3 * gradients(after, XQ, YQ) @ gradients(before, X[rows], Y[rows]).T
    np.testing.assert_allclose(found.values[:, rows], expected.numpy(), rtol=1e-3)


def test_one_step_is_a_product_of_gradients():
    model, rows = built("MLP"), torch.tensor([4, 9, 2])
    before = uw.explain(built("MLP"), X, Y, loss=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    recording = uw.Recording(model, optimizer, X, Y, loss=cross_entropy)
    with recording:
        cross_entropy(model(X[rows]), Y[rows]).backward()
        recording.batch(rows)
        optimizer.step()
    after = uw.explain(model, X, Y, loss=cross_entropy)
    calculus = uw.calculus
    expected = np.zeros((3, N))
    G = calculus.gradients(before.objective, (X[rows], Y[rows]))
    expected[:, rows] = 0.3 / 3 * (calculus.gradients(after.objective, (XQ, YQ)) @ G.T).numpy()
    np.testing.assert_allclose(
        uw.through(recording).on_loss(XQ, YQ, check=False).values, expected, rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_quadratic_has_a_closed_form(momentum):
    """Full batches: θ ← θ − η v, v ← μ v + H θ − c, so −dθ_T/du follows a linear recurrence of its own."""
    rate, steps, y = 0.05, 40, X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    recording = uw.Recording(model, optimizer, X, y[:, None], loss=mse_loss)
    every = torch.arange(N)
    H = 2 * X.T @ X / N
    theta = torch.zeros(D, dtype=torch.float64)
    velocity, turned, moving = (
        torch.zeros(D, dtype=torch.float64),
        torch.zeros(N, D, dtype=torch.float64),
        torch.zeros(N, D, dtype=torch.float64),
    )
    with recording:
        for _ in range(steps):
            optimizer.zero_grad()
            mse_loss(model(X), y[:, None]).backward()
            recording.batch(every)
            optimizer.step()
            own = 2 * (X @ theta - y)[:, None] * X / N  # the gradient of every row
            moving = momentum * moving + turned @ H + own
            turned = turned - rate * moving
            velocity = momentum * velocity + own.sum(0)
            theta = theta - rate * velocity
    asked = torch.tensor([[0.5, -1.0]], dtype=torch.float64).T
    expected = -(2 * (XQ[:2] @ theta - asked[:, 0])[:, None] * XQ[:2]) @ turned.T
    values = uw.through(recording).on_loss(XQ[:2], asked).values
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-10, atol=1e-14)


def test_a_fixed_second_moment_is_that_of_the_training():
    """The oracle steps with the square roots that the recorded training had, whatever the weights are."""
    seen = []

    def loop(weights, roots=None):
        model = built("MLP")
        flat = list(model.parameters())
        mean, square = [torch.zeros_like(p) for p in flat], [torch.zeros_like(p) for p in flat]
        order = torch.Generator().manual_seed(7)
        for step, rows in enumerate(torch.cat([torch.randperm(N, generator=order) for _ in range(2)]).split(BATCH), 1):
            losses = cross_entropy(model(X[rows]), Y[rows], reduction="none")
            G = torch.autograd.grad((weights[rows] * losses).mean(), flat)
            with torch.no_grad():
                for k, (p, g) in enumerate(zip(flat, G, strict=True)):
                    mean[k] = 0.9 * mean[k] + 0.1 * g
                    square[k] = 0.999 * square[k] + 0.001 * g * g
                    root = (square[k] / (1 - 0.999**step)).sqrt() + 1e-8
                    root = root if roots is None else roots[step - 1][k]
                    p -= 0.05 / (1 - 0.9**step) * mean[k] / root
                    if roots is None:
                        seen.append(root)
        return model

    weights = torch.ones(N, dtype=torch.float64)
    reference = loop(weights)
    blocks = len(list(reference.parameters()))
    roots = [seen[start : start + blocks] for start in range(0, len(seen), blocks)]
    model = built("MLP")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    recording = uw.Recording(model, optimizer, X, Y, loss=cross_entropy)
    order = torch.Generator().manual_seed(7)
    with recording:
        for rows in torch.cat([torch.randperm(N, generator=order) for _ in range(2)]).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(X[rows]), Y[rows]).backward()
            recording.batch(rows)
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), rtol=1e-9, atol=1e-12)
    expected = []
    for row in ROWS:
        sides = []
        for move in (-1e-6, 1e-6):
            weights = torch.ones(N, dtype=torch.float64)
            weights[row] += move
            sides.append(cross_entropy(loop(weights, roots)(XQ), YQ, reduction="none").detach())
        expected.append(((sides[0] - sides[1]) / 2e-6).numpy())
    scores = uw.through(recording, since=0).on_loss(XQ, YQ, check=False)
    np.testing.assert_allclose(scores.values[:, ROWS], np.stack(expected, 1), rtol=1e-5, atol=1e-9)


def test_later_steps_alone_are_those_of_weights_that_move_later():
    recording = recorded("MLP", "SGD")
    later = uw.through(recording, since=5).on_loss(XQ, YQ, check=False).values

    def losses(row, move):
        model = built("MLP")
        optimizer = OPTIMIZERS["SGD"](model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        for number, step in enumerate(recording.steps):
            (part,) = step.parts
            rows = torch.from_numpy(part.rows)
            weights = torch.ones(N, dtype=torch.float64)
            weights[row] += move if number >= 5 else 0
            optimizer.zero_grad()
            (weights[rows] * cross_entropy(model(X[rows]), Y[rows], reduction="none")).mean().backward()
            optimizer.step()
            scheduler.step()
        return cross_entropy(model(XQ), YQ, reduction="none").detach().numpy()

    expected = np.stack([(losses(row, -1e-6) - losses(row, 1e-6)) / 2e-6 for row in ROWS], 1)
    np.testing.assert_allclose(later[:, ROWS], expected, rtol=1e-5, atol=1e-9)


def test_removal_is_predicted_and_the_check_says_so():
    recording = recorded("linear", "SGD")
    through = uw.through(recording)
    found = through.locality(XQ, YQ)
    assert found.holds
    assert found.correlation[0] > 0.999
    assert found.slope[0] == pytest.approx(1, abs=0.01)
    values = through.on_loss(XQ, YQ).values
    actual = []
    for row in range(N):
        weights = torch.ones(N, dtype=torch.float64)
        weights[row] = 0
        model = built("linear")
        trained(model, OPTIMIZERS["SGD"](model), weights)
        actual.append(
            (cross_entropy(model(XQ), YQ, reduction="none") - cross_entropy(recording.model(XQ), YQ, reduction="none"))
            .detach()
            .numpy()
        )
    actual = np.stack(actual, 1)
    slope = float((values * actual).sum() / (values**2).sum())
    assert np.corrcoef(values.ravel(), actual.ravel())[0, 1] > 0.99
    assert slope == pytest.approx(1, abs=0.05)


def test_many_steps_keep_few_states_and_lose_nothing():
    model = built("linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    recording = uw.Recording(model, optimizer, X, Y, loss=cross_entropy)
    with recording:
        for step in range(300):
            rows = torch.arange(step, step + 5) % N
            optimizer.zero_grad()
            cross_entropy(model(X[rows]), Y[rows]).backward()
            recording.batch(rows)
            optimizer.step()
    assert 30 <= len(recording.states) <= 65
    assert {0, 300} <= recording.states.keys()
    assert math.isfinite(uw.through(recording).on_loss(XQ, YQ).values.sum())


def test_a_measure_of_ones_own_has_the_sign_of_the_loss():
    recording = recorded("MLP", "SGD")
    through = uw.through(recording)

    def loss(params, example):
        x, y = example
        h = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
        return cross_entropy((h @ params["2.weight"].T + params["2.bias"])[None], y[None])

    np.testing.assert_allclose(
        through.on_measure(loss, XQ, YQ, check=False).values, through.on_loss(XQ, YQ, check=False).values, rtol=1e-9
    )


CRITERIA = {
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.5], dtype=torch.float64)), 0.3),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), 0.01),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), 0.3),
}


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("name", CRITERIA)
def test_what_a_criterion_divides_by_is_that_of_the_batch(name):
    """Rows that come twice in a batch, weights of classes, labels that do not count, and sums."""
    criterion, rate = CRITERIA[name]
    batches = [torch.tensor([0, 1, 2, 3, 3, 4]), torch.tensor([5, 6, 7]), torch.arange(8, N), torch.tensor([3, 1, 0])]

    def loop(weights=None, recording=None, model=None, optimizer=None):
        model = built("MLP") if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5) if optimizer is None else optimizer
        for rows in batches:
            optimizer.zero_grad()
            if weights is None:
                criterion(model(X[rows]), Y[rows]).backward()
                recording.batch(rows)
            else:
                each = nn.CrossEntropyLoss(criterion.weight, ignore_index=criterion.ignore_index, reduction="none")
                counted = (Y[rows] != criterion.ignore_index).double()
                share = counted if criterion.weight is None else criterion.weight[Y[rows]] * counted
                total = 1.0 if criterion.reduction == "sum" else share.sum()
                ((weights[rows] * each(model(X[rows]), Y[rows])).sum() / total).backward()
            optimizer.step()
        return model

    model = built("MLP")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)
    recording = uw.Recording(model, optimizer, X, Y, loss=criterion)
    with recording:
        loop(None, recording, model, optimizer)

    def first(params, example):
        h = torch.tanh(example[0] @ params["0.weight"].T + params["0.bias"])
        return (h @ params["2.weight"].T + params["2.bias"])[0]

    values = uw.through(recording).on_measure(first, XQ, torch.zeros(3, dtype=torch.long), check=False).values
    expected = []
    for row in ROWS:
        sides = []
        for move in (-1e-6, 1e-6):
            weights = torch.ones(N, dtype=torch.float64)
            weights[row] += move
            sides.append(loop(weights)(XQ)[:, 0].detach())
        expected.append(((sides[0] - sides[1]) / 2e-6).numpy())
    expected = np.stack(expected, 1)
    np.testing.assert_allclose(values[:, ROWS], expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_frozen_parameters_stay_and_groups_differ_in_how_they_step():
    def loop(model, optimizer, weights=None, recording=None):
        for rows in torch.arange(N).split(BATCH):
            optimizer.zero_grad()
            each = cross_entropy(model(X[rows]), Y[rows], reduction="none")
            (each if weights is None else weights[rows] * each).mean().backward()
            if recording is not None:
                recording.batch(rows)
            optimizer.step()
        return cross_entropy(model(XQ), YQ, reduction="none").detach().numpy()

    def fresh():
        model = built("MLP")
        model[0].bias.requires_grad_(False)
        groups = [{"params": model[0].parameters(), "nesterov": True}, {"params": model[2].parameters()}]
        return model, torch.optim.SGD(groups, lr=0.1, momentum=0.8, weight_decay=0.1)

    model, optimizer = fresh()
    with uw.Recording(model, optimizer, X, Y, loss=cross_entropy) as recording:
        loop(model, optimizer, recording=recording)
    values = uw.through(recording).on_loss(XQ, YQ, check=False).values[:, ROWS]
    moves = [np.eye(N)[row] * 1e-6 for row in ROWS]
    sides = [[loop(*fresh(), torch.from_numpy(1 + sign * move)) for sign in (-1, 1)] for move in moves]
    expected = np.stack([(below - above) / 2e-6 for below, above in sides], 1)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_one_query_is_checked_by_several_draws():
    through = uw.through(recorded("linear", "SGD"))
    scores = through.on_loss(XQ[:1], YQ[:1])
    assert "slope = 1.0" in str(scores.certificate)
    np.testing.assert_allclose(scores.values, through.on_loss(XQ, YQ).values[:1], rtol=1e-12)


def test_queries_side_by_side_have_the_bits_of_one_after_the_other(monkeypatch):
    through, before = uw.through(recorded("attention", "AdamW", clip=0.5), since=0), torch.get_num_threads()
    each, counts = threads.each, []

    def last_first(count, task):
        counts.append(count)
        for number in reversed(range(count)):
            each(1, lambda _, number=number: task(number))

    try:
        torch.set_num_threads(2)
        beside = through.on_loss(XQ, YQ, check=False).values
        monkeypatch.setattr(threads, "each", last_first)
        alone = through.on_loss(XQ, YQ, check=False).values
    finally:
        torch.set_num_threads(before)
    assert counts == [len(XQ)] * len(through.trajectory)
    np.testing.assert_array_equal(beside, alone)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_last_step_that_is_lost_in_rounding_is_no_other_training(name):
    """The rate of a cosine ends at almost 0, where a float32 parameter moves by its rounding or not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 2))
    kinds = {"SGD": lambda p: torch.optim.SGD(p, lr=0.1), "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3)}
    optimizer = kinds[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 129)
    recording = uw.Recording(model, optimizer, X.float(), Y, loss=cross_entropy)
    with recording:
        for step in range(130):
            rows = torch.arange(step, step + 6) % N
            optimizer.zero_grad()
            cross_entropy(model(X[rows].float()), Y[rows]).backward()
            recording.batch(rows)
            optimizer.step()
            scheduler.step()
    assert np.isfinite(uw.through(recording).on_loss(XQ, YQ, check=False).values).all()


def test_dampening_without_momentum_is_none():
    def loop(weights=None):
        model = built("linear")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, dampening=0.5)
        recording = uw.Recording(model, optimizer, X, Y, loss=cross_entropy)
        with recording:
            for rows in torch.arange(N).split(BATCH):
                optimizer.zero_grad()
                each = cross_entropy(model(X[rows]), Y[rows], reduction="none")
                (each if weights is None else weights[rows] * each).mean().backward()
                recording.batch(rows)
                optimizer.step()
        return recording, cross_entropy(model(XQ), YQ, reduction="none").detach().numpy()

    values = uw.through(loop()[0]).on_loss(XQ, YQ, check=False).values[:, 5]
    above, below = (loop(torch.from_numpy(1 + sign * 1e-6 * np.eye(N)[5]))[1] for sign in (1, -1))
    np.testing.assert_allclose(values, (below - above) / 2e-6, rtol=1e-6)
