"""Generalised linear models, and Huber's robust regression.

    PoissonRegressor, GammaRegressor, TweedieRegressor
                      (1/n) Σ wᵢ ½ devianceᵢ + ½α‖coef‖²,  wᵢ = sᵢ n/Σs     r = ½α‖coef‖²; α‖coef‖² with (μ − y)²
    HuberRegressor    Σ sᵢ (σ + H((y − η)/σ) σ) + α‖coef‖²                   r = (α/n)‖coef‖², θ holds σ = scale_

H(z) is z² within ε and 2ε|z| − ε² beyond. Terms of the deviance that depend on y only are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.adapters.estimators.built import Again, Built, Fit, l2, linear_objective, matrix, read_linear
from upweight.adapters.estimators.labels import of_outputs
from upweight.model import losses
from upweight.model.losses import Loss
from upweight.model.objective import Objective


def poisson_regressor(fit: Fit) -> Built:
    """PoissonRegressor: the log of the mean is linear."""
    return _generalized(fit, losses.poisson)


def gamma_regressor(fit: Fit) -> Built:
    """GammaRegressor: the log of the mean is linear."""
    return _generalized(fit, losses.gamma)


def tweedie_regressor(fit: Fit) -> Built:
    """TweedieRegressor of any power, with log or identity link."""
    model = fit.estimator
    link = model.link if model.link != "auto" else ("identity" if model.power <= 0 else "log")
    if model.power == 0 and link == "identity":
        return _generalized(fit, losses.squared, link, doubled=True)
    return _generalized(fit, losses.tweedie(float(model.power), link), link, doubled=model.power == 0)


def _generalized(fit: Fit, loss: Loss, link: str = "log", *, doubled: bool = False) -> Built:
    model = fit.estimator
    objective = linear_objective(
        fit,
        loss,
        model.coef_,
        [model.intercept_] if model.fit_intercept else None,
        l2(model.alpha * (2 if doubled else 1)),
        folded=True,
    )
    factor = 1.0 if fit.sample_weight is None else fit.n / fit.sample_weight.sum()
    return Built(
        objective,
        of_outputs(1),
        model.predict if link == "identity" else lambda X: np.log(model.predict(X)),
        lambda targets: np.full(len(targets), factor),
        again=Again(model, fit, read_linear(intercept=model.fit_intercept), shares=True),
    )


def huber_regressor(fit: Fit) -> Built:
    """HuberRegressor: coefficients, intercept and scale are fitted together."""
    model = fit.estimator
    epsilon = float(model.epsilon)

    def eta(params: dict[str, Tensor], x: Tensor) -> Tensor:
        value = x.to(params["coef"]) @ params["coef"].T
        return value + params["intercept"] if "intercept" in params else value

    def loss(params: dict[str, Tensor], example: Any) -> Tensor:
        scale = params["scale"][0]
        z = (example[1].reshape(()) - eta(params, example[0])[0]) / scale
        bent = torch.where(z.abs() <= epsilon, z**2, 2 * epsilon * z.abs() - epsilon**2)
        return scale + bent * scale

    def read(fitted: Any) -> dict[str, Any]:
        return read_linear(intercept=fitted.fit_intercept)(fitted) | {"scale": np.array([float(fitted.scale_)])}

    def predicted(objective: Objective, X: Any) -> Tensor:
        params: dict[str, Any] = objective.params  # type: ignore[assignment]
        return (
            eta(params, X) if isinstance(X, Tensor) else torch.from_numpy(X @ matrix(model.coef_).T + model.intercept_)
        )

    objective = Objective(
        loss,
        read(model),
        penalty=l2(2 * model.alpha / fit.n),
        penalty_per_example=fit.folded(default=False),
        name=fit.name,
    )
    plain = Again(model, fit, read, preferred=True)  # L-BFGS on our side may step to a scale ≤ 0
    return Built(objective, of_outputs(1), model.predict, predictor=predicted, again=plain)
