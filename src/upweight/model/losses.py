"""Single-example losses ℓ(η, y) of a linear predictor η, with their first and second derivatives in η.

Each is a `Loss`: called with the predictor of ONE example it gives one number, differentiable by torch;
`slope` and `curvature` are the closed forms for a whole batch. There is no reduction and no weight here.

    name                              ℓ(η, y)                                          outputs   y
    cross_entropy                     log Σₖ exp(ηₖ) − η_y                             K         class number 0 … K−1
    logistic                          log(1 + exp(−s η)),  s = 2y − 1                  1         0 or 1
    squared                           Σₖ (ηₖ − yₖ)²          (no ½, as mse_loss)       K         K numbers
    poisson                           exp(η) − y η                                     1         count
    gamma                             η + y exp(−η)                                    1         number > 0
    tweedie(power, link)              μ^(2−p)/(2−p) − y μ^(1−p)/(1−p), μ = exp(η) or η  1         number
    huber(δ)                          ½ (η−y)² if |η−y| ≤ δ, else δ(|η−y| − ½δ)        1         number
    epsilon_insensitive(ε)            max(0, |η−y| − ε)                                1         number
    smooth_epsilon_insensitive(ε, t)  the same with both corners rounded over t        1         number
    squared_epsilon_insensitive(ε)    max(0, |η−y| − ε)²                               1         number
    hinge                             max(0, 1 − s η)                                  1         0 or 1
    smooth_hinge(t)                   t log(1 + exp((1 − s η)/t))  → hinge as t → 0    1         0 or 1
    squared_hinge                     max(0, 1 − s η)²                                 1         0 or 1
    modified_huber                    max(0, 1 − s η)² if s η ≥ −1, else −4 s η        1         0 or 1
    one_vs_one(ℓ, K)                  Σ over the pairs i < j that contain y of ℓ        K(K−1)/2  class number 0 … K−1

At a kink the value on one side is taken for the derivative. All logarithms are natural.
Reference: Koh & Liang (2017), section 4.3, for the smooth hinge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from upweight.errors import InvalidInput, checked_count

__all__ = [
    "Loss",
    "cross_entropy",
    "epsilon_insensitive",
    "gamma",
    "hinge",
    "huber",
    "logistic",
    "modified_huber",
    "one_vs_one",
    "poisson",
    "smooth_epsilon_insensitive",
    "smooth_hinge",
    "squared",
    "squared_epsilon_insensitive",
    "squared_hinge",
    "tweedie",
]


@dataclass(frozen=True)
class Loss:
    """A loss of one linear predictor, with its derivatives in closed form.

    `value(eta, y)` maps (b, K) predictors to (b,) losses, `slope` to (b, K) first derivatives and `curvature` to
    (b, K, K) second derivatives. Calling the object with the predictor (K,) of one example gives its loss, ().

    `coupling(eta, y)` is for losses whose outputs interact: a (b, K) and u (b, K) ≥ 0 with curvature = diag(a) − u uᵀ.
    None says that the curvature is diagonal. Fast products and matrices rest on this structure.
    `convex` is False where the curvature may be negative for some predictor and target.
    `pairs` is True where there is one output for each pair of classes, not one for each class.
    `limit` is the loss with kinks that a smooth one stands for, None for all others.
    """

    name: str
    formula: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]
    coupling: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    convex: bool = True
    pairs: bool = False
    limit: Loss | None = None

    def __call__(self, eta: Float[Tensor, " K"], y: Tensor) -> Float[Tensor, ""]:
        """The loss of one example."""
        return self.value(eta[None], y[None])[0]

    def __repr__(self) -> str:
        return self.name


def _signs(eta: Tensor, y: Tensor) -> Tensor:
    """s = 2y − 1 with the shape (b, 1) of `eta`."""
    return 2 * y.reshape(eta.shape).to(eta.dtype) - 1


def _log_partition(eta: Tensor, y: Tensor) -> Tensor:
    index = y.reshape(-1, 1).long()
    return torch.logsumexp(eta, dim=1) - eta.gather(1, index)[:, 0]


def _softmax_slope(eta: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(eta, dim=1) - one_hot(y.reshape(-1).long(), eta.shape[1]).to(eta.dtype)


def _softmax_coupling(eta: Tensor, _y: Tensor) -> tuple[Tensor, Tensor]:
    probability = torch.softmax(eta, dim=1)
    return probability, probability


def _softmax_curvature(eta: Tensor, _y: Tensor) -> Tensor:
    probability = torch.softmax(eta, dim=1)
    return torch.diag_embed(probability) - probability[:, :, None] * probability[:, None, :]


cross_entropy = Loss(
    "cross_entropy",
    "log Σₖ exp(ηₖ) − η_y, y a class number 0 … K−1",
    _log_partition,
    _softmax_slope,
    _softmax_curvature,
    _softmax_coupling,
)


def _logistic_slope(eta: Tensor, y: Tensor) -> Tensor:
    sign = _signs(eta, y)
    return -sign * torch.sigmoid(-sign * eta)


logistic = Loss(
    "logistic",
    "log(1 + exp(−s η)), s = 2y − 1, y 0 or 1",
    lambda eta, y: softplus(-_signs(eta, y) * eta, threshold=50.0)[:, 0],
    _logistic_slope,
    lambda eta, _y: (torch.sigmoid(eta) * torch.sigmoid(-eta))[:, :, None],
)


def _squared_curvature(eta: Tensor, _y: Tensor) -> Tensor:
    return 2 * torch.eye(eta.shape[1], dtype=eta.dtype, device=eta.device).expand(len(eta), -1, -1)


squared = Loss(
    "squared",
    "Σₖ (ηₖ − yₖ)², no ½, as mse_loss",
    lambda eta, y: ((eta - y.reshape(eta.shape)) ** 2).sum(1),
    lambda eta, y: 2 * (eta - y.reshape(eta.shape)),
    _squared_curvature,
)

poisson = Loss(
    "poisson",
    "exp(η) − y η, y a count",
    lambda eta, y: (eta.exp() - y.reshape(eta.shape) * eta)[:, 0],
    lambda eta, y: eta.exp() - y.reshape(eta.shape),
    lambda eta, _y: eta.exp()[:, :, None],
)


def huber(delta: float = 1.0) -> Loss:
    """The Huber loss: quadratic within `delta` of the target, linear beyond.

    Raises:
        InvalidInput: if delta is not positive.

    >>> float(huber(1.0)(torch.tensor([3.0]), torch.tensor(1.0)))
    1.5
    """
    delta = _positive("huber", "delta", delta, "huber(1.0)")

    def value(eta: Tensor, y: Tensor) -> Tensor:
        distance = (eta - y.reshape(eta.shape)).abs()
        return torch.where(distance <= delta, distance**2 / 2, delta * (distance - delta / 2))[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        return (eta - y.reshape(eta.shape)).clamp(-delta, delta)

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        return ((eta - y.reshape(eta.shape)).abs() <= delta).to(eta.dtype)[:, :, None]

    return Loss(
        f"huber({_short(delta)})", f"½ (η−y)² where |η−y| ≤ {_short(delta)}, linear beyond", value, slope, curvature
    )


hinge = Loss(
    "hinge",
    "max(0, 1 − s η), s = 2y − 1, y 0 or 1",
    lambda eta, y: (1 - _signs(eta, y) * eta).clamp(min=0)[:, 0],
    lambda eta, y: -_signs(eta, y) * (1 - _signs(eta, y) * eta > 0).to(eta.dtype),
    lambda eta, _y: torch.zeros_like(eta)[:, :, None],
)


def smooth_hinge(t: float) -> Loss:
    """The hinge with its corner rounded over a width `t`: t·log(1 + exp((1 − s η)/t)), stable for any t > 0.

    The curvature is σ(u)σ(−u)/t with u = (1 − s η)/t; it is the Dirac comb of the hinge, spread over a width t.

    Raises:
        InvalidInput: if t is not positive.
    """
    t = _positive("smooth_hinge", "t", t, "smooth_hinge(0.001), the paper's value, or losses.hinge")

    def value(eta: Tensor, y: Tensor) -> Tensor:
        return t * softplus((1 - _signs(eta, y) * eta) / t, threshold=50.0)[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        sign = _signs(eta, y)
        return -sign * torch.sigmoid((1 - sign * eta) / t)

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        u = (1 - _signs(eta, y) * eta) / t
        return (torch.sigmoid(u) * torch.sigmoid(-u) / t)[:, :, None]

    formula = f"{_short(t)} log(1 + exp((1 − s η)/{_short(t)}))"
    return Loss(f"smooth_hinge({_short(t)})", formula, value, slope, curvature, limit=hinge)


squared_hinge = Loss(
    "squared_hinge",
    "max(0, 1 − s η)², s = 2y − 1, y 0 or 1",
    lambda eta, y: ((1 - _signs(eta, y) * eta).clamp(min=0) ** 2)[:, 0],
    lambda eta, y: -2 * _signs(eta, y) * (1 - _signs(eta, y) * eta).clamp(min=0),
    lambda eta, y: 2 * (1 - _signs(eta, y) * eta > 0).to(eta.dtype)[:, :, None],
)


def _modified_huber(eta: Tensor, y: Tensor) -> Tensor:
    z = _signs(eta, y) * eta
    return torch.where(z >= -1, (1 - z).clamp(min=0) ** 2, -4 * z)[:, 0]


modified_huber = Loss(
    "modified_huber",
    "max(0, 1 − s η)² if s η ≥ −1, else −4 s η, s = 2y − 1, y 0 or 1",
    _modified_huber,
    lambda eta, y: -2 * _signs(eta, y) * (1 - _signs(eta, y) * eta).clamp(0, 2),
    lambda eta, y: 2 * ((_signs(eta, y) * eta).abs() < 1).to(eta.dtype)[:, :, None],
)


def one_vs_one(margin: Loss, n_classes: int) -> Loss:
    """A binary `margin` loss for K classes: one predictor for each pair i < j, which says i where it is positive.

    The loss of a row is the sum over the K − 1 pairs that contain its class; the curvature is diagonal.

    Raises:
        InvalidInput: if there are fewer than two classes.

    >>> float(one_vs_one(hinge, 3)(torch.tensor([0.5, 2.0, 0.0]), torch.tensor(0)))  # pairs (0, 1) and (0, 2)
    0.5
    """
    checked_count(n_classes, "n_classes", least=2, hint="a pair needs two")
    first, second = torch.triu_indices(n_classes, n_classes, offset=1)

    def of_pairs(part: Callable[[Tensor, Tensor], Tensor], eta: Tensor, y: Tensor) -> Tensor:
        label = y.reshape(-1, 1).long()
        inside = (label == first) | (label == second)  # (b, pairs)
        values = part(eta.reshape(-1, 1), (label == first).reshape(-1)).reshape(eta.shape)
        return torch.where(inside, values, torch.zeros_like(values))

    return Loss(
        f"{margin.name}, one-vs-one",
        f"Σ over the pairs that contain y of {margin.formula}",
        lambda eta, y: of_pairs(margin.value, eta, y).sum(1),
        lambda eta, y: of_pairs(margin.slope, eta, y),
        lambda eta, y: torch.diag_embed(of_pairs(margin.curvature, eta, y)),
        pairs=True,
        limit=None if margin.limit is None else one_vs_one(margin.limit, n_classes),
    )


# ---- regression --------------------------------------------------------------------------------------------------


def epsilon_insensitive(epsilon: float) -> Loss:
    """The loss of support vector regression: the distance from the target beyond `epsilon`.

    Raises:
        InvalidInput: if epsilon is negative.

    >>> float(epsilon_insensitive(0.5)(torch.tensor([3.0]), torch.tensor(1.0)))
    1.5
    """
    epsilon = _checked_epsilon("epsilon_insensitive", epsilon)

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        r = eta - y.reshape(eta.shape)
        return r.sign() * (r.abs() > epsilon).to(eta.dtype)

    return Loss(
        f"epsilon_insensitive({_short(epsilon)})",
        f"max(0, |η−y| − {_short(epsilon)})",
        lambda eta, y: ((eta - y.reshape(eta.shape)).abs() - epsilon).clamp(min=0)[:, 0],
        slope,
        lambda eta, _y: torch.zeros_like(eta)[:, :, None],
    )


def smooth_epsilon_insensitive(epsilon: float, t: float) -> Loss:
    """`epsilon_insensitive` with both corners rounded over a width `t`, as `smooth_hinge` does; stable for any t > 0.

    With r = η − y it is t log(1 + exp((r − ε)/t)) + t log(1 + exp((−r − ε)/t)).

    Raises:
        InvalidInput: if epsilon is negative or t is not positive.

    >>> round(float(smooth_epsilon_insensitive(0.5, 0.1)(torch.tensor([3.0]), torch.tensor(1.0))), 4)
    1.5
    """
    epsilon = _checked_epsilon("smooth_epsilon_insensitive", epsilon)
    t = _positive("smooth_epsilon_insensitive", "t", t, "t=0.001")

    def sides(eta: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r = eta - y.reshape(eta.shape)
        return (r - epsilon) / t, (-r - epsilon) / t

    def value(eta: Tensor, y: Tensor) -> Tensor:
        over, under = sides(eta, y)
        return t * (softplus(over, threshold=50.0) + softplus(under, threshold=50.0))[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        over, under = sides(eta, y)
        return torch.sigmoid(over) - torch.sigmoid(under)

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        return sum(torch.sigmoid(u) * torch.sigmoid(-u) / t for u in sides(eta, y))[:, :, None]  # type: ignore[index]

    return Loss(
        f"smooth_epsilon_insensitive({_short(epsilon)}, {_short(t)})",
        f"{_short(t)} log(1 + exp((r − {_short(epsilon)})/{_short(t)})) + the same of −r, r = η − y",
        value,
        slope,
        curvature,
        limit=epsilon_insensitive(epsilon),
    )


def squared_epsilon_insensitive(epsilon: float) -> Loss:
    """The square of `epsilon_insensitive`.

    Raises:
        InvalidInput: if epsilon is negative.

    >>> float(squared_epsilon_insensitive(0.5)(torch.tensor([3.0]), torch.tensor(1.0)))
    2.25
    """
    epsilon = _checked_epsilon("squared_epsilon_insensitive", epsilon)

    def beyond(eta: Tensor, y: Tensor) -> Tensor:
        r = eta - y.reshape(eta.shape)
        return r.sign() * (r.abs() - epsilon).clamp(min=0)

    return Loss(
        f"squared_epsilon_insensitive({_short(epsilon)})",
        f"max(0, |η−y| − {_short(epsilon)})²",
        lambda eta, y: (beyond(eta, y) ** 2)[:, 0],
        lambda eta, y: 2 * beyond(eta, y),
        lambda eta, y: 2 * ((eta - y.reshape(eta.shape)).abs() > epsilon).to(eta.dtype)[:, :, None],
    )


def _checked_epsilon(name: str, epsilon: Any) -> float:
    if not _is_real(epsilon) or not 0 <= epsilon < float("inf"):
        message = f"{name}: epsilon is {epsilon}, and must be a finite number ≥ 0. Try 0.1, scikit-learn's value."
        raise InvalidInput(message)
    return float(epsilon)


def _positive(name: str, setting: str, value: Any, hint: str) -> float:
    if not _is_real(value) or not value > 0:
        message = f"{name}: {setting} is {value}, and must be a positive number. Try {hint}."
        raise InvalidInput(message)
    return float(value)


def _is_real(value: Any) -> bool:
    """Whether it is a number of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _short(value: float) -> str:
    """The number with six digits if these are all it has, else with all of them: losses are compared by name."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


gamma = Loss(
    "gamma",
    "η + y exp(−η), y > 0",
    lambda eta, y: (eta + y.reshape(eta.shape) * (-eta).exp())[:, 0],
    lambda eta, y: 1 - y.reshape(eta.shape) * (-eta).exp(),
    lambda eta, y: (y.reshape(eta.shape) * (-eta).exp())[:, :, None],
)


def tweedie(power: float, link: str = "log") -> Loss:
    """Half the Tweedie deviance without what does not depend on η, for μ = exp(η) (link "log") or μ = η ("identity").

    μ^(2−p)/(2−p) − y μ^(1−p)/(1−p), with its limits μ − y log μ at p = 1 and log μ + y/μ at p = 2. Power 0 is (μ − y)²,
    no ½, as `squared`.

    Raises:
        InvalidInput: if the power is between 0 and 1 or the link has another name.

    >>> round(float(tweedie(1.5)(torch.tensor([0.0]), torch.tensor(1.0))), 4)  # 1/½ + 1/½
    4.0
    """
    if not _is_real(power) or not abs(power) < float("inf") or 0 < power < 1:
        message = (
            f"tweedie: power is {power}, and must be a finite number; no distribution has one between 0 and 1. "
            "Try 0, 1, 1.5, 2 or 3."
        )
        raise InvalidInput(message)
    if link not in {"log", "identity"}:
        message = f"tweedie: link is {link!r}. Pass 'log' (η = log μ) or 'identity' (η = μ)."
        raise InvalidInput(message)
    p, scale = float(power), 2.0 if power == 0 else 1.0
    exponential = link == "log"

    def mean_power(eta: Tensor, exponent: float) -> Tensor:
        return (exponent * eta).exp() if exponential else eta**exponent

    def value(eta: Tensor, y: Tensor) -> Tensor:
        y = y.reshape(eta.shape).to(eta.dtype)
        log_mean = eta if exponential else eta.log() if p in {1, 2} else eta
        if p == 0:
            return ((mean_power(eta, 1) - y) ** 2)[:, 0]
        grown = log_mean if p == 2 else mean_power(eta, 2 - p) / (2 - p)
        gained = log_mean if p == 1 else mean_power(eta, 1 - p) / (1 - p)
        return (grown - y * gained)[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        y, by_link = y.reshape(eta.shape), 1 if exponential else 0
        return scale * (mean_power(eta, 1 - p + by_link) - y * mean_power(eta, by_link - p))

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        y = y.reshape(eta.shape)
        if exponential:
            h = (2 - p) * mean_power(eta, 2 - p) - y * (1 - p) * mean_power(eta, 1 - p)
        else:
            h = (1 - p) * mean_power(eta, -p) + p * y * mean_power(eta, -p - 1)
        return scale * h[:, :, None]

    name = f"tweedie({_short(p)}{'' if exponential else ', identity'})"
    formula = f"half the Tweedie deviance of power {_short(p)}, {link} link"
    convex = 1 <= p <= 2 if exponential else p in {0, 1}
    return Loss(name, formula, value, slope, curvature, convex=convex)
