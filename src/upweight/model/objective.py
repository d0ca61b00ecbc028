"""What was minimised: the loss of ONE example, the penalty, and the fitted θ̂.

    R(θ) = (1/n) Σᵢ wᵢ L(zᵢ, θ) + r(θ)

n is the number of training rows (not Σw), L has no reduction, and r is the `penalty`. This is the one place where
the formula stands; everything else follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.trees import like, tree_map
from upweight.errors import InvalidInput, first_line
from upweight.model.losses import Loss
from upweight.model.modules import chosen_parameters, forward, moving_buffers, refuse_training_mode

Params = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class L2:
    """The penalty r(θ) = Σ_blocks ½ λ_block ‖θ_block‖² + tilt_block · θ_block; a block that is not named is free.

    A strength, and a tilt, may be a tensor that broadcasts against its block. The tilt is what an l1 penalty is where
    no parameter changes its sign; it has no curvature.

    Raises:
        InvalidInput: if strengths or tilts are not named.
    """

    strengths: Mapping[str, float | Tensor]
    tilt: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given in (self.strengths, self.tilt):
            if not isinstance(given, Mapping):
                message = (
                    f"L2 was given {given!r}, and it takes a strength for each block by its name. Name the blocks, as "
                    "in L2({'weight': 0.01}); one number for all of them is the penalty itself: penalty=0.01."
                )
                raise InvalidInput(message)

    def __call__(self, params: Params) -> Tensor:
        """r(θ), a scalar."""
        blocks = _as_blocks(params)
        terms = [(strength * blocks[name] ** 2).sum() / 2 for name, strength in self.strengths.items()]
        terms += [(slope * blocks[name]).sum() for name, slope in self.tilt.items()]
        return torch.stack(terms).sum() if terms else next(iter(blocks.values())).new_zeros(())

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={value:.3g}" if isinstance(value, int | float) else name for name, value in self.strengths.items()
        )
        return f"L2({inside}{''.join(f', tilted {name}' for name in self.tilt)})"

    def scaled(self, factor: float) -> L2:
        """factor · r."""
        return L2(
            {name: factor * strength for name, strength in self.strengths.items()},
            {name: factor * slope for name, slope in self.tilt.items()},
        )


@dataclass(frozen=True)
class Linear:
    """Structure: L(z, θ) = ℓ(η, y) and η = coef · x + intercept, so all derivatives have closed forms.

    θ has the blocks `coef` (K, d) and, if `intercept`, `intercept` (K,), in that order. `reported` is the loss that
    people are shown the values of, when `loss` is a smooth stand-in for it.
    """

    loss: Loss
    n_outputs: int
    n_features: int
    intercept: bool
    reported: Loss | None = None


@dataclass(frozen=True)
class Route:
    """How autograd runs on this objective, found by a probe: see `routes.probe`.

    `plan` is that of `layers.plan`; `slow` are operations that vmap takes row by row.
    """

    examples: str = "vmap"
    cotangents: str = "batched"
    reason: str = ""
    plan: Any = field(default=None, compare=False)
    slow: tuple[str, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        row_by_row = f"{', '.join(self.slow)} row by row, for torch has no batching rule" if self.slow else ""
        why = "; ".join(part for part in (self.reason, row_by_row) if part)
        return f"{self.examples} over examples, {self.cotangents} over vectors" + (f" ({why})" if why else "")


@dataclass(frozen=True)
class Objective:
    """The training objective R(θ) = (1/n) Σᵢ wᵢ L(zᵢ, θ) + r(θ), at its fitted parameters θ̂.

    The weights wᵢ live with the data, in `Examples`.

    Args:
        loss: `loss(params, example)` → scalar tensor, the loss of one example; no mean, no sum, no penalty.
        params: θ̂, a floating-point tensor or a dict of them. Only what is here is differentiated.
        penalty: r. A float λ means (λ/2)‖θ‖² over all of `params`, biases included (torch's weight_decay); a callable
            gets `params` and returns a scalar; None means no penalty.
        penalty_per_example: what removing a row does to r. True: the row takes its share wᵢ/Σw of r along (the
            paper, which folds the penalty into L). False or None: r stays as it is.
        outputs, output_loss: the same loss in two steps, L = output_loss(outputs(params, example), example), which the
            Gauss–Newton matrix needs; `from_module` sets both.
        linear: the closed-form structure, set by the scikit-learn adapters.
        gauge: a function that projects (k, p) vectors off the directions in which R is constant by construction.
        route: how autograd runs; set by `routes.probe`.
        fixed: what the loss reads beside `params`, by name: buffers, and parameters that are not differentiated.
        settled: the state of a frozen body, by name: examples are its features already, so it cannot change.
        moving: the names in `fixed` that training changes by itself, as BatchNorm's running statistics.
        coverage: fraction of the model's parameters that `params` holds.
        name: what this objective belongs to, for people.

    Raises:
        InvalidInput: if params are empty, not floating point, or not finite; or the penalty is no number ≥ 0.
    """

    loss: Callable[[Any, Any], Tensor]
    params: Params
    _: KW_ONLY
    penalty: float | Callable[[Any], Tensor] | None = None
    penalty_per_example: bool | None = None
    outputs: Callable[[Any, Any], Tensor] | None = None
    output_loss: Callable[[Tensor, Any], Tensor] | None = None
    linear: Linear | None = None
    gauge: Callable[[Tensor], Tensor] | None = None
    route: Route = field(default_factory=Route)
    fixed: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    settled: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    moving: tuple[str, ...] = ()
    coverage: float = 1.0
    name: str = "loss"

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", _checked_params(self.params))
        if self.penalty_per_example not in (None, True, False):
            message = f"penalty_per_example={self.penalty_per_example!r}. Pass True, False, or None for the default."
            raise InvalidInput(message)
        penalty = self.penalty
        if isinstance(penalty, int | float | np.number) and not isinstance(penalty, bool):
            if not (np.isfinite(penalty) and penalty >= 0):
                message = (
                    f"penalty={penalty}. A number λ means (λ/2)‖θ‖² and must be finite and ≥ 0; for anything else "
                    "pass a function of params."
                )
                raise InvalidInput(message)
            object.__setattr__(
                self, "penalty", L2({name: float(penalty) for name in self.blocks}) if penalty > 0 else None
            )
        elif isinstance(penalty, L2):
            _check_strengths(penalty, self.blocks)
        elif penalty is not None and not callable(penalty):
            message = (
                f"penalty is a {type(penalty).__name__}. Pass a float λ for (λ/2)‖θ‖², a function of params, or None."
            )
            raise InvalidInput(message)

    @property
    def blocks(self) -> dict[str, Tensor]:
        """θ̂ as named blocks, in the order of the flat vector."""
        return _as_blocks(self.params)

    @property
    def size(self) -> int:
        """p, the number of differentiated parameters."""
        return sum(block.numel() for block in self.blocks.values())

    @property
    def reference(self) -> Tensor:
        """A tensor that carries the dtype and the device of θ̂."""
        return next(iter(self.blocks.values()))

    @property
    def folded(self) -> bool:
        """Whether removing a row removes its share of the penalty."""
        return bool(self.penalty_per_example) and self.penalty is not None

    @property
    def measure(self) -> str:
        """What a query's value is, in words: "loss", or the name of the loss that a smooth one stands for."""
        return "loss" if self.linear is None or self.linear.reported is None else self.linear.reported.name

    @property
    def autograd(self) -> str:
        """How derivatives are computed, in words."""
        return repr(self.route) if self.linear is None else "closed form of a linear predictor"

    @property
    def theta(self) -> Float[Tensor, " p"]:
        """θ̂ as one flat float64 vector."""
        return self.ravel(self.params).double()

    def ravel(self, params: Params) -> Float[Tensor, " p"]:
        """The blocks of `params`, flattened and joined."""
        return torch.cat([block.reshape(-1) for block in _as_blocks(params).values()])

    def unravel(self, vector: Float[Tensor, " p"]) -> Params:
        """A flat vector in the shape of `params`, in the dtype of θ̂."""
        blocks = self.blocks
        parts = vector.split([block.numel() for block in blocks.values()])  # the derivative of a slice is as long as θ
        pieces = {
            name: part.reshape(blocks[name].shape).to(blocks[name]) for name, part in zip(blocks, parts, strict=True)
        }
        return pieces if isinstance(self.params, dict) else next(iter(pieces.values()))

    def at(self, theta: Float[Tensor, " p"]) -> Objective:
        """The same objective at other parameters."""
        return replace(self, params=self.unravel(theta))

    def beside(self, fixed: Mapping[str, Tensor]) -> Objective:
        """The same objective with other values of some of what is `fixed`."""
        if not fixed:
            return self

        def reading(function: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
            return lambda params, example: function({**params, **fixed}, example)

        outputs = None if self.outputs is None else reading(self.outputs)
        return replace(self, loss=reading(self.loss), outputs=outputs, fixed={**self.fixed, **fixed})

    def measuring(self, measure: Callable[[Any, Any], Tensor]) -> Objective:
        """An objective whose loss is any other scalar of (params, example); for what a query asks."""
        return replace(
            self,
            loss=measure,
            outputs=None,
            output_loss=None,
            linear=None,
            route=Route(),
            name=getattr(measure, "__name__", "measure"),
        )

    def reporting(self) -> Objective:
        """An objective with the loss that is reported, for values; the same one unless its loss is a stand-in."""
        if self.linear is None or self.linear.reported is None:
            return self
        return replace(self, linear=replace(self.linear, loss=self.linear.reported, reported=None))

    def project(self, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """V without its part along the gauge directions."""
        return V if self.gauge is None else self.gauge(V)

    @classmethod
    def from_module(
        cls,
        model: torch.nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        penalty: float | Callable[[Any], Tensor] | None = None,
        penalty_per_example: bool | None = None,
        parameters: Iterable[str] | Callable[[str], bool] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Objective:
        """The objective of a torch module: an example (x, y) costs criterion(model(x[None]), y[None]).

        The module is never changed; its chosen parameters are copied, so later training does not move θ̂.

        Args:
            model: in the mode it should be explained in, normally after `model.eval()`.
            criterion: of a batch of one, for example `torch.nn.functional.cross_entropy`.
            penalty: as for Objective.
            penalty_per_example: as for Objective, but None means True unless the criterion says reduction="sum": a
                script that minimises a mean + penalty keeps the penalty when a row is deleted, so that the row takes
                its share along (ADR 4).
            parameters: names (or a test on names) of the parameters to differentiate; None takes all with
                requires_grad.
            dtype: precision of the arithmetic; None means the precision of the weights.

        Raises:
            UnsupportedModel: if nothing is left to differentiate, or dropout or batch statistics are active.
        """
        refuse_training_mode(model)
        share = getattr(criterion, "reduction", "mean") != "sum" if penalty_per_example is None else penalty_per_example
        chosen = chosen_parameters(model, parameters)
        total = sum(parameter.numel() for parameter in model.parameters())
        params = {name: parameter.detach().clone() for name, parameter in chosen.items()}
        fixed = {
            name: tensor.detach().clone()
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if name not in chosen
        }
        if dtype is not None:
            params = {name: tensor.to(dtype) for name, tensor in params.items()}
            fixed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in fixed.items()}

        def outputs(params: dict[str, Tensor], example: Any) -> Tensor:
            refuse_training_mode(model)  # the user may have called model.train() since
            one = tree_map(lambda leaf: leaf[None], like(example[0], next(iter(params.values()))))
            return forward(model, {**fixed, **params}, one)

        def output_loss(output: Tensor, example: Any) -> Tensor:
            return criterion(output, example[1][None])

        def loss(params: dict[str, Tensor], example: Any) -> Tensor:
            return output_loss(outputs(params, example), example)

        return cls(
            loss,
            params,
            penalty=penalty,
            penalty_per_example=share,
            outputs=outputs,
            output_loss=output_loss,
            fixed=fixed,
            moving=moving_buffers(model),
            coverage=sum(tensor.numel() for tensor in params.values()) / total,
            name=f"{type(model).__name__} with {getattr(criterion, '__name__', type(criterion).__name__)}",
        )


def _check_strengths(penalty: L2, blocks: Mapping[str, Tensor]) -> None:
    for name, strength in penalty.strengths.items():
        if name not in blocks:
            message = f"L2 penalises '{name}', and the parameters are {', '.join(blocks)}. Name one of them."
            raise InvalidInput(message)
        spread = _spread(strength, name, blocks[name])
        if not bool(torch.isfinite(spread).all()) or float(spread.min()) < 0:
            message = f"L2 has the strength {float(spread.min()):g} for '{name}'. Pass a finite λ ≥ 0."
            raise InvalidInput(message)
    for name, slope in penalty.tilt.items():
        if name not in blocks:
            message = f"L2 tilts '{name}', and the parameters are {', '.join(blocks)}. Name one of them."
            raise InvalidInput(message)
        if not bool(torch.isfinite(_spread(slope, name, blocks[name])).all()):
            message = f"L2 tilts '{name}' by {slope}. Pass finite numbers."
            raise InvalidInput(message)


def _spread(value: Any, name: str, block: Tensor) -> Tensor:
    """A strength or a tilt for every parameter of a block."""
    try:
        return torch.as_tensor(value, dtype=torch.float64).expand(block.shape)
    except (RuntimeError, TypeError, ValueError) as error:
        message = (
            f"What L2 gives '{name}' does not fit its shape {tuple(block.shape)} ({first_line(error)}). Pass one "
            "number, or a tensor of that shape."
        )
        raise InvalidInput(message) from error


def _as_blocks(params: Params) -> dict[str, Tensor]:
    return params if isinstance(params, dict) else {"theta": params}


def _checked_params(params: Any) -> Params:
    """Copies, so that later training does not move θ̂: all finite and floating-point."""

    def check(name: str, value: Any) -> Tensor:
        try:
            tensor = value.detach().clone() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
        except (TypeError, ValueError) as error:
            message = (
                f"Parameter '{name}' is a {type(value).__name__}, which is no tensor ({error}). Pass a dict of tensors."
            )
            raise InvalidInput(message) from error
        if not tensor.is_floating_point():
            message = (
                f"Parameter '{name}' has dtype {tensor.dtype}; only floating-point parameters can be "
                "differentiated. Convert it with .double()."
            )
            raise InvalidInput(message)
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            message = (
                f"Parameter '{name}' holds {bad} NaN or infinite values: training diverged. Refit the model before "
                "explaining it."
            )
            raise InvalidInput(message)
        return tensor

    if isinstance(params, Mapping) and not params:
        message = "params is empty, so there is nothing to differentiate. Pass the fitted parameters, by their names."
        raise InvalidInput(message)
    checked = (
        {str(name): check(str(name), value) for name, value in params.items()}
        if isinstance(params, Mapping)
        else check("params", params)
    )
    if not any(block.numel() for block in _as_blocks(checked).values()):
        message = (
            "params has no elements, so there is nothing to differentiate. Pass a dict of tensors, or one tensor: the "
            "fitted parameters."
        )
        raise InvalidInput(message)
    return checked
