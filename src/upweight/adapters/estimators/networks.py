"""Multi-layer perceptrons, rebuilt as a torch objective at the same weights.

    MLPClassifier, MLPRegressor    per batch of B rows: (Σ sᵢ ℓᵢ + ½α Σ‖coefs‖²)/B      r = α/(2B) Σ‖coefs‖²

B is the batch for sgd and adam and n for lbfgs. ½(f − y)² is doubled to (f − y)², and r with it. Biases are free. What
is minimised for several outputs is the sum over them, as the gradients that fit() follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from upweight.adapters.estimators.built import Again, Built, Fit, refuse_early_stopping
from upweight.adapters.estimators.labels import of_classes, of_outputs, refuse_several_labels
from upweight.errors import UnsupportedModel
from upweight.model import losses
from upweight.model.losses import Loss
from upweight.model.objective import L2, Objective

_ACTIVATIONS = {"identity": lambda h: h, "logistic": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}
_AUTO_BATCH = 200  # scikit-learn's


def mlp_classifier(fit: Fit) -> Built:
    """MLPClassifier: logistic loss for two classes, softmax cross-entropy for more."""
    model = fit.estimator
    refuse_several_labels(fit.y, fit.name)
    binary = len(model.classes_) == 2
    loss = losses.logistic if binary else losses.cross_entropy

    def own(X: Any) -> Any:
        probabilities = model.predict_proba(X)
        return probabilities[:, 1:] if binary else probabilities

    def probability(output: Tensor) -> Tensor:
        return torch.sigmoid(output) if binary else torch.softmax(output, 1)

    return _network(fit, loss, of_classes(model), own, probability)


def mlp_regressor(fit: Fit) -> Built:
    """MLPRegressor with squared or Poisson loss."""
    model = fit.estimator
    if getattr(model, "loss", "squared_error") == "poisson":
        if model.n_outputs_ > 1:
            message = (
                f"MLPRegressor(loss='poisson') with {model.n_outputs_} outputs is not supported. Fit one model per "
                "output."
            )
            raise UnsupportedModel(message)
        return _network(fit, losses.poisson, of_outputs(1), model.predict, torch.exp)
    return _network(fit, losses.squared, of_outputs(model.n_outputs_), model.predict, lambda output: output, scale=2)


def _network(fit: Fit, loss: Loss, targets: Any, own: Any, response: Any, scale: float = 1) -> Built:
    model = fit.estimator
    batch = fit.n
    if model.solver != "lbfgs":
        refuse_early_stopping(fit)
        batch = min(_AUTO_BATCH if model.batch_size == "auto" else int(model.batch_size), fit.n)
    layers = len(model.coefs_)
    bend = _ACTIVATIONS[model.activation]

    def outputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x.to(params["coefs.0"])
        for layer in range(layers):
            h = h @ params[f"coefs.{layer}"] + params[f"intercepts.{layer}"]
            h = bend(h) if layer < layers - 1 else h
        return h

    def read(fitted: Any) -> dict[str, Any]:
        blocks = {}
        for layer in range(layers):
            blocks[f"coefs.{layer}"] = np.asarray(fitted.coefs_[layer], dtype=np.float64)
            blocks[f"intercepts.{layer}"] = np.asarray(fitted.intercepts_[layer], dtype=np.float64)
        return blocks

    def predicted(objective: Objective, X: Any) -> Tensor:
        dense = torch.from_numpy(X.toarray()) if scipy.sparse.issparse(X) else X
        return response(outputs(objective.params, dense))  # type: ignore[arg-type]

    strength = scale * model.alpha / batch
    objective = Objective(
        lambda params, example: loss(outputs(params, example[0]), example[1]),
        read(model),
        penalty=L2({f"coefs.{layer}": strength for layer in range(layers)}) if strength else None,
        penalty_per_example=fit.folded(default=False),
        outputs=lambda params, example: outputs(params, example[0]),
        output_loss=lambda output, example: loss(output, example[1]),
        gauge=_output_shift(model.coefs_[-1].shape, free=not strength) if loss is losses.cross_entropy else None,
        name=fit.name,
    )
    again = Again(model, fit, read, preferred=True)
    return Built(objective, targets, own, predictor=predicted, again=again)


def _output_shift(shape: tuple[int, int], *, free: bool) -> Callable[[Tensor], Tensor]:
    """Removes a common shift of all outputs, which a softmax does not see, from the last layer's biases.

    Args:
        shape: (h, K) of the last layer's weights.
        free: whether no penalty holds those, so that they have the same shift.
    """
    h, K = shape

    def project(V: Tensor) -> Tensor:
        out = V.clone()
        out[:, -K:] -= out[:, -K:].mean(1, keepdim=True)
        if free:
            weights = out[:, -K - h * K : -K].reshape(len(V), h, K)
            out[:, -K - h * K : -K] = (weights - weights.mean(2, keepdim=True)).flatten(1)
        return out

    return project
