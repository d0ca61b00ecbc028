"""What a builder is given, and what it reads off a fitted estimator.

    R(θ) = (1/n) Σᵢ wᵢ ℓ(ηᵢ, yᵢ) + r(θ),      wᵢ = sample weight × `class_weights` of the row's target

Builders scale fit()'s own objective to this form, and ℓ to the library's losses: squared error is always (η − y)².
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.adapters.estimators.inputs import AsGiven, Inputs
from upweight.errors import InvalidInput, UnsupportedModel, first_line, require
from upweight.model import linear
from upweight.model.losses import Loss
from upweight.model.objective import L2, Linear, Objective


@dataclass(frozen=True)
class Fit:
    """A fitted estimator, the rows it saw, and what the user chose.

    Args:
        estimator: the last step of a Pipeline, or the estimator itself.
        X: the rows as the estimator saw them: an array or a CSR matrix.
        y: the labels as fit() was given them.
        sample_weight: (n,), or None when fit() was given none.
        loss: the smooth loss that the user wants for one with kinks, or None.
        penalty_per_example: None for the estimator's own meaning of sample_weight=0.
    """

    estimator: Any
    X: Any
    y: Any
    sample_weight: NDArray[np.float64] | None
    loss: Any = None
    penalty_per_example: bool | None = None

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.X.shape[0]

    @property
    def name(self) -> str:
        """The estimator's class."""
        return type(self.estimator).__name__

    def folded(self, default: bool) -> bool:
        """Whether removing a row removes its share of the penalty."""
        return default if self.penalty_per_example is None else self.penalty_per_example


@dataclass(frozen=True)
class Again:
    """How fit() runs again; class weights and what cross-validation chose are fixed in it.

    Args:
        estimator: one that can be cloned, with class_weight=None: classes weigh by the weights that it is given.
        fit: the rows.
        read: from the fitted estimator to parameters, as in the objective.
        preferred: whether fit() ends elsewhere than at the minimum near θ̂.
        shares: whether scaling all weights leaves fit() as it is, so that a removed row takes its share of r along.
        strength: the setting that scales r, or None; C divides.
        whole: the objective of what `read` gives, when the explained one leaves columns of X out.
        held: r for the refitted estimator on its rows, and words, where r holds intercepts where fit() left them.
        encoded: whether the rows are inputs of the objective already, not columns of X.
        before: what the rows' weights sum to, as a share of what they did when the estimator was explained.
    """

    estimator: Any
    fit: Fit
    read: Callable[[Any], Mapping[str, Any]]
    preferred: bool = False
    shares: bool = False
    strength: str | None = "alpha"
    whole: Objective | None = None
    held: Callable[[Fit], tuple[L2, str]] | None = None
    encoded: bool = False
    before: float = 1.0

    def __call__(
        self, weights: NDArray[np.float64], share: float, *, folded: bool, seed: int
    ) -> tuple[Mapping[str, Any], L2 | None]:
        """The parameters that fit() finds with these total weights, and the penalty that `held` asks for.

        Raises:
            InvalidInput: if fit() refuses them.
        """
        model = require("sklearn.base", "sklearn").clone(self.estimator)
        left = self.before * share
        factor = (left if folded else 1.0) / (left if self.shares else 1.0)
        if self.strength is not None and abs(factor - 1) > 1e-14:
            value = getattr(model, self.strength)
            model.set_params(**{self.strength: value / factor if self.strength == "C" else value * factor})
        if "random_state" in model.get_params() and model.random_state is None:
            model.set_params(random_state=seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # not converged: the model itself was not
                X, y, extra = self._rows(model, weights)
                model.fit(X, y, **extra)
        except (ValueError, TypeError) as error:
            message = (
                f"{type(model).__name__}.fit() refused the rows that are left: {first_line(error)}. Leave out or "
                "change other rows, or pass another retrain=, such as LBFGS()."
            )
            raise InvalidInput(message) from error
        rows = replace(self.fit, estimator=model, sample_weight=weights)
        return self.read(model), None if self.held is None else self.held(rows)[0]

    def _rows(self, model: Any, weights: NDArray[np.float64]) -> tuple[Any, Any, dict[str, Any]]:
        """What fit() takes: with weights where it can, else without the rows that have none."""
        if "sample_weight" in inspect.signature(model.fit).parameters:
            return self.fit.X, np.asarray(self.fit.y), {"sample_weight": weights}
        keep = np.flatnonzero(weights)
        if np.ptp(weights[keep]) > 0:
            message = "its fit() takes no sample_weight in this version, and the weights differ"
            raise ValueError(message)
        return self.fit.X[keep], np.asarray(self.fit.y)[keep], {}


@dataclass(frozen=True)
class Built:
    """What a builder reads off an estimator.

    Args:
        objective: with θ̂.
        targets: turns labels into what the loss expects.
        own: the estimator's own prediction for rows of X, to compare with.
        class_weights: the factor in wᵢ of each encoded target.
        predictor: the objective's prediction for encoded rows, comparable with `own`.
        inputs: how rows of X become the objective's inputs.
        closed_form: whether fit() ends at the minimum to rounding, on dense data.
        stretched: a warning about what the theory is asked to bear, or "".
        again: how to fit it again, if it can be.
    """

    objective: Objective
    targets: Callable[[Any], NDArray[Any]]
    own: Callable[[Any], Any]
    class_weights: Callable[[NDArray[Any]], NDArray[np.float64]] = field(default=lambda targets: np.ones(len(targets)))
    predictor: Callable[[Objective, Any], Tensor] = linear.predictor
    inputs: Inputs = field(default_factory=AsGiven)
    closed_form: bool = False
    stretched: str = ""
    again: Again | None = None


Builder = Callable[[Fit], Built]


def refuse_early_stopping(fit: Fit) -> None:
    """Raises for rows that were held out of the fit.

    Raises:
        UnsupportedModel: if there are any.
    """
    model = fit.estimator
    if getattr(model, "early_stopping", False):
        message = (
            f"{fit.name}(early_stopping=True) held {model.validation_fraction:.0%} of the rows out of the fit, at "
            "random, and these have no influence. Refit with early_stopping=False."
        )
        raise UnsupportedModel(message)


def linear_objective(
    fit: Fit,
    loss: Loss,
    coef: Any,
    intercept: Any,
    penalty: L2 | None,
    *,
    folded: bool = False,
    gauge: str = "none",
    name: str | None = None,
) -> Objective:
    """The objective of a linear predictor η = coef · x + intercept.

    Args:
        fit: the estimator and its rows.
        loss: ℓ; if it stands for a loss with kinks, values are reported of that one.
        coef: (K, d).
        intercept: (K,), or None when there is none.
        penalty: r.
        folded: what penalty_per_example=None means for this estimator.
        gauge: "none", "intercept" or "all": which blocks a common shift of all outputs leaves the loss unchanged and
            free.
        name: for people; None takes the estimator's.
    """
    coef = matrix(coef)
    params = {"coef": torch.from_numpy(coef)}
    if intercept is not None:
        params["intercept"] = torch.from_numpy(_filled(intercept, len(coef)))
    structure = Linear(loss, len(coef), coef.shape[1], intercept is not None, loss.limit)

    def outputs(params: dict[str, Tensor], example: Any) -> Tensor:
        eta = params["coef"] @ example[0].to(params["coef"])
        return eta + params["intercept"] if "intercept" in params else eta

    return Objective(
        lambda params, example: loss(outputs(params, example), example[1]),
        params,
        penalty=penalty,
        penalty_per_example=fit.folded(folded),
        outputs=outputs,
        output_loss=lambda output, example: loss(output, example[1]),
        linear=structure,
        gauge=None
        if gauge == "none" or (gauge == "intercept" and intercept is None)
        else _shift_projector(structure, gauge),
        name=name or fit.name,
    )


def l2(coef: Any = 0.0, intercept: Any = 0.0) -> L2 | None:
    """r = (λ/2)‖coef‖² + (λ₀/2)‖intercept‖²; blocks of strength 0 are left out, and None is no penalty."""
    strengths = {
        name: np.asarray(value).item() if np.size(value) == 1 else torch.as_tensor(value)
        for name, value in (("coef", coef), ("intercept", intercept))
        if np.any(value)
    }
    return L2(strengths) if strengths else None


def read_linear(*, intercept: bool = True) -> Callable[[Any], dict[str, Any]]:
    """Reads coef_ and intercept_ as the blocks of a linear objective."""

    def read(model: Any) -> dict[str, Any]:
        coef = matrix(model.coef_)
        return {"coef": coef} | ({"intercept": _filled(model.intercept_, len(coef))} if intercept else {})

    return read


def matrix(coef: Any) -> NDArray[np.float64]:
    """Coefficients as a dense (K, d) float64 array."""
    dense = coef.toarray() if scipy.sparse.issparse(coef) else coef
    return np.array(np.atleast_2d(dense), dtype=np.float64)


def _filled(intercept: Any, K: int) -> NDArray[np.float64]:
    """One intercept per output; scikit-learn writes a single 0.0 for none."""
    return np.broadcast_to(np.asarray(intercept, dtype=np.float64), (K,)).copy()


def _shift_projector(structure: Linear, gauge: str) -> Callable[[Tensor], Tensor]:
    """Removes a common shift of all outputs, from the intercepts only or from every parameter."""
    K, split = structure.n_outputs, structure.n_outputs * structure.n_features

    def project(V: Tensor) -> Tensor:
        out = V.clone()
        if gauge == "all":
            coef = out[:, :split].reshape(len(V), K, -1)
            out[:, :split] = (coef - coef.mean(1, keepdim=True)).reshape(len(V), -1)
        if structure.intercept:
            out[:, split:] -= out[:, split:].mean(1, keepdim=True)
        return out

    return project
