"""Really training again, to compare with what was predicted.

A `Retrain` maps example weights and a seed to parameters. The weights multiply the examples' own sample weights: all
ones is the training set as it was, one zero is leave-one-out. Reference retrainers minimise, from θ̂,

    R_m(θ) = (1/n) Σᵢ mᵢ wᵢ L(zᵢ, θ) + c r(θ)

with c = Σ mᵢwᵢ / Σ wᵢ when the penalty is folded into the rows, else 1; n does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, NotConverged, NotPositiveDefinite, Undefined, first_line
from upweight.influence import defaults
from upweight.influence.classes import Classes
from upweight.influence.face import Influence
from upweight.model import calculus, linear, penalties, per_row
from upweight.model.encoders import Refitting
from upweight.model.objective import L2, Objective
from upweight.model.sweep import Sweep
from upweight.operators import Hessian
from upweight.runs import progress
from upweight.solvers import CG, Cholesky, Prepared

_ROUNDING_SLACK = 10  # L-BFGS may end on rounding in R, a little above the gradient that was asked
_STILL, _NO_MOVE = 1e-3, 1e-6  # of the largest predictor, and by itself: what the next step may move at a minimum
_WORTHWHILE = (
    0.2  # a Newton step with an old factor must shrink the gradient to this share, else the curvature is renewed
)


@runtime_checkable
class Retrain(Protocol):
    """A training procedure: (example weights, seed) → θ, as `params` or one flat vector, a state dict, or a module.

    Buffers that training changes, such as BatchNorm's running statistics, come with a state dict or a module. Before it
    is called, the random states of torch, NumPy and Python are set to the seed; afterwards they are what they were.

    >>> import upweight as uw
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.arange(5.0)[:, None], np.array([0.0, 1, 1, 3, 9])
    >>> def train(weights, seed=0):
    ...     model = LinearRegression().fit(X, y, weights)
    ...     return np.append(model.coef_, model.intercept_)  # θ as one flat vector
    >>> influence = uw.explain(LinearRegression().fit(X, y), X, y)
    >>> isinstance(train, uw.Retrain), uw.leave_one_out(influence, ([[5.0]], [8.0]), [0, 4], train).actual.round(2)
    (True, array([[ 3.36, 12.32]]))
    """

    def __call__(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> Any:
        """The parameters that training finds with these weights."""
        ...


@runtime_checkable
class RetrainMany(Retrain, Protocol):
    """A training procedure that can train several models at once, which is faster for small ones.

    >>> import upweight as uw
    >>> X, y = torch.arange(6.0)[:, None], torch.tensor([0, 0, 1, 0, 1, 1])
    >>> training = uw.StackedTraining(uw.minibatch.SGD(lr=0.1), uw.minibatch.Placed(2), epochs=1)
    >>> criterion = {"loss": torch.nn.functional.cross_entropy, "penalty": 0.1}
    >>> bound = training.bind(uw.explain(torch.nn.Linear(1, 2), X, y, **criterion))
    >>> isinstance(bound, uw.RetrainMany), len(bound.many(np.ones((3, 6)), seeds=[0, 1, 2]))
    (True, 3)
    """

    @property
    def together(self) -> int:
        """How many models it takes at a time."""
        ...

    def many(self, weights: Float[NDArray[np.float64], "m n"], seeds: Sequence[int]) -> Sequence[Any]:
        """The parameters of m models, each with its own line of weights and its own seed."""
        ...


@dataclass(frozen=True)
class Newton:
    """Newton's method for objectives with a linear predictor, to a gradient far below one row's effect.

    The curvature at θ̂ is factorised once and used again as long as it shrinks the gradient; it is renewed when it
    does not.

    Args:
        rtol: ‖∇R_m‖ to reach, relative to the root mean square of ‖wᵢ∇Lᵢ‖/n.
        max_steps: steps after which NotConverged is raised.

    >>> import upweight as uw
    >>> from sklearn.linear_model import LogisticRegression
    >>> X, y = np.arange(6.0)[:, None], np.array([0, 0, 1, 0, 1, 1])
    >>> influence = uw.explain(LogisticRegression(tol=1e-8).fit(X, y), X, y)
    >>> without_the_first = uw.Newton().bind(influence)(np.array([0.0, 1, 1, 1, 1, 1]))
    >>> again = LogisticRegression(tol=1e-8).fit(X[1:], y[1:])
    >>> round(float(without_the_first[0]), 4), round(float(again.coef_[0, 0]), 4)
    (0.633, 0.633)
    """

    rtol: float = 1e-8
    max_steps: int = 200

    def bind(self, influence: Influence) -> BoundNewton:
        """The retrainer of this objective on these examples; the factorisation at θ̂ is shared with the influence."""
        sweep = influence.sweep
        exact = isinstance(influence.curvature, Hessian) and isinstance(influence.solver, Cholesky)
        with _positive():
            factor = influence.prepared if exact and influence.damping == 0 else _factor(sweep)
        return BoundNewton(self, sweep, per_row.typical_row(sweep), factor, Classes.of(influence.system))


@dataclass(frozen=True)
class BoundNewton:
    """A Newton retrainer with the curvature at θ̂ at hand."""

    spec: Newton
    sweep: Sweep
    typical: float
    factor: Prepared
    classes: Classes | None = None

    def __call__(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> Float[Tensor, " p"]:  # noqa: ARG002
        """θ at the minimum of R_m.

        Raises:
            NotConverged: if the gradient does not become small enough, or θ grows without end, as when classes are
                separable.
            NotPositiveDefinite: if a curvature on the way is not positive.
            Undefined: if no row of a class is left.
        """
        lost = "" if self.classes is None else self.classes.lost(weights)
        if lost:
            raise Undefined(lost)
        with _positive():
            return self._minimum(reweighted(self.sweep, weights))

    def _minimum(self, sweep: Sweep) -> Float[Tensor, " p"]:
        theta, factor = sweep.objective.theta, self.factor
        value, gradient = _value_and_gradient(sweep, theta)
        goal = self.spec.rtol * self.typical
        for _ in range(self.spec.max_steps):
            size = float(gradient.norm())
            if size <= goal:
                return self._settled(sweep, theta, gradient, factor)
            candidate = theta - factor.solve(gradient[None]).x[0]
            new_value, new_gradient = _value_and_gradient(sweep, candidate)
            if not float(new_gradient.norm()) <= _WORTHWHILE * size:
                factor = _factor(replace(sweep, objective=sweep.objective.at(theta)))
                step = factor.solve(gradient[None]).x[0]
                candidate, new_value, new_gradient = _descend(sweep, theta, step, value, gradient)
                if float(new_gradient.norm()) >= size and size <= 1e3 * goal:
                    return theta  # rounding, not curvature, is what is left
            theta, value, gradient = candidate, new_value, new_gradient
        left = float(gradient.norm())
        if left <= goal:
            return self._settled(sweep, theta, gradient, factor)
        message = (
            f"Newton's method left ‖∇R‖ = {left:.3g} after {self.spec.max_steps} steps; {goal:.3g} was asked. Raise "
            "max_steps, or accept less with Newton(rtol=…). If the objective has no minimum without these rows, add a "
            "penalty."
        )
        raise NotConverged(message)

    def _settled(self, sweep: Sweep, theta: Tensor, gradient: Tensor, factor: Prepared) -> Tensor:
        """θ, if the next step would move no predictor any more. Where a loss falls for ever, its gradient is small too.

        Raises:
            NotConverged: if it would.
        """
        step = factor.solve(gradient[None]).x[0]
        if sweep.objective.linear is None or bool(step.isnan().any()):  # NaN: rounding, along what no row sees
            return theta
        both = torch.stack([step, theta])

        def predictors(batch: Any, weights: Tensor) -> Tensor:
            moves = linear.directional(sweep.objective, linear.wide(batch[0]), both).abs().amax(2)
            return torch.where(weights[:, None] > 0, moves, 0.0)

        moved, size = (float(column.max()) for column in sweep.emit(predictors, vectors=2, label="next step").T)
        still = max(_STILL, 10 * self.spec.rtol) * size + _NO_MOVE
        if moved <= still:
            return theta
        message = (
            f"Newton's method reached ‖∇R‖ = {float(gradient.norm()):.3g} at ‖θ‖ = {float(theta.norm()):.3g}, and the "
            f"next step would still move predictors by {moved:.2g}, beside {size:.3g}: the loss falls for ever as θ "
            "grows, and there is no minimum. With these rows the classes are probably separable, or a level has only "
            "one outcome. "
            "Fit with a penalty and explain that model."
        )
        raise NotConverged(message)


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS from θ̂ on the full data, for modules and any other objective; deterministic.

    Args:
        rtol: ‖∇R_m‖ to reach, relative to the root mean square of ‖wᵢ∇Lᵢ‖/n: a small part of one row's effect.
        max_steps: iterations after which NotConverged is raised.
    """

    rtol: float = 1e-4
    max_steps: int = 5000

    def bind(self, influence: Influence) -> BoundLBFGS:
        """The retrainer of this objective on these examples."""
        return BoundLBFGS(self, influence.sweep, per_row.typical_row(influence.sweep))


@dataclass(frozen=True)
class BoundLBFGS:
    """An L-BFGS retrainer."""

    spec: LBFGS
    sweep: Sweep
    typical: float

    def starting_at(self, theta: Float[Tensor, " p"]) -> BoundLBFGS:
        """The same from other parameters than θ̂."""
        return replace(self, sweep=replace(self.sweep, objective=self.sweep.objective.at(theta)))

    def __call__(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> Float[Tensor, " p"]:  # noqa: ARG002
        """θ at a minimum of R_m near θ̂.

        Raises:
            NotConverged: if the gradient does not become small enough.
        """
        sweep = reweighted(self.sweep, weights)

        def function(vector: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            value, gradient = _value_and_gradient(sweep, torch.from_numpy(vector))
            return value, gradient.numpy()

        goal = self.spec.rtol * self.typical
        options = {
            "maxiter": self.spec.max_steps,
            "maxfun": 2 * self.spec.max_steps,
            "gtol": goal / sweep.objective.size**0.5,
            "ftol": 0.0,
            "maxcor": 30,
        }
        start = sweep.objective.theta.numpy().copy()
        with progress.count("L-BFGS", "step") as step:
            result = scipy.optimize.minimize(
                function, start, jac=True, method="L-BFGS-B", options=options, callback=lambda _: step()
            )
        left = float(np.linalg.norm(result.jac))
        if left > _ROUNDING_SLACK * goal:
            message = (
                f"L-BFGS stopped with ‖∇R‖ = {left:.3g} after {result.nit} iterations ({result.message}); {goal:.3g} "
                f"was asked, which is {self.spec.rtol:g} of one row's effect. Raise max_steps, accept less with "
                "LBFGS(rtol=…), or pass your own retrain=."
            )
            raise NotConverged(message)
        return torch.from_numpy(result.x)


@dataclass(frozen=True)
class Refit:
    """scikit-learn's own fit(), once more: for estimators whose optimum is not smooth, or not reached.

    The transformers of a Pipeline, class weights and what cross-validation chose stay as they are; the penalty follows
    `penalty_per_example`. A random_state of None becomes the seed.

    >>> import upweight as uw
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.arange(5.0)[:, None], np.array([0.0, 1, 1, 3, 9])
    >>> influence = uw.explain(LinearRegression().fit(X, y), X, y)
    >>> uw.leave_one_out(influence, ([[5.0]], [8.0]), [0, 4], uw.Refit()).actual.round(2)
    array([[ 3.36, 12.32]])
    """

    def bind(self, influence: Influence) -> BoundRefit:
        """The retrainer of this estimator on these examples.

        Raises:
            InvalidInput: if the influence does not come from a scikit-learn estimator that can be fitted with weights.
        """
        refit = influence.encoder.refit
        if refit is None:
            message = (
                f"Refit() runs the fit() of a scikit-learn estimator, and {influence.objective.name} has none that "
                "takes these rows with weights. Use LBFGS(), Newton() for a linear predictor, or your own "
                "retrain=(weights, seed) → θ."
            )
            raise InvalidInput(message)
        return BoundRefit(influence, refit)


@dataclass(frozen=True)
class BoundRefit:
    """An estimator that is fitted again."""

    influence: Influence
    refit: Refitting

    def stage(self, on: Any) -> tuple[Objective, Examples]:
        """Where its parameters are measured: the objective and the queries, with all features that fit() may take in.

        A refit of a lasso may leave the active set that is explained.
        """
        whole = self.refit.whole
        if whole is None:
            return self.influence.objective, self.influence.queries(on)
        encoder = self.influence.encoder.unselected()
        return whole, encoder.examples(on) if isinstance(on, Examples) else encoder.examples(*on)

    def __call__(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> Any:
        """The parameters that fit() finds with these weights, of the objective of `stage`.

        Raises:
            Undefined: if no row of a class is left.
        """
        return self.with_penalty(weights, seed)[0]

    def with_penalty(self, weights: Float[NDArray[np.float64], " n"], seed: int = 0) -> tuple[Any, L2 | None]:
        """The same, and the penalty where it depends on what fit() found."""
        old = self.influence.examples.weights
        new = old * weights
        classes = Classes.of(self.influence.system)
        lost = "" if classes is None else classes.lost(weights)
        if lost:
            raise Undefined(lost)
        folded = bool(self.influence.objective.folded)
        return self.refit(new, float(new.sum() / old.sum()), folded=folded, seed=seed)


def reference(objective: Objective) -> Newton | LBFGS:
    """The retrainer for an objective when none is given and its minimum is what training ends at."""
    return Newton() if objective.linear is not None else LBFGS()


def bound(retrain: Any, influence: Influence) -> Retrain:
    """A retrainer from a specification, a function (weights, seed) → θ, or None.

    Raises:
        InvalidInput: if it is none of them.
    """
    if retrain is None:
        refit = influence.encoder.refit
        retrain = Refit() if refit is not None and refit.preferred else reference(influence.objective)
    if hasattr(retrain, "bind") and not isinstance(retrain, type):
        return retrain.bind(influence)
    if not callable(retrain) or isinstance(retrain, type):
        message = (
            f"retrain is {retrain!r}. Pass a function (weights, seed) → params, or an object: Newton() or LBFGS() or "
            "Refit()."
        )
        raise InvalidInput(message)
    return retrain


def reweighted(sweep: Sweep, weights: Float[NDArray[np.float64], " n"]) -> Sweep:
    """The same work with the examples' weights multiplied, and the penalty's share of them."""
    examples = copy(sweep.examples)
    examples.weights, examples.sample_weight = (
        before * weights for before in (sweep.examples.weights, sweep.examples.sample_weight)
    )
    objective = shared(sweep.objective, float(examples.weights.sum() / sweep.examples.weights.sum()))
    return replace(sweep, examples=examples, objective=objective, progress=False)


def shared(objective: Objective, share: float) -> Objective:
    """The objective of a training set whose weights sum to `share` of what they did: a folded penalty follows."""
    penalty: Any = objective.penalty
    if not objective.folded or share == 1:
        return objective
    scaled = penalty.scaled(share) if isinstance(penalty, L2) else lambda params: share * penalty(params)
    return replace(objective, penalty=scaled)


def _value_and_gradient(sweep: Sweep, theta: Tensor) -> tuple[float, Tensor]:
    objective = sweep.objective.at(theta)

    def both(batch: Any, weights: Tensor) -> Tensor:
        if objective.linear is not None:
            return linear.value_and_gradient(objective, batch, weights)
        values = calculus.losses(objective, batch).double().cpu() @ weights
        return torch.cat([values[None], calculus.pull(objective, batch, weights[None])[0].double().cpu()])

    total = sweep.fold(both) / sweep.n
    return float(total[0]) + penalties.value(objective), total[1:] + penalties.gradient(objective)


def _descend(sweep: Sweep, theta: Tensor, step: Tensor, value: float, gradient: Tensor) -> tuple[Tensor, float, Tensor]:
    """The longest of θ − step, θ − step/2, … that lowers R (Armijo)."""
    slope = float(gradient @ step)
    length = 1.0
    for _ in range(40):
        candidate = theta - length * step
        new_value, new_gradient = _value_and_gradient(sweep, candidate)
        if new_value <= value - 1e-4 * length * slope or abs(slope) < 1e-14 * max(abs(value), 1e-300):
            break
        length /= 2
    return candidate, new_value, new_gradient


@contextmanager
def _positive() -> Iterator[None]:
    """What solvers advise about a curvature that is not positive, a damping or another curvature, helps no training.

    Raises:
        NotPositiveDefinite: with what does help.
    """
    try:
        yield
    except NotPositiveDefinite as error:
        message = (
            f"Newton's method needs a positive curvature, and here {first_line(error).partition('. ')[0]}. Use "
            "retrain=LBFGS(), which needs none."
        )
        raise NotPositiveDefinite(message) from error


def _factor(sweep: Sweep) -> Prepared:
    quiet = replace(sweep, progress=False)
    if sweep.objective.size <= defaults.DIRECT_UP_TO:
        return Cholesky().prepare(Hessian().bind(quiet))
    return CG(rtol=1e-4).prepare(Hessian().bind(quiet))
