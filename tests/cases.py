"""The models that every law is tested on: small, float64, at their minimum unless they say otherwise.

`make(name, folded=…)` returns a Case: the Objective as a user would write it, and the same training problem written
out for the oracles. Two cases go through scikit-learn estimators, so that the closed forms face the same laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, softplus

import upweight as uw
from oracles import Problem, argmin

Split = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Model:
    """A loss in two steps on named parameters, with its data."""

    output: Callable[[dict[str, Tensor], Tensor], Tensor]
    output_loss: Callable[[Tensor, Tensor], Tensor]
    shapes: dict[str, tuple[int, ...]]
    X: Tensor
    y: Tensor
    strength: float
    penalised: tuple[str, ...]
    estimator: Callable[[], object] | None = None

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        pieces = theta.split(sizes)
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: Model
    problem: Problem
    theta: Tensor
    Xq: Tensor
    yq: Tensor

    @property
    def X(self) -> Tensor:
        return self.problem.X

    @property
    def y(self) -> Tensor:
        return self.problem.y

    @property
    def n(self) -> int:
        return len(self.X)

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.Xq, self.yq

    def objective(self, *, as_one_function: bool = False, theta: Tensor | None = None) -> uw.Objective:
        """The Objective as a user writes it: a loss on named parameters, or the same in two steps."""
        model = self.model

        def outputs(params, example):
            return model.output(params, example[0])

        def output_loss(f, example):
            return model.output_loss(f, example[1])

        return uw.Objective(
            lambda params, example: output_loss(outputs(params, example), example),
            model.split((self.theta if theta is None else theta).clone()),
            penalty=uw.L2({name: model.strength for name in model.penalised}) if model.strength else None,
            penalty_per_example=self.problem.folded,
            outputs=None if as_one_function else outputs,
            output_loss=None if as_one_function else output_loss,
        )

    def influence(self, *, curvature=None, **settings) -> uw.Influence:
        """The Influence; exact Hessian unless told. Estimator cases go through `explain`."""
        curvature = curvature or uw.operators.Hessian()
        weights = self.problem.weights.numpy()
        if self.model.estimator is not None:
            fitted = self.model.estimator(self.model.split(self.theta))
            settings = {"sample_weight": weights, "penalty_per_example": self.problem.folded} | settings
            return uw.explain(fitted, self.X.numpy(), self.y.numpy(), curvature=curvature, **settings)
        examples = uw.Examples(self.X, self.y, sample_weight=weights)
        return uw.Influence(self.objective(), examples, curvature=curvature, **settings)

    def query_loss(self, theta: Tensor) -> Tensor:
        return torch.stack([self.problem.loss(theta, x, y) for x, y in zip(self.Xq, self.yq, strict=True)])


def make(name: str, *, folded: bool = False, weighted: bool = False) -> Case:
    return _make(name, folded, weighted)


@cache
def _make(name: str, folded: bool, weighted: bool) -> Case:
    model = MODELS[name]()
    draw = torch.Generator().manual_seed(3)
    n_queries = 4
    X, y, Xq, yq = model.X[:-n_queries], model.y[:-n_queries], model.X[-n_queries:], model.y[-n_queries:]
    weights = (
        torch.rand(len(X), generator=draw, dtype=torch.float64) * 1.5 + 0.5
        if weighted
        else torch.ones(len(X), dtype=torch.float64)
    )

    def loss(theta, x, y):
        return model.output_loss(model.output(model.split(theta), x), y)

    def penalty(theta):
        params = model.split(theta)
        return model.strength / 2 * sum((params[name] ** 2).sum() for name in model.penalised)

    start = torch.randn(model.size, generator=draw, dtype=torch.float64) / 4
    problem = Problem(loss, penalty if model.strength else None, X, y, weights, start, folded)
    return Case(name, model, problem, argmin(problem), Xq, yq)


def _data(n: int, d: int, seed: int) -> tuple[Tensor, torch.Generator]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64), draw


def _affine(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return params["coef"] @ x + params["intercept"]


def _binary(eta: Tensor, y: Tensor) -> Tensor:
    return softplus(-(2 * y.to(eta.dtype) - 1) * eta[0], threshold=50.0)


def _logistic(estimator=None) -> Model:
    X, draw = _data(44, 4, 0)
    y = (
        X @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
        + torch.randn(44, generator=draw, dtype=torch.float64)
        > 0
    ).long()
    return Model(_affine, _binary, {"coef": (1, 4), "intercept": (1,)}, X, y, 0.05, ("coef",), estimator)


def _softmax(estimator=None) -> Model:
    X, draw = _data(49, 3, 1)
    y = (
        X @ torch.randn(3, 3, generator=draw, dtype=torch.float64)
        + torch.randn(49, 3, generator=draw, dtype=torch.float64)
    ).argmax(1)
    shapes = {"coef": (3, 3), "intercept": (3,)}
    # a common shift of free intercepts changes nothing; the oracle needs one minimum, so it penalises them too
    penalised = ("coef",) if estimator else ("coef", "intercept")
    return Model(_affine, lambda eta, y: cross_entropy(eta, y), shapes, X, y, 0.08, penalised, estimator)


def _ridge() -> Model:
    X, draw = _data(34, 5, 2)
    y = X @ torch.randn(5, generator=draw, dtype=torch.float64) + torch.randn(34, generator=draw, dtype=torch.float64)
    return Model(_affine, lambda eta, y: (eta[0] - y) ** 2, {"coef": (1, 5), "intercept": (1,)}, X, y, 0.1, ("coef",))


def _smooth_hinge() -> Model:
    X, draw = _data(44, 3, 4)
    y = (X[:, 0] - X[:, 1] + torch.randn(44, generator=draw, dtype=torch.float64) > 0).long()

    def value(eta, y):
        return 0.3 * softplus((1 - (2 * y.to(eta.dtype) - 1) * eta[0]) / 0.3, threshold=50.0)

    return Model(_affine, value, {"coef": (1, 3), "intercept": (1,)}, X, y, 0.1, ("coef", "intercept"))


def _mlp() -> Model:
    X, draw = _data(34, 3, 5)
    y = torch.sin(X[:, 0]) + 0.3 * X[:, 1] + 0.2 * torch.randn(34, generator=draw, dtype=torch.float64)
    shapes = {"w1": (4, 3), "b1": (4,), "w2": (1, 4), "b2": (1,)}

    def output(params, x):
        return params["w2"] @ torch.tanh(params["w1"] @ x + params["b1"]) + params["b2"]

    return Model(output, lambda f, y: (f[0] - y) ** 2, shapes, X, y, 0.1, tuple(shapes))


def _cnn() -> Model:
    draw = torch.Generator().manual_seed(6)
    X = torch.randn(28, 1, 5, 5, generator=draw, dtype=torch.float64)
    y = (X[:, 0, :2].mean((1, 2)) > X[:, 0, 3:].mean((1, 2))).long()
    shapes = {"kernel": (2, 1, 3, 3), "bias": (2,), "head": (2, 2), "head_bias": (2,)}

    def output(params, x):
        hidden = torch.tanh(conv2d(x[None], params["kernel"], params["bias"])).mean((2, 3))[0]
        return params["head"] @ hidden + params["head_bias"]

    return Model(output, lambda f, y: cross_entropy(f, y), shapes, X, y, 0.1, tuple(shapes))


def _sklearn_logistic(params: dict[str, Tensor]) -> object:
    """A LogisticRegression that says it was fitted to these parameters: the oracle's minimum, not lbfgs's."""
    from sklearn.linear_model import LogisticRegression

    K = len(params["intercept"])
    model = _logistic() if K == 1 else _softmax(True)
    n = len(model.X) - 4
    fitted = LogisticRegression(C=1 / (model.strength * n), tol=1e-10, max_iter=5000)
    fitted.fit(model.X[:-4].numpy(), model.y[:-4].numpy())
    fitted.coef_, fitted.intercept_ = params["coef"].numpy().copy(), params["intercept"].numpy().copy()
    return fitted


MODELS: dict[str, Callable[[], Model]] = {
    "logistic": _logistic,
    "softmax": _softmax,
    "ridge": _ridge,
    "smooth_hinge": _smooth_hinge,
    "mlp": _mlp,
    "cnn": _cnn,
    "sklearn_logistic": lambda: _logistic(_sklearn_logistic),
    "sklearn_softmax": lambda: _softmax(_sklearn_logistic),
}
NAMES = tuple(MODELS)
LINEAR = ("sklearn_logistic", "sklearn_softmax")
UNIQUE_MINIMUM = tuple(name for name in NAMES if name != "sklearn_softmax")  # its intercepts may all shift together
