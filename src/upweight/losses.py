"""Single-example losses ℓ(η, y) of a linear predictor η, with their first and second derivatives in η.

Each is a `Loss`: called with the predictor of ONE example it gives one number, differentiable by torch;
`slope` and `curvature` are the closed forms for a whole batch. There is no reduction and no weight here.

    name             ℓ(η, y)                                        outputs   y
    cross_entropy    log Σₖ exp(ηₖ) − η_y                           K         class number 0 … K−1
    logistic         log(1 + exp(−s η)),  s = 2y − 1                1         0 or 1
    squared          Σₖ (ηₖ − yₖ)²          (no ½, as mse_loss)     K         K numbers
    poisson          exp(η) − y η                                   1         count
    huber(δ)         ½ (η−y)² if |η−y| ≤ δ, else δ(|η−y| − ½δ)      1         number
    hinge            max(0, 1 − s η)                                1         0 or 1
    smooth_hinge(t)  t log(1 + exp((1 − s η)/t))  → hinge as t → 0  1         0 or 1

All logarithms are natural. Reference: Koh & Liang (2017), section 4.3, for the smooth hinge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from upweight.errors import InvalidInput

__all__ = ["Loss", "cross_entropy", "hinge", "huber", "logistic", "poisson", "smooth_hinge", "squared"]


@dataclass(frozen=True)
class Loss:
    """A loss of one linear predictor, with its derivatives in closed form.

    `value(eta, y)` maps (b, K) predictors to (b,) losses, `slope` to (b, K) first derivatives and `curvature` to
    (b, K, K) second derivatives. Calling the object with the predictor (K,) of one example gives its loss, ().

    `coupling(eta, y)` is for losses whose outputs interact: a (b, K) and u (b, K) ≥ 0 with curvature = diag(a) − u uᵀ.
    None says that the curvature is diagonal. Fast products and matrices rest on this structure.
    """

    name: str
    formula: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]
    coupling: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

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
    """
    if not isinstance(delta, int | float) or not delta > 0:
        message = f"huber: delta is {delta}, and must be a positive number. Try huber(1.0)."
        raise InvalidInput(message)

    def value(eta: Tensor, y: Tensor) -> Tensor:
        distance = (eta - y.reshape(eta.shape)).abs()
        return torch.where(distance <= delta, distance**2 / 2, delta * (distance - delta / 2))[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        return (eta - y.reshape(eta.shape)).clamp(-delta, delta)

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        return ((eta - y.reshape(eta.shape)).abs() <= delta).to(eta.dtype)[:, :, None]

    return Loss(f"huber({delta:g})", f"½ (η−y)² where |η−y| ≤ {delta:g}, linear beyond", value, slope, curvature)


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
    if not isinstance(t, int | float) or not t > 0:
        message = (
            f"smooth_hinge: t is {t}, and must be a positive number. Try smooth_hinge(0.001), the paper's value, or "
            "losses.hinge."
        )
        raise InvalidInput(message)

    def value(eta: Tensor, y: Tensor) -> Tensor:
        return t * softplus((1 - _signs(eta, y) * eta) / t, threshold=50.0)[:, 0]

    def slope(eta: Tensor, y: Tensor) -> Tensor:
        sign = _signs(eta, y)
        return -sign * torch.sigmoid((1 - sign * eta) / t)

    def curvature(eta: Tensor, y: Tensor) -> Tensor:
        u = (1 - _signs(eta, y) * eta) / t
        return (torch.sigmoid(u) * torch.sigmoid(-u) / t)[:, :, None]

    return Loss(f"smooth_hinge({t:g})", f"{t:g} log(1 + exp((1 − s η)/{t:g}))", value, slope, curvature)
