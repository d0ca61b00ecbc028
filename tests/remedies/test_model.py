"""What is said to type by upweight/model, typed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, multi_margin_loss
from torch.optim import SGD

import upweight as uw
from refusals import refused
from small import (
    XQ,
    YQ,
    ZQ,
    D,
    N,
    X,
    Y,
    Z,
    changed,
    classifier,
    fitted,
    net,
    regressor,
    ridge,
    seeded,
)
from upweight import losses
from upweight.operators import GaussNewton, Hessian

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:.*is not at a minimum:upweight.errors.TheoryWarning")
WORDS = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (N, 2)))
THETA = torch.tensor([0.5, -0.4, 0.3], dtype=torch.float64)


def values(influence, x=XQ, y=YQ):
    """What it says of the queries, with every number finite and not all of them 0."""
    found = influence.on_loss(x, y).values
    assert found.shape == (len(x), N)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0
    return found


@cache
def usual():
    """What the network of these tests says."""
    return values(classifier())


def same(influence, other, x=XQ, y=YQ):
    """Whether it says of the queries what the other does, or what it said."""
    known = values(other, x, y) if isinstance(other, uw.Influence) else other
    np.testing.assert_allclose(values(influence, x, y), known, rtol=1e-6, atol=1e-12)
    return True


def squared_error(params, example):
    return (params @ example[0] - example[1]) ** 2


def own(loss=squared_error, params=THETA, y=Z, penalty=0.1, curvature=None, **settings):
    """The influence of a loss of one's own; a model of least squares where nothing else is said."""
    return uw.Influence(uw.Objective(loss, params, penalty=penalty, **settings), (X, y), curvature=curvature)


class Behind(nn.Module):
    """A linear layer, and a function of what it gives."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(D, 2).double(), function

    def forward(self, x):
        return self.function(self.linear(x))


def behind(function):
    return seeded(lambda: Behind(function)).eval()


def words(**settings):
    """A network whose rows are two words each."""

    def build():
        return nn.Sequential(nn.Embedding(6, 3, **settings), nn.Flatten(), nn.Linear(6, 2)).double().eval()

    return seeded(build)


def read(model):
    return classifier(model, X=WORDS)


def normed(layer):
    return seeded(lambda: nn.Sequential(nn.Linear(D, 4), layer, nn.Tanh(), nn.Linear(4, 2))).double().eval()


# ---- calculus.py -----------------------------------------------------------------------------------------------------


def test_words_cannot_move_a_little_and_their_embeddings_can():
    with refused("only floating-point inputs can be moved by a small amount", "Explain the embedded"):
        read(words()).of_perturbing([0, 1], on=(WORDS[:4], YQ))
    embedded = words()[0](WORDS).detach()
    found = classifier(words()[1:], X=embedded).of_perturbing([0, 1], on=(embedded[:4], YQ))
    assert found.shape == (4, 2, 2, 3)
    assert np.isfinite(found).all()


def test_a_penalty_is_a_function_of_the_parameters_by_their_names():
    with refused("The penalty failed: ", "It is called as penalty(params), with params as in the Objective: "):
        values(classifier(penalty=lambda params: params["nose"].square().sum()))
    influence = classifier(penalty=lambda params: 0.05 * sum(params[name].square().sum() for name in params))
    assert same(influence, usual())


def test_a_penalty_is_one_number():
    with refused("The penalty returned ", "it must return one number, a tensor of shape (), computed from params"):
        values(classifier(penalty=lambda params: params["2.bias"] ** 2))
    with refused("The penalty returned ", "it must return one number, a tensor of shape (), computed from params"):
        values(classifier(penalty=lambda params: 0.3))
    one = classifier(penalty=lambda params: 0.05 * (params["2.bias"] ** 2).sum())
    assert same(one, classifier(penalty=uw.L2({"2.bias": 0.1})))


def test_a_penalty_with_a_logarithm_of_nothing():
    def entropy(params):
        p = params["2.bias"].softmax(0).round()
        return (p * p.log()).sum()

    def safe(params):
        p = params["2.bias"].softmax(0)
        return (p * p.log()).sum()

    with refused(" at the fitted parameters", "Check it for log(0) or 0/0"):
        values(classifier(penalty=entropy))
    values(classifier(penalty=safe))


def test_gauss_newton_of_a_loss_in_one_step():
    with refused(
        "Gauss–Newton needs the model's output apart from its loss", "Pass Objective(..., outputs=f, output_loss="
    ):
        values(own(curvature=GaussNewton()), y=ZQ)

    def f(params, example):
        return params @ example[0]

    def output_loss(output, example):
        return (output - example[1]) ** 2

    in_two = own(
        lambda params, example: output_loss(f(params, example), example),
        outputs=f,
        output_loss=output_loss,
        curvature=GaussNewton(),
    )
    torch.testing.assert_close(in_two.operator.matrix(), own(curvature=Hessian()).operator.matrix())
    values(in_two, y=ZQ)
    values(own(curvature=Hessian()), y=ZQ)


# ---- encoders.py -----------------------------------------------------------------------------------------------------


def test_examples_hold_everything():
    rows = uw.Examples(X, Y)
    with refused("X is Examples, which hold their own targets, weights and names", "Omit it."):
        classifier(X=rows, y=Y)
    with refused("X is Examples, which hold their own targets, weights and names", "Omit it."):
        classifier(X=rows, y=None, sample_weight=np.ones(N))
    with refused("X is Examples, which hold their own targets, weights and names", "Omit it."):
        classifier(X=rows, y=None, ids=range(N))
    assert same(classifier(X=rows, y=None), usual())


def test_examples_are_no_triple():
    objective = ridge().objective
    with refused("examples is a tuple of ", "Pass the pair (X, y), Examples, a Dataset, or X alone"):
        uw.Influence(objective, (X, Z, np.ones(N)))
    assert same(uw.Influence(objective, (X, Z)), uw.Influence(objective, uw.Examples(X, Z)), y=ZQ)


# ---- linear.py -------------------------------------------------------------------------------------------------------


def test_a_linear_predictor_needs_targets():
    with refused(" needs examples (x, y), and these have no y", "Pass the targets too: (X, y)"):
        uw.Influence(ridge().objective, X).of_self()
    np.testing.assert_allclose(uw.Influence(ridge().objective, (X, Z)).of_self().values, ridge().of_self().values)


def test_a_linear_predictor_gets_the_inputs_of_fit():
    wide = np.hstack([X, X**2])
    model = fitted("ridge").__class__(alpha=2.0).fit((wide - wide.mean(0))[:, :D], Z)
    objective = uw.explain(model, (wide - wide.mean(0))[:, :D], Z).objective
    with refused("X has rows of shape ", "Apply the same preprocessing as in fit()"):
        uw.Influence(objective, (wide, Z)).of_self()
    assert uw.Influence(objective, ((wide - wide.mean(0))[:, :D], Z)).check().ok


# ---- losses.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [losses.epsilon_insensitive, losses.squared_epsilon_insensitive])
def test_an_insensitive_zone_is_not_negative(make):
    with refused("epsilon is ", "Try 0.1, scikit-learn's value"):
        make(-0.1)
    assert float(make(0.1)(torch.tensor([0.3]), torch.tensor([0.25]))) == 0


def test_a_width_is_positive():
    eta, y = torch.tensor([3.0]), torch.tensor([0.0])
    with refused(", and must be a positive number", "Try "):
        losses.huber(0)
    assert float(losses.huber(1.0)(eta, y)) == 2.5
    with refused(", and must be a positive number", "Try "):
        losses.smooth_hinge(0)
    assert float(losses.smooth_hinge(0.001)(eta, y)) == pytest.approx(float(losses.hinge(eta, y))) == 4
    with refused(", and must be a positive number", "Try "):
        losses.smooth_epsilon_insensitive(0.1, t=0)
    assert float(losses.smooth_epsilon_insensitive(0.1, t=0.001)(eta, y)) == pytest.approx(2.9)


@pytest.mark.parametrize("power", [0.5, INF, "1.5"])
def test_a_power_of_which_there_is_no_distribution(power):
    with refused("tweedie: power is ", "Try 0, 1, 1.5, 2 or 3"):
        losses.tweedie(power)
    eta, y = torch.tensor([0.3], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    assert float(losses.tweedie(0, link="identity")(eta, y)) == float(losses.squared(eta, y))
    assert float(losses.tweedie(1)(eta, y)) == float(losses.poisson(eta, y))
    assert float(losses.tweedie(2)(eta, y)) == float(losses.gamma(eta, y))
    assert np.isfinite([float(losses.tweedie(p)(eta, y)) for p in (1.5, 3)]).all()


def test_a_link_has_one_of_two_names():
    eta, y = torch.tensor([0.3], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    with refused("tweedie: link is ", "Pass 'log' (η = log μ) or 'identity' (η = μ)"):
        losses.tweedie(1.5, link="logit")
    by_log, plain = losses.tweedie(1.5, link="log"), losses.tweedie(1.5, link="identity")
    assert float(by_log(eta, y)) == pytest.approx(float(plain(eta.exp(), y)))


# ---- modules.py ------------------------------------------------------------------------------------------------------


def test_gradients_by_how_often_a_word_is_in_the_batch():
    with refused("divides gradients by how often a word is in the batch", "Build it with scale_grad_by_freq=False"):
        read(words(scale_grad_by_freq=True))
    assert same(read(words(scale_grad_by_freq=False)), read(words()), WORDS[:4])


def test_an_embedding_that_shortens_its_rows():
    model = words(max_norm=1.0)
    with refused("shortens its rows in every forward pass", "Run the model once on its training inputs"):
        read(model)
    output = model(WORDS)
    model[0].max_norm = None
    values(read(model), WORDS[:4])
    torch.testing.assert_close(model(WORDS), output)


def test_an_embedding_with_sparse_gradients():
    model = words(sparse=True)
    with refused("gives its gradients as sparse tensors", "Write model.get_submodule("):
        read(model)
    model.get_submodule("0").sparse = False
    assert same(read(model), read(words()), WORDS[:4])


def test_a_normalisation_without_statistics_of_its_own():
    with refused("keeps no running statistics", "Use track_running_stats=True, or a GroupNorm"):
        classifier(normed(nn.BatchNorm1d(4, track_running_stats=False)))
    values(classifier(normed(nn.BatchNorm1d(4, track_running_stats=True))))
    values(classifier(normed(nn.GroupNorm(2, 4))))


def test_dropout_is_off_in_eval_mode():
    model = normed(nn.Dropout(0.5)).train()
    with refused("Dropout is active in ", "Call model.eval() first"):
        classifier(model)
    assert same(classifier(model.eval()), classifier(normed(nn.Identity())))


def test_a_normalisation_uses_its_running_statistics_in_eval_mode():
    model = normed(nn.BatchNorm1d(4)).train()
    with refused("is in training mode", "Call model.eval() first: it then uses its running statistics"):
        classifier(model)
    assert same(classifier(model.eval()), classifier(normed(nn.BatchNorm1d(4))))


class Listed(nn.Module):
    """Its layers are in a list, where torch does not find them unless the list is one of its own."""

    def __init__(self, keep):
        super().__init__()
        self.layers = keep(seeded(lambda: [nn.Linear(D, 4).double(), nn.Linear(4, 2).double()]))

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())


def test_a_module_without_parameters():
    advice = "Pass the module that was trained; one that keeps its layers in a list keeps them in an nn.ModuleList"
    with refused("has no parameters, so nothing was learned", "Pass the module that was trained"):
        classifier(Listed(list).eval())
    with refused("has no parameters, so nothing was learned", "Pass the module that was trained") as caught:
        classifier(nn.Tanh())
    assert advice in str(caught.value)
    assert classifier(Listed(nn.ModuleList).eval()).objective.size == 26
    values(classifier(Listed(nn.ModuleList).eval()))


def test_a_frozen_module_is_thawed_or_its_parameters_named():
    model = net().requires_grad_(False)
    with refused(" are frozen (requires_grad=False)", "Call requires_grad_(True) on what was trained, or name it: "):
        classifier(model)
    named = classifier(model, parameters=["2.weight", "2.bias"])
    model[2].requires_grad_(True)
    assert same(classifier(model), named)


def test_parameters_have_the_names_of_the_module():
    with refused("parameters ", "Name some of what it has: "):
        classifier(parameters=["nose"])
    with refused("parameters ", "Name some of what it has: "):
        classifier(parameters=lambda name: "nose" in name)
    assert classifier(parameters=["0.weight", "2.bias"]).objective.size == 14


# ---- objective.py ----------------------------------------------------------------------------------------------------


def test_a_row_takes_its_share_of_the_penalty_or_does_not():
    with refused("penalty_per_example=", "Pass True, False, or None for the default"):
        classifier(penalty_per_example="yes")
    with_share, without = values(classifier(penalty_per_example=True)), values(classifier(penalty_per_example=False))
    assert np.abs(with_share - without).max() > 1e-6
    np.testing.assert_array_equal(values(classifier(penalty_per_example=None)), with_share)


def test_a_penalty_that_is_no_strength_is_a_function():
    def down(params):
        return -0.05 * sum(block.square().sum() for block in params.values())

    with refused(
        "A number λ means (λ/2)‖θ‖² and must be finite and ≥ 0", "for anything else pass a function of params"
    ):
        classifier(penalty=-0.1)
    with refused(
        "A number λ means (λ/2)‖θ‖² and must be finite and ≥ 0", "for anything else pass a function of params"
    ):
        classifier(penalty=NAN)
    influence, free = classifier(penalty=down, damping=1.0), classifier(penalty=0.0, damping=0.1)
    torch.testing.assert_close(influence.operator.matrix(), free.operator.matrix() - 0.1 * torch.eye(26))
    values(influence)
    values(free)


def test_a_penalty_is_no_word():
    with refused("penalty is a ", "Pass a float λ for (λ/2)‖θ‖², a function of params, or None"):
        classifier(penalty="l2")
    assert same(classifier(penalty=0.1), usual())
    assert same(classifier(penalty=lambda params: 0.05 * sum(p.square().sum() for p in params.values())), usual())
    values(classifier(penalty=None))


def test_a_strength_is_that_of_a_parameter():
    with refused("L2 penalises '", "Name one of them"):
        classifier(penalty=uw.L2({"nose": 1.0}))
    values(classifier(penalty=uw.L2({"0.weight": 1.0})))


def test_a_strength_is_not_negative():
    with refused("L2 has the strength ", "Pass a finite λ ≥ 0"):
        classifier(penalty=uw.L2({"2.bias": -1.0}))
    values(classifier(penalty=uw.L2({"2.bias": 0.0})))


def test_a_tilt_is_that_of_a_parameter():
    with refused("L2 tilts '", "Name one of them"):
        classifier(penalty=uw.L2({"2.bias": 1.0}, {"nose": 1.0}))
    values(classifier(penalty=uw.L2({"2.bias": 1.0}, {"2.bias": 1.0})))


def test_a_tilt_is_finite():
    with refused("L2 tilts '", "Pass finite numbers"):
        classifier(penalty=uw.L2({"2.bias": 1.0}, {"2.bias": torch.tensor([1.0, INF])}))
    values(classifier(penalty=uw.L2({"2.bias": 1.0}, {"2.bias": torch.tensor([1.0, -1.0])})))


def test_what_l2_is_given_fits_the_block():
    with refused("What L2 gives '", "Pass one number, or a tensor of that shape"):
        classifier(penalty=uw.L2({"2.bias": torch.ones(7)}))
    assert same(
        classifier(penalty=uw.L2({"2.bias": 0.3})), classifier(penalty=uw.L2({"2.bias": torch.full((2,), 0.3)}))
    )
    with refused("What L2 gives '", "Pass one number, or a tensor of that shape"):
        classifier(penalty=uw.L2({}, {"2.bias": "much"}))
    one, several = uw.L2({"2.bias": 0.3}, {"2.bias": 0.2}), uw.L2({"2.bias": 0.3}, {"2.bias": torch.full((2,), 0.2)})
    assert same(classifier(penalty=one), classifier(penalty=several))


def test_parameters_are_tensors():
    with refused(", which is no tensor (", "Pass a dict of tensors"):
        uw.Objective(squared_error, {"w": "abc"})
    objective = uw.Objective(lambda params, z: squared_error(params["w"], z), {"w": THETA}, penalty=0.1)
    assert same(uw.Influence(objective, (X, Z)), own(), y=ZQ)


def test_parameters_have_fractions():
    whole = torch.tensor([1, -1, 0])
    with refused("only floating-point parameters can be differentiated", "Convert it with .double()"):
        uw.Objective(squared_error, whole)
    assert same(own(params=whole.double()), own(params=torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)), y=ZQ)


def test_training_that_diverged_is_done_again():
    def fit(lr):
        model = seeded(lambda: nn.Linear(D, 1).double())
        optimizer = SGD(model.parameters(), lr=lr)
        for _ in range(200):
            optimizer.zero_grad()
            mse_loss(model(torch.from_numpy(X)), torch.from_numpy(Z[:, None])).backward()
            optimizer.step()
        return model

    with refused(" NaN or infinite values: training diverged", "Refit the model before explaining it"):
        regressor(fit(lr=100.0))
    assert regressor(fit(lr=0.2), penalty=0).check().ok


def test_a_dict_of_parameters_holds_some():
    with refused("params is empty, so there is nothing to differentiate", "Pass the fitted parameters, by their names"):
        uw.Objective(squared_error, {})
    objective = uw.Objective(lambda params, z: squared_error(params["w"], z), {"w": THETA}, penalty=0.1)
    assert same(uw.Influence(objective, (X, Z)), own(), y=ZQ)


@pytest.mark.parametrize("nothing", [torch.zeros(0), {"w": torch.zeros(0), "b": torch.zeros(0, 2)}])
def test_parameters_have_elements(nothing):
    with refused(
        "params has no elements, so there is nothing to differentiate", "Pass a dict of tensors, or one tensor"
    ):
        uw.Objective(squared_error, nothing)
    values(own(params=THETA), y=ZQ)


# ---- routes.py -------------------------------------------------------------------------------------------------------


class Noisy(torch.autograd.Function):
    """Its derivative is another one every time."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return grad * (1 + 0.1 * torch.rand(()).to(grad))


def test_a_gradient_with_noise():
    model = behind(lambda f: Noisy.apply(f) if model.training else f).train()
    with refused("something in a backward pass is random", "call model.eval(), or leave the noise out of backward()"):
        classifier(model)
    assert same(classifier(model.eval()), classifier(behind(lambda f: f)))


def test_a_loss_is_that_of_one_example():
    def of_many(params, example):
        return ((example[0] * params).sum(1) - example[1]).square().mean()

    with refused("The loss failed on one example", "Write it as loss(params, example) of one example"):
        own(of_many)
    values(own(lambda params, example: ((example[0] * params).sum() - example[1]).square()), y=ZQ)
    with refused("The loss failed on one example", "that of a module as loss(output, target) of a batch, here of one"):
        classifier(loss=lambda params, example: cross_entropy(params @ example[0], example[1]))
    assert same(classifier(loss=lambda output, target: cross_entropy(output, target)), usual())


def test_a_derivative_inside_a_loss_is_that_of_torch_func():
    def penalised(slope):
        def loss(params, z):
            def output(x):
                return torch.tanh(params @ x)

            return (output(z[0]) - z[1]).square() + 0.1 * slope(output, z[0]).square().sum()

        return loss

    def recorded(output, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(output(x), x, create_graph=True)[0]

    with refused("It seems to call autograd.grad or backward() inside", "torch.func.grad(f)(x)"):
        own(penalised(recorded), penalty=3.0)
    found = values(own(penalised(lambda output, x: torch.func.grad(output)(x)), penalty=3.0), y=ZQ)

    def by_hand(params, z):
        t = torch.tanh(params @ z[0])
        return (t - z[1]).square() + 0.1 * ((1 - t**2) * params).square().sum()

    np.testing.assert_allclose(found, values(own(by_hand, penalty=3.0), y=ZQ), rtol=1e-8)


def test_a_loss_is_one_number():
    with refused(
        "it must be one number, a tensor of shape ()", "Sum or average inside the loss (criterion: reduction="
    ):
        classifier(loss=nn.CrossEntropyLoss(reduction="none"))
    assert same(classifier(loss=nn.CrossEntropyLoss(reduction="mean")), usual())
    with refused(
        "it must be one number, a tensor of shape ()", "Sum or average inside the loss (criterion: reduction="
    ):
        own(lambda params, example: (params * example[0] - example[1]) ** 2)
    values(own(lambda params, example: ((params * example[0] - example[1]) ** 2).sum()), y=ZQ)


def test_a_loss_of_log_0_is_clamped():
    def entropy(least):
        return lambda params, z: (
            -(torch.sigmoid(1e4 * (params @ z[0])) - z[1]).abs().neg().add(1).clamp(min=least).log()
        )

    with refused("Scores would be NaN", "so clamp inside the loss"):
        own(entropy(0.0), y=Y)
    own(entropy(1e-6), y=Y)


def test_a_label_that_a_function_ignores():
    y = changed(Y, 3, -100)
    with refused("Scores would be NaN", "pass the criterion itself, torch.nn.CrossEntropyLoss(), whose"):
        classifier(y=y, loss=lambda output, target: cross_entropy(output, target))
    with pytest.warns(uw.errors.TheoryWarning, match=r"does not count row\(s\) 3"):
        influence = classifier(y=y, loss=torch.nn.CrossEntropyLoss())
    assert not values(influence)[:, 3].any()


def test_a_loss_is_the_same_when_asked_again():
    model = behind(lambda f: f + 0.1 * torch.randn_like(f) if model.training else f).train()
    with refused("something in it is random", "call model.eval(), or fix the randomness inside the loss"):
        classifier(model)
    assert same(classifier(model.eval()), classifier(behind(lambda f: f)))
    with refused("something in it is random", "call model.eval(), or fix the randomness inside the loss"):
        own(lambda params, z: squared_error(nn.functional.dropout(params, 0.5), z))
    assert same(
        own(lambda params, z: squared_error(nn.functional.dropout(params, 0.5, training=False), z)), own(), y=ZQ
    )


def test_a_loss_depends_on_the_parameters():
    advice = "Compute it from `params` (not from the module's own weights), without detach() or no_grad()"
    model = net()
    state = {name: block.detach() for name, block in model.named_parameters()}
    with refused(" whatever the parameters are", "Compute it from `params`") as caught:
        own(lambda params, z: cross_entropy(model(z[0][None]), z[1][None]), state, y=Y)
    assert advice in str(caught.value)

    def from_params(params, z):
        return cross_entropy(torch.func.functional_call(model, params, (z[0][None],)), z[1][None])

    found = uw.Influence(uw.Objective(from_params, state, penalty=0.1, penalty_per_example=True), (X, Y), damping=1.0)
    assert same(found, classifier(curvature=Hessian(), damping=1.0))
    with refused(" whatever the parameters are", "Compute it from `params`"):
        classifier(loss=lambda output, target: cross_entropy(output.detach(), target))
    assert same(classifier(loss=lambda output, target: cross_entropy(output, target)), usual())


def test_a_loss_has_a_derivative():
    with refused("The loss has a value, and its derivative failed", "Use operations that torch differentiates"):
        own(lambda params, z: torch.special.gammaincc(params.abs().sum(), z[0].abs().sum()))
    values(own(lambda params, z: torch.special.gammaln(params.abs().sum() + z[0].abs().sum())), y=ZQ)


class Once(torch.autograd.Function):
    """A square whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_a_loss_that_is_differentiable_only_once():
    with refused("a part of it is differentiable only once", "Use operations with a second derivative, or a smoothed"):
        classifier(behind(Once.apply))
    values(classifier(behind(torch.square)))
    values(own(lambda params, z: losses.smooth_hinge(0.1)((params @ z[0])[None], z[1]), y=Y))


class Halfway(torch.autograd.Function):
    """A square whose backward() leaves torch for a part of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.detached = x.detach()
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.detached * grad


class Whole(Halfway):
    """The same square, in operations of torch on saved tensors."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_second_derivatives_that_lack_a_part():
    def through(square):
        return own(lambda params, z: (square(params @ z[0]) - z[1]) ** 2)

    with refused(
        "are not the slope of its first", "Write backward() with operations of torch on saved tensors, or use"
    ):
        through(Halfway.apply)
    truth = through(torch.square)
    torch.testing.assert_close(through(Whole.apply).operator.matrix(), truth.operator.matrix())


def test_a_bag_of_embeddings_is_a_mean_of_them():
    class Words(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.table, self.head = kind(6, 3), nn.Linear(3, 2)

        def forward(self, x):
            found = self.table(x)
            return self.head(found if found.ndim == 2 else found.mean(1))

    def explained(kind):
        return read(seeded(lambda: Words(kind)).double().eval())

    with refused(
        "The loss cannot be differentiated twice (", "nn.Embedding and a mean over its positions instead of nn."
    ):
        explained(nn.EmbeddingBag)
    values(explained(nn.Embedding), WORDS[:4])


def test_a_margin_without_second_derivatives():
    def written(output, target):
        own = output.gather(1, target[:, None])
        others = (1 - own + output).clamp(min=0).square().scatter(1, target[:, None], 0.0)
        return others.sum() / output.numel()

    twice = "operations with a second derivative, or a smoothed loss such as losses.smooth_hinge(0.1)"
    with refused("The loss cannot be differentiated twice (", "operations with a second derivative") as caught:
        classifier(loss=lambda output, target: multi_margin_loss(output, target, p=2))
    assert twice in str(caught.value)
    values(classifier(loss=written))
    output, target = net()(torch.from_numpy(X)), torch.from_numpy(Y)
    torch.testing.assert_close(written(output, target), multi_margin_loss(output, target, p=2))
    values(classifier(net(1), loss=lambda f, y: losses.smooth_hinge(0.1).value(f, y).mean()))


# ---- sweep.py --------------------------------------------------------------------------------------------------------


def test_a_row_that_the_model_cannot_read():
    with refused(": the loss failed on rows ", "Correct these rows, or leave them out"):
        classifier().on_loss(XQ, YQ + 3)
    with refused(": the loss failed on rows ", "Correct these rows, or leave them out"):
        classifier().on_loss(XQ[:, :2], YQ)
    values(classifier())


def test_rows_whose_loss_overflows_are_left_out_or_clamped():
    far = changed(X, (20, 0), 800.0)
    theta = torch.tensor([1.0, 0.1, 0.1], dtype=torch.float64)

    def growing(most):
        return lambda params, z: (params @ z[0]).clamp(max=most).exp() - z[1] * (params @ z[0])

    def influence(x, y, most=INF):
        return uw.Influence(uw.Objective(growing(most), theta, penalty=0.1), (x, y))

    with refused(
        " NaN or infinite. Usual reasons: a label that the loss ignores", "Leave such rows out, or clamp inside"
    ):
        influence(far, Y).on_loss(XQ, YQ)
    kept = np.delete(np.arange(N), 20)
    assert np.isfinite(influence(far[kept], Y[kept]).on_loss(XQ, YQ).values).all()
    values(influence(far, Y, most=50.0))


# ---- transforms.py ---------------------------------------------------------------------------------------------------


def test_nothing_is_differentiated_in_inference_mode():
    with torch.inference_mode(), refused("which torch.inference_mode() forbids", "Leave it first"):
        classifier()
    influence, kept = classifier(), own()
    with torch.inference_mode(), refused("which torch.inference_mode() forbids", "Leave it first"):
        influence.on_loss(XQ, YQ)
    with torch.inference_mode(), refused("which torch.inference_mode() forbids", "Leave it first"):
        kept.on_loss(XQ, ZQ)
    assert same(influence, usual())
    assert same(kept, own(), y=ZQ)


def test_strengths_of_a_penalty_have_names():
    with refused("takes a strength for each block by its name", "Name the blocks, as in L2({'weight': 0.01})"):
        uw.L2(0.01)
    model = torch.nn.Linear(3, 2).double()
    named = uw.L2({"weight": 0.01, "bias": 0.01})
    one, other = (
        uw.explain(model, X, Y, loss=torch.nn.functional.cross_entropy, penalty=penalty).on_loss(XQ, YQ).values
        for penalty in (named, 0.01)
    )
    np.testing.assert_allclose(one, other, rtol=1e-9)
