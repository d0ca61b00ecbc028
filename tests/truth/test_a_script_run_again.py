"""What deleting a row from a training script does: torch's own criteria and reductions, trained again from scratch."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import upweight as uw

DRAW = torch.Generator().manual_seed(0)
N, K = 400, 3
X = torch.randn(N, 4, generator=DRAW, dtype=torch.float64)
LOGITS = X @ torch.randn(4, K, generator=DRAW, dtype=torch.float64)
Y = (LOGITS + torch.randn(N, K, generator=DRAW, dtype=torch.float64)).argmax(1)
MANY = torch.stack([k == Y for k in range(K)], 1).double()
WEIGHT = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
SOME = torch.where(torch.arange(N) % 7 == 3, -100, Y)  # every seventh row has no label
TOKENS = torch.stack([Y, (Y + 1) % K, Y], 1)  # three labels a row, some of them missing
TOKENS = torch.where(torch.rand(N, 3, generator=DRAW) < 0.3, -100, TOKENS)
TOKENS[5] = -100


class Positions(nn.Module):
    """Logits of three positions, classes first as torch wants them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3 * K)

    def forward(self, x):
        return self.linear(x).reshape(len(x), K, 3)


def plain(outputs=K):
    return nn.Linear(4, outputs)


def mean(z, y):
    return F.cross_entropy(z, y)


# name: (module, criterion, targets)
SCRIPTS = {
    "cross-entropy": (plain, nn.CrossEntropyLoss(), Y),
    "a plain function": (plain, mean, Y),
    "class weights": (plain, nn.CrossEntropyLoss(weight=WEIGHT), Y),
    "class weights, float32": (plain, nn.CrossEntropyLoss(weight=WEIGHT.float()), Y),
    "class weights of a partial": (plain, functools.partial(F.cross_entropy, weight=WEIGHT), Y),
    "class weights and smoothing": (plain, nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), Y),
    "class weights, nll": (lambda: nn.Sequential(plain(), nn.LogSoftmax(1)), nn.NLLLoss(weight=WEIGHT), Y),
    "class weights, sum": (plain, nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), Y),
    "ignored labels": (plain, nn.CrossEntropyLoss(), SOME),
    "ignored labels of the function": (plain, F.cross_entropy, SOME),
    "ignored class": (plain, nn.CrossEntropyLoss(ignore_index=1), Y),
    "ignored labels and weights": (plain, nn.CrossEntropyLoss(weight=WEIGHT), SOME),
    "ignored labels, sum": (plain, nn.CrossEntropyLoss(reduction="sum"), SOME),
    "token means": (Positions, nn.CrossEntropyLoss(), TOKENS),
    "token means and weights": (Positions, nn.CrossEntropyLoss(weight=WEIGHT), TOKENS),
    "sum": (plain, nn.CrossEntropyLoss(reduction="sum"), Y),
    "probabilities": (plain, nn.CrossEntropyLoss(weight=WEIGHT), 0.8 * MANY + 0.2 / K),
    "logistic": (plain, nn.BCEWithLogitsLoss(), MANY),
    "logistic, weights": (plain, nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), MANY),
    "logistic, weights, sum": (plain, nn.BCEWithLogitsLoss(weight=WEIGHT, reduction="sum"), MANY),
    "squares": (plain, nn.MSELoss(), LOGITS),
    "squares, sum": (plain, nn.MSELoss(reduction="sum"), LOGITS),
}


def script(name, rows, penalty):
    """Trains on these rows from zeros."""
    build, criterion, targets = SCRIPTS[name]
    model = build().double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    steps = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    if getattr(criterion, "weight", None) is not None and criterion.weight.dtype == torch.float32:
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)

    def closure():
        steps.zero_grad()
        value = criterion(model(X[rows]), targets[rows]) + penalty / 2 * sum((p**2).sum() for p in model.parameters())
        value.backward()
        return value

    steps.step(closure)
    return model.eval()


def losses(name, model, queries):
    _, criterion, targets = SCRIPTS[name]
    if getattr(criterion, "weight", None) is not None and criterion.weight.dtype == torch.float32:
        criterion = nn.CrossEntropyLoss(weight=WEIGHT)
    with torch.no_grad():
        return np.array([float(criterion(model(X[q : q + 1]), targets[q : q + 1])) for q in queries])


@pytest.mark.filterwarnings("ignore:.*does not count row:upweight.errors.TheoryWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_deleted_row(name):
    """Slope and intercept of really on predicted, by the script itself; a quarter of the rows of most influence too."""
    _, criterion, targets = SCRIPTS[name]
    penalty = 0.1 * (N if getattr(criterion, "reduction", "mean") == "sum" else 1)
    everyone = np.arange(N)
    queries = np.flatnonzero(uw.adapters.criteria.Reduction.of(criterion).counted(targets))[:5]
    model = script(name, everyone, penalty)
    influence = uw.explain(model, X, targets, loss=criterion, penalty=penalty)
    assert influence.check().rows_from_minimum < 1e-3
    values = influence.on_loss(X[queries], targets[queries]).values
    rows = np.union1d(np.argsort(-np.abs(values).max(0))[:10], [3, 10, 20, 30])
    now = losses(name, model, queries)
    really = np.stack([losses(name, script(name, np.delete(everyone, row), penalty), queries) - now for row in rows], 1)
    predicted = values[:, rows]
    slope, intercept = np.polyfit(predicted.ravel(), really.ravel(), 1)
    assert 0.9 < slope < 1.15
    assert abs(intercept) < 0.02 * np.abs(really).max()
    assert np.corrcoef(predicted.ravel(), really.ravel())[0, 1] > 0.995
    outcomes = uw.leave_one_out(influence, (X[queries], targets[queries]), rows)  # what it retrains is the script
    np.testing.assert_allclose(outcomes.actual, really, atol=1e-3 * np.abs(really).max())


@pytest.mark.filterwarnings("ignore:.*does not count row:upweight.errors.TheoryWarning")
@pytest.mark.parametrize("name", ["class weights", "ignored labels", "token means and weights", "cross-entropy"])
def test_a_dataset_gives_the_same(name):
    build, criterion, targets = SCRIPTS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    settings = {"loss": criterion, "penalty": 0.05, "damping": 0.01}
    of_arrays = uw.explain(model, X, targets, **settings)
    of_items = uw.explain(model, torch.utils.data.TensorDataset(X, targets), **settings)
    np.testing.assert_allclose(of_items.examples.weights, of_arrays.examples.weights)
    on = (X[:3], targets[:3])
    np.testing.assert_allclose(of_items.on_loss(*on).values, of_arrays.on_loss(*on).values, rtol=1e-9, atol=1e-12)


def test_weights_are_shares_of_the_mean():
    influence = uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(weight=WEIGHT))
    np.testing.assert_allclose(influence.examples.weights, (N * WEIGHT[Y] / WEIGHT[Y].sum()).numpy())
    given = np.linspace(0.5, 2, N)
    twice = uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(weight=WEIGHT), sample_weight=given)
    np.testing.assert_allclose(twice.examples.weights, given * influence.examples.weights)


def test_a_new_label_brings_the_weight_of_its_class():
    """The script with the label changed; the divisor of its mean changes too, and the penalty's share with it."""
    name, row = "class weights", 20
    everyone = np.arange(N)
    model = script(name, everyone, 0.05)
    influence = uw.explain(model, X, Y, loss=SCRIPTS[name][1], penalty=0.05)
    queries = [0, 1, 2, 4]
    new = (int(Y[row]) + 1) % K
    predicted = influence.of_relabeling([row], [new], on=(X[queries], Y[queries])).values[:, 0]
    changed = Y.clone()
    changed[row] = new
    now = losses(name, model, queries)
    try:
        SCRIPTS["changed"] = (plain, SCRIPTS[name][1], changed)
        again = script("changed", everyone, 0.05)
    finally:
        SCRIPTS.pop("changed")
    really = losses(name, again, queries) - now
    slope = float(predicted @ really) / float(predicted @ predicted)
    assert 0.85 < slope < 1.2
    assert np.corrcoef(predicted, really)[0, 1] > 0.98


def test_rows_that_are_not_counted_are_named_and_have_no_influence():
    with pytest.warns(uw.errors.TheoryWarning, match=r"does not count row\(s\) 3, 10, 17, 24, 31 and 52 more"):
        influence = uw.explain(plain().double(), X, SOME, loss=F.cross_entropy, penalty=0.1)
    values = influence.on_loss(X[:2], Y[:2]).values
    assert not values[:, SOME == -100].any()
    assert np.isfinite(values).all()
    with pytest.raises(uw.errors.InvalidInput, match="Row 3 has no label"):
        influence.on_loss(X[:5], SOME[:5])


def test_no_row_counts():
    with pytest.raises(uw.errors.InvalidInput, match="No row counts"):
        uw.explain(plain().double(), X, torch.full((N,), -100), loss=F.cross_entropy)


def test_the_penalty_of_a_sum_belongs_to_the_sum():
    summed = uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(reduction="sum"), penalty=N * 0.1)
    averaged = uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(), penalty=0.1)
    assert summed.objective.penalty == averaged.objective.penalty
    assert (summed.objective.folded, averaged.objective.folded) == (False, True)
    own = uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(), penalty=0.1, penalty_per_example=False)
    assert own.objective.folded is False
    function = uw.explain(
        plain().double(),
        X,
        Y,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        penalty=lambda p: N * (p["weight"] ** 2).sum(),
    )
    assert float(function.objective.penalty({"weight": torch.tensor(2.0)})) == pytest.approx(4.0)


def test_a_function_that_sums_is_named_where_a_penalty_would_weigh_otherwise():
    def total(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    with pytest.warns(uw.errors.TheoryWarning, match=r"sum over a batch.*penalty_per_example=False"):
        uw.explain(plain().double(), X, Y, loss=total, penalty=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uw.explain(plain().double(), X, Y, loss=total)
        uw.explain(
            plain().double(), X, Y, loss=nn.CrossEntropyLoss(reduction="sum"), penalty=0.1
        )  # what it says to type
        uw.explain(plain().double(), X, Y, loss=mean, penalty=0.1)


def test_unknown_weights_are_refused_with_a_way_out_that_works():
    with pytest.raises(uw.errors.InvalidInput, match=r"unequally.*torch.nn.CrossEntropyLoss and NLLLoss"):
        uw.explain(plain().double(), X, Y, loss=lambda z, y: F.cross_entropy(z, y, weight=WEIGHT))
    uw.explain(plain().double(), X, Y, loss=functools.partial(F.cross_entropy, weight=WEIGHT))
    uw.explain(plain().double(), X, Y, loss=nn.CrossEntropyLoss(weight=WEIGHT))


def test_a_subclass_is_taken_by_its_numbers_not_its_name():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, z, y):
            return (
                (1 - z.softmax(1).gather(1, y[:, None])[:, 0]) ** 2 * F.cross_entropy(z, y, reduction="none")
            ).mean()

    own = uw.explain(plain().double(), X, Y, loss=Focal(weight=WEIGHT), damping=0.1)
    assert (own.examples.weights == 1).all()


@pytest.mark.parametrize("penalty", [0.1, lambda params: (params["weight"] ** 4).sum()], ids=["number", "function"])
def test_the_share_of_the_penalty_is_there_where_nothing_is_recorded(penalty):
    def values():
        influence = uw.explain(plain().double(), X, Y, loss=mean, penalty=penalty, damping=0.1)
        return influence.on_loss(X[:2], Y[:2]).values

    torch.manual_seed(0)
    expected = values()
    torch.manual_seed(0)
    with torch.no_grad():
        np.testing.assert_allclose(values(), expected, rtol=1e-10)


def test_a_criterion_that_says_sum_and_gives_the_mean_is_refused():
    class Says(nn.Module):
        reduction = "sum"

        def forward(self, z, y):
            return F.cross_entropy(z, y)

    criterion = Says()
    with pytest.raises(uw.errors.InvalidInput, match=r"says reduction='sum' and gives the mean"):
        uw.explain(plain().double(), X, Y, loss=criterion)
    criterion.reduction = "mean"
    assert uw.explain(plain().double(), X, Y, loss=criterion, penalty=0.1).objective.folded


@pytest.mark.filterwarnings("ignore:.*does not count row:upweight.errors.TheoryWarning")
def test_rows_that_are_not_counted_leave_the_classes_what_they_are():
    influence = uw.explain(plain().double(), X, SOME, loss=F.cross_entropy, damping=0.1)
    assert uw.predict(influence, X[:5]).labels.tolist() == uw.predict(influence, X[:5]).outputs.argmax(1).tolist()
    with pytest.raises(uw.errors.InvalidInput, match="Row 3 has no label"):
        influence.on_loss(torch.utils.data.TensorDataset(X[:5], SOME[:5]))
    gone = influence.of_relabeling([0], [-100], on=(X[:2], Y[:2])).values[:, 0]
    np.testing.assert_allclose(gone, influence.on_loss(X[:2], Y[:2]).values[:, 0], rtol=1e-9)
