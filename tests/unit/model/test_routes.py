"""The probe takes the fastest way that gives right answers, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

import upweight as uw
from small import N, X, Y, Z, classifier, logistic, refuses
from upweight.model import routes
from upweight.model.objective import Route

THETA = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
BATCH = (torch.tensor(X[:4]), torch.tensor(Z[:4]))


def smooth(params, example):
    return torch.cosh(params @ example[0] - example[1])


def branching(params, example):
    return smooth(params, example) * (2 if example[0].sum() > 0 else 1)


def converting(params, example):
    return smooth(params, example) * float(example[1])


class Coarse(torch.nn.Module):
    """Computes in float32 inside, as the norms of language models do, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(3, 64), torch.nn.Linear(64, 1)

    def forward(self, x):
        h = self.inner(x).float()
        return self.outer((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def probed(loss):
    return routes.probe(uw.Objective(loss, THETA), BATCH).route


def test_an_ordinary_loss_goes_the_fast_way():
    assert probed(smooth) == Route("vmap", "batched", "")


def test_a_model_that_computes_in_less_than_its_precision_goes_the_fast_way():
    torch.manual_seed(0)
    model = Coarse().double()
    influence = uw.explain(model, torch.tensor(X), torch.tensor(Z)[:, None], loss=torch.nn.functional.mse_loss)
    assert influence.objective.reference.dtype == torch.float64
    assert influence.objective.route.examples == "vmap"


@pytest.mark.parametrize("loss", [branching, converting])
def test_what_vmap_cannot_follow_goes_one_by_one_and_says_why(loss):
    route = probed(loss)
    assert route.examples == "loop"
    assert route.reason.startswith("vmap or batched backward refused: ")
    assert route.reason in repr(route)


def test_a_loss_that_vmap_gets_wrong_goes_one_by_one():
    def by_rank(params, example):
        return smooth(params, example) * (1 if torch._C._functorch.maybe_current_level() is None else 2)

    route = probed(by_rank)
    assert route.examples == "loop"
    assert "differ" in route.reason


def test_every_way_gives_the_same_answers():
    objective = uw.Objective(smooth, THETA)
    answers = [
        routes._answers(uw.Objective(smooth, THETA, route=Route(examples, vectors)), BATCH)
        for examples in ("vmap", "loop")
        for vectors in ("batched", "loop")
    ]
    for found in answers:
        assert routes._agree(found, answers[0], 1e-8)
    assert objective.route == Route()


def test_a_state_between_examples_is_refused():
    memory = []

    def remembering(params, example):
        memory.append(1)
        return smooth(params, example) * len(memory)

    refuses(lambda: probed(remembering), RuntimeError, "was .* and then")


def test_a_linear_predictor_needs_no_probe():
    influence = logistic()
    assert routes.probe(influence.objective, None) is influence.objective
    assert influence.objective.autograd == "closed form of a linear predictor"


def test_a_linear_loss_has_no_curvature_and_is_no_error():
    def dot(params, example):
        return params @ example[0]

    influence = uw.Influence(uw.Objective(dot, THETA, penalty=0.5), (X, Z))
    assert influence.objective.route.examples == "vmap"
    assert torch.allclose(influence.operator.matrix(), 0.5 * torch.eye(3, dtype=torch.float64))


def test_parameters_that_the_loss_does_not_use_have_no_gradient():
    def first(params, example):
        return (params["used"] @ example[0] - example[1]) ** 2

    params = {"unused": torch.ones(2, dtype=torch.float64), "used": THETA}
    influence = uw.Influence(uw.Objective(first, params, penalty=0.1), (X, Z), curvature=uw.operators.Hessian())
    with pytest.warns(uw.errors.TheoryWarning, match="not at a minimum"):
        moves = influence.on_params([0, 1])
    assert not moves[:, :2].any()
    assert moves[:, 2:].all()


def test_the_probe_restores_the_random_state():
    state = torch.get_rng_state()
    refuses(lambda: probed(lambda p, z: smooth(p, z) + torch.rand(())), RuntimeError, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_way_shows_in_check_and_repr():
    influence = uw.Influence(uw.Objective(branching, THETA, penalty=0.1), (X, Z), damping=5.0)
    with pytest.warns(uw.errors.TheoryWarning):
        influence.on_params([0])
    assert "loop over examples" in influence.check().autograd
    assert "loop over examples" in repr(influence)
    assert classifier().check().autograd == "vmap over examples, batched over vectors"


def test_a_measure_is_probed_too():
    influence = classifier()
    refuses(lambda: influence.on_measure(lambda p, z: p["0.bias"], X[:2], Y[:2]), ValueError, r"shape \(4,\)")
    refuses(lambda: influence.on_measure(lambda p, z: z[0].sum(), X[:2], Y[:2]), ValueError, "whatever")

    def margin(params, example):
        return (params["2.weight"].sum(1) * example[0][0])[example[1]] if example[0][0] > 0 else params["2.bias"][0]

    assert influence.on_measure(margin, X[:3], Y[:3]).values.shape == (3, N)
