"""What is said to type by upweight/operators, typed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import config
from torch import nn
from torch.nn.functional import cross_entropy, huber_loss, l1_loss, nll_loss, smooth_l1_loss, softplus

import upweight as uw
from refusals import refused, warned
from small import XQ, YQ, ZQ, D, X, Y, Z, classifier, net, regressor, seeded
from upweight.operators import EKFAC, KFAC, Arnoldi, Dense, EmpiricalFisher, GaussNewton, Hessian, Nystroem
from upweight.operators.held import Held
from upweight.solvers import CG

THETA = torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:.*is not at a minimum:upweight.errors.TheoryWarning")


@pytest.fixture
def unchecked():
    """Outside of the tests nothing checks annotations before the library does, so here nothing does either."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def values(influence, x=XQ, y=YQ):
    """What it says of the queries, with every number finite and not all of them 0."""
    found = influence.on_loss(x, y).values
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0
    return found


def matrix(curvature, explained=classifier, **settings):
    return explained(curvature=curvature, **settings).operator.matrix()


def own(curvature, **settings):
    """Least squares as a loss of one's own."""

    def loss(params, example):
        return (params["w"] @ example[0] - example[1]) ** 2

    objective = uw.Objective(loss, {"w": THETA}, penalty=0.1, **settings)
    return uw.Influence(objective, (X, Z), curvature=curvature)


# ---- cotangents.py ---------------------------------------------------------------------------------------------------


FEW = X[:4]


def of_many(outputs, labels, curvature, *ends, **settings):
    """The influence of a linear layer with many outputs."""
    model = seeded(lambda: nn.Sequential(nn.Linear(D, outputs, bias=False), *ends).double())
    return classifier(model, FEW, labels, curvature=curvature, **settings)


def probabilities(influence, classes):
    """Those of softmaxes over `classes` outputs at a time."""
    eta = torch.from_numpy(FEW) @ influence.objective.params["0.weight"].T
    return eta.reshape(4, -1, classes).softmax(2)


def trace(influence, of_outputs):
    """Of the curvature; expected from that of the outputs, the inputs, and the penalty of 0.1."""
    expected = float(of_outputs.sum(1).mean()) * np.square(FEW).sum(1).mean() + 0.1 * influence.objective.size
    return float(influence.operator.eigenvalues.sum()) == pytest.approx(expected, rel=1e-3)


def test_many_outputs_are_drawn():
    labels = np.arange(4)
    with refused("is the most that is tried", "Pass samples=1: random cotangents, unbiased"):
        _ = of_many(1001, labels, KFAC()).operator
    influence = of_many(1001, labels, KFAC(samples=1))
    assert trace(influence, 1 - probabilities(influence, 1001).square().sum(2))
    values(influence, FEW, labels)


def test_kronecker_factors_of_a_loss_in_one_step():
    with refused(
        "Kronecker factors need the model's output apart", "Pass Objective(..., outputs=f, output_loss=l), or"
    ):
        _ = own(KFAC()).operator

    def f(params, example):
        return params["w"] @ example[0]

    def output_loss(output, example):
        return (output - example[1]) ** 2

    in_two = own(KFAC(), outputs=f, output_loss=output_loss)
    torch.testing.assert_close(in_two.operator.matrix(), own(Hessian()).operator.matrix())
    slopes = own(KFAC(of=EmpiricalFisher()))
    torch.testing.assert_close(slopes.operator.matrix(), own(EmpiricalFisher()).operator.matrix())


def test_a_loss_that_bends_down_in_the_output():
    def waves(output, target):
        return torch.cos(output - target).mean()

    with refused("is not convex in the model's output", "Use of=EmpiricalFisher(), or the curvature Hessian()"):
        matrix(KFAC(), regressor, loss=waves)
    values(regressor(loss=waves, curvature=KFAC(of=EmpiricalFisher())), y=ZQ[:, None])
    values(regressor(loss=waves, curvature=Hessian(), damping=10.0), y=ZQ[:, None])


def test_a_softmax_over_an_axis_of_the_output():
    labels = torch.arange(68).reshape(4, 17) % 60

    def pieces(output, target):
        return cross_entropy(output.reshape(-1, 60), target.reshape(-1))

    def over_an_axis(output, target):
        return torch.nn.functional.cross_entropy(output.transpose(1, 2), target)

    with refused("neither diagonal nor that of a cross-entropy", "Write the criterion as torch.nn.functional.cross_en"):
        _ = of_many(1020, labels, KFAC(samples=1), loss=pieces).operator
    influence = of_many(1020, labels, KFAC(samples=1), nn.Unflatten(1, (17, 60)), loss=over_an_axis)
    pi = probabilities(influence, 60)
    assert trace(influence, (1 - pi.square().sum(2)) / 17)
    slopes = of_many(1020, labels, KFAC(of=EmpiricalFisher()), loss=pieces)
    wrong = pi - nn.functional.one_hot(labels, 60)
    assert trace(slopes, wrong.square().sum(2) / 17**2)


# ---- cut.py ----------------------------------------------------------------------------------------------------------


class Ending(nn.Module):
    """Logits, and an end."""

    def __init__(self, end):
        super().__init__()
        self.linear, self.end = seeded(lambda: nn.Linear(D, 2).double()), end

    def forward(self, x):
        return self.end(self.linear(x))


def test_a_module_that_ends_in_one_way_or_another():
    def either(f):
        return f.log_softmax(1) if float(f.detach()[0, 0]) > 0 else f.softmax(1).log()

    with refused(" ends in other functions for other examples", "Use curvature=Hessian() or EmpiricalFisher()"):
        classifier(Ending(either), loss=nll_loss).on_loss(XQ, YQ)
    for given in (Hessian(), EmpiricalFisher()):
        found = values(classifier(Ending(either), loss=nll_loss, curvature=given))
        np.testing.assert_allclose(found, values(classifier(Ending(nn.Identity()), curvature=given)), rtol=1e-6)


def test_a_module_that_ends_in_a_logarithm_that_is_not_seen():
    def unseen(f):
        return torch.stack([line.log_softmax(0) for line in f])

    with refused("is linear in what the module returns", "Let it return what goes into that, with torch.nn.functional"):
        classifier(Ending(unseen), loss=nll_loss).on_loss(XQ, YQ)
    values(classifier(Ending(nn.Identity()), loss=torch.nn.functional.cross_entropy))
    for given in (uw.operators.Hessian(), uw.operators.EmpiricalFisher()):
        found = values(classifier(Ending(unseen), loss=nll_loss, curvature=given))
        np.testing.assert_allclose(found, values(classifier(Ending(nn.Identity()), curvature=given)), rtol=1e-6)


def hinge(f, y):
    return torch.relu(1 - (2 * y - 1) * f[:, 0]).mean()


def bent_hinge(f, y, t=0.1):
    return t * softplus((1 - (2 * y - 1) * f[:, 0]) / t).mean()


def pinball(f, y):
    return (0.3 * (y - f) + torch.relu(f - y)).mean()


def bent_pinball(f, y, t=0.1):
    return (0.3 * (y - f) + t * softplus((f - y) / t)).mean()


@pytest.mark.parametrize(
    ("kinked", "bent"),
    [(l1_loss, [huber_loss, smooth_l1_loss]), (hinge, [bent_hinge]), (pinball, [bent_pinball])],
    ids=["absolute error", "hinge", "pinball"],
)
def test_a_criterion_that_bends_at_its_kinks_only(kinked, bent):
    def explained(loss, **settings):
        return regressor(y=Y if kinked is hinge else Z[:, None], loss=loss, **settings)

    labels = YQ if kinked is hinge else ZQ[:, None]
    with refused(
        "This is so for absolute errors, pinball and hinge losses", "Train and explain with a loss that bends: "
    ):
        explained(kinked).on_loss(XQ, labels)
    with refused(
        "This is so for absolute errors, pinball and hinge losses", "Train and explain with a loss that bends: "
    ):
        explained(kinked, curvature=Hessian()).on_loss(XQ, labels)
    for loss in bent:
        values(explained(loss), y=labels)
    values(explained(kinked, curvature=uw.operators.EmpiricalFisher()), y=labels)


# ---- dense.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [Hessian, "hessian"])
def test_what_is_written_out_is_a_curvature(wrong, unchecked):
    with refused(" is not a curvature", "Pass an object, such as Dense(Hessian())"):
        _ = classifier(curvature=Dense(wrong)).operator
    torch.testing.assert_close(matrix(Dense(Hessian())), matrix(Hessian()))


# ---- implicit.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 2.5, True])
def test_what_is_kept_is_a_number_of_bytes(wrong, unchecked):
    with refused("keep=", "It is a number of bytes ≥ 0, such as 2**31; 0 keeps nothing"):
        GaussNewton(keep=wrong)
    torch.testing.assert_close(matrix(GaussNewton(keep=2**31)), matrix(GaussNewton(keep=0)))


# ---- kronecker.py ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_kronecker_factors_are_those_of_outer_products(make, unchecked):
    with refused("Kronecker factors are known for means of outer products", "pass of=GaussNewton() or of=EmpiricalFis"):
        make(of=Hessian())
    values(classifier(curvature=make(of=GaussNewton())))
    values(classifier(curvature=make(of=EmpiricalFisher())))


def test_observed_targets_are_not_drawn():
    with refused("so nothing is drawn", "Leave samples out, or take of=GaussNewton()"):
        KFAC(of=EmpiricalFisher(), samples=2)
    values(classifier(curvature=KFAC(of=EmpiricalFisher())))
    values(classifier(curvature=KFAC(of=GaussNewton(), samples=2)))


def test_parameters_in_no_layer_keep_their_diagonal():
    wide = np.random.default_rng(0).normal(size=(40, 600)) / 5

    def explained(curvature, **settings):
        def f(params, example):
            return params["w"] @ example[0]

        def output_loss(output, example):
            return (output - example[1]) ** 2

        objective = uw.Objective(
            lambda params, example: output_loss(f(params, example), example),
            {"w": torch.zeros(600, dtype=torch.float64)},
            penalty=0.5,
            outputs=f,
            output_loss=output_loss,
        )
        return uw.Influence(objective, (wide, Z), curvature=curvature, damping=0.0, **settings)

    with warned("act in no layer that has Kronecker factors", "Use GaussNewton() with CG(), or Nystroem(rank)"):
        _ = explained(KFAC()).operator
    truth = values(explained(Hessian()), wide[:4], ZQ)
    for found in (explained(GaussNewton(), solver=CG()), explained(Nystroem(40))):
        np.testing.assert_allclose(values(found, wide[:4], ZQ), truth, rtol=1e-3, atol=1e-6)


def test_factors_that_overflow_in_single_precision():
    module = net(dtype=torch.float32)
    with torch.no_grad():
        module[0].weight.fill_(1e-30)
        module[0].bias.fill_(1e25)
        module[1] = nn.Identity()
        module[2].weight.fill_(1e-25)

    def explained(**settings):
        objective = uw.Objective.from_module(module, cross_entropy, **settings)
        return uw.Influence(objective, (X.astype(np.float32), Y), curvature=KFAC()).operator

    with refused(
        " are NaN or infinite. Usual reasons: weights that diverged", "Look at that layer's weights and inputs"
    ):
        explained()
    assert bool(torch.isfinite(explained(dtype=torch.float64).matrix()).all())


def test_a_penalty_that_couples_parameters():
    def of_a_sum(params):
        return 0.05 * params["2.weight"].sum() ** 2

    with refused(" couples parameters", "Use a float, L2(...), or GaussNewton() with an iterative solver"):
        matrix(KFAC(), penalty=of_a_sum)
    torch.testing.assert_close(
        matrix(KFAC(), penalty=0.1), matrix(KFAC(), penalty=uw.L2(dict.fromkeys(classifier().objective.blocks, 0.1)))
    )
    truth = values(classifier(penalty=of_a_sum, curvature=GaussNewton(), damping=0.1))
    found = values(classifier(penalty=of_a_sum, curvature=GaussNewton(), damping=0.1, solver=CG()))
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-6)


# ---- lowrank.py ------------------------------------------------------------------------------------------------------


def test_as_many_steps_as_directions():
    with refused(" steps find no more directions", "Pass steps ≥ "):
        Arnoldi(rank=5, steps=3)
    exact = torch.linalg.eigvalsh(matrix(GaussNewton()))[-5:].flip(0)
    for steps in (None, 26):
        found = classifier(curvature=Arnoldi(rank=5, of=GaussNewton(), steps=steps)).operator
        torch.testing.assert_close(found.values + found.complement, exact)
    assert len(classifier(curvature=Arnoldi(rank=5, of=GaussNewton(), steps=5)).operator.values) == 5


@pytest.mark.parametrize("make", [Nystroem, Arnoldi])
def test_what_is_approximated_is_a_curvature(make, unchecked):
    with refused(" is no curvature", "Pass an object, such as "):
        make(100, of="gauss-newton")
    torch.testing.assert_close(matrix(make(100, of=GaussNewton())), matrix(GaussNewton()))


def test_an_approximation_that_meets_negative_curvature():
    with refused(
        ", and Nyström's approximation needs none below it", "Use of=GaussNewton(), which is positive, or Arno"
    ):
        matrix(Nystroem(26, of=Hessian()))
    torch.testing.assert_close(matrix(Nystroem(26, of=GaussNewton())), matrix(GaussNewton()))
    torch.testing.assert_close(matrix(Arnoldi(26, of=Hessian())), matrix(Hessian()))
    values(classifier(curvature=Arnoldi(26, of=Hessian()), damping=1.0))


# ---- uses.py ---------------------------------------------------------------------------------------------------------


class Either(nn.Module):
    """The same product in two ways."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 4, bias=False)

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids) * attention_mask[..., None]
        return (self.out(h) if input_ids.shape[1] > 4 else h @ self.out.weight.T).transpose(1, 2)


def test_rows_of_some_lengths_take_another_way():
    rows = [{"input_ids": [1, 2, 3, 4, 0, 1][:size], "labels": [0, 1, 2, 3, 0, 1][:size]} for size in (3, 6, 2, 5)]
    model = Either().double()
    settings = {"loss": nn.CrossEntropyLoss(), "damping": 0.1, "batch_size": 1}
    with refused("uses its parameters in another way on rows of the shapes", "Use curvature=GaussNewton()"):
        uw.explain(model, rows, curvature=EKFAC(), **settings).on_loss(rows[:2])
    assert np.isfinite(uw.explain(model, rows, curvature=GaussNewton(), **settings).on_loss(rows[:2]).values).all()
    alike = [{name: part * 3 for name, part in rows[0].items()}] * 2 + [rows[1]] * 2
    same = [{name: part[:6] for name, part in row.items()} for row in alike]
    assert uw.explain(model, same, curvature=EKFAC(), **settings).on_loss(same[:1]).values.shape == (1, 4)


def test_blocks_that_are_on_ranks_that_do_not_come():
    """A rank whose job has ended, as it is left with its own blocks; tests/ranks has the others of the reasons."""

    def explained():
        return classifier(
            seeded(lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)).double()), curvature=KFAC()
        )

    operator, V = explained().operator, torch.ones(1, 4 * (D + 1) + 10, dtype=torch.float64)
    whole, product = operator.held, operator.apply(V)
    operator.held = Held({0: whole.own[0]}, whole.at, [0, 1])
    for ask in (lambda: operator.apply(V), lambda: operator.bases):
        with refused(" blocks of this curvature are on other ranks, ", "Make the call on all ranks, outside of sweeps"):
            ask()
        again = explained().operator
        assert torch.equal(again.apply(V), product)
        with again.here():
            assert len(again.bases) == 2


def test_factors_that_are_larger_than_the_budget():
    def explained(curvature, budget):
        model = seeded(lambda: nn.Sequential(nn.Linear(D, 60), nn.Tanh(), nn.Linear(60, 2)).double())
        return classifier(model, curvature=curvature, memory_budget=budget, damping=0.1)

    with refused("while they are made (widest:", "Use ") as told:
        values(explained(EKFAC(), "100 kB"))
    advice = str(told.value).split("Use ")[1]
    rank = int(advice.split("operators.Nystroem(")[1].split(")")[0])
    values(explained(Nystroem(rank), "100 kB"))
    values(explained(EKFAC(), advice.split("memory_budget='")[1].split("'")[0]))
