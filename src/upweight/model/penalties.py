"""The penalty r(θ) of an objective and its derivatives at θ̂, in float64.

Each function but `share` is of the whole penalty, not of one row's part. An L2 penalty's Hessian is its diagonal; any
other penalty is differentiated through `calculus`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import InvalidInput, first_line
from upweight.model import calculus
from upweight.model.objective import L2, Objective
from upweight.model.transforms import undisturbed


def value(objective: Objective) -> float:
    """r(θ̂)."""
    return 0.0 if objective.penalty is None else float(_function(objective)(objective.params))


@undisturbed()
def gradient(objective: Objective) -> Float[Tensor, " p"]:
    """∇r(θ̂), float64."""
    if objective.penalty is None:
        return torch.zeros(objective.size, dtype=torch.float64)
    if isinstance(objective.penalty, L2):
        return diagonal(objective) * objective.theta.double().cpu() + _by_block(objective, objective.penalty.tilt)
    params = calculus.leaves_of(objective)
    r = _function(objective)(params)
    if not r.requires_grad:  # a constant penalty moves nothing
        return torch.zeros(objective.size, dtype=torch.float64)
    return calculus.vjps(r[None], params, r.new_ones(1, 1))[0].double().cpu()


def share(objective: Objective, total_weight: float, n: int) -> Float[Tensor, " p"]:
    """(n/Σw) ∇r when removing a row removes its share of the penalty, else 0: what is added to ∇L of every row."""
    if not objective.folded:
        return torch.zeros(objective.size, dtype=torch.float64)
    return gradient(objective) * (n / total_weight)


@undisturbed()
def hvp(objective: Objective, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """∇²r(θ̂) V, float64."""
    if objective.penalty is None:
        return torch.zeros_like(V)
    if isinstance(objective.penalty, L2):
        return V * diagonal(objective)
    params = calculus.leaves_of(objective)
    r = _function(objective)(params)
    if not r.requires_grad:
        return torch.zeros_like(V)
    first = calculus.vjps(r[None], params, r.new_ones(1, 1), create_graph=True)[0]
    if not first.requires_grad:
        return torch.zeros_like(V)
    return torch.stack(calculus.vjps(first, params, V.to(first))).to(V)


def add_hvp(total: Float[Tensor, "k p"], objective: Objective, V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """The sums, with ∇²r(θ̂) V added to them in place."""
    if objective.penalty is None:
        return total
    if isinstance(objective.penalty, L2):
        return total.addcmul_(V.to(total), diagonal(objective))
    return total.add_(hvp(objective, V))


def rows(objective: Objective, step: int = 256) -> Iterator[tuple[slice, Float[Tensor, "k p"]]]:
    """∇²r(θ̂), `step` rows at a time; nothing for an L2 penalty, whose Hessian is its diagonal.  Cost: p products."""
    if objective.penalty is None or isinstance(objective.penalty, L2):
        return
    for start in range(0, objective.size, step):
        part = slice(start, min(start + step, objective.size))
        eye = torch.zeros(part.stop - start, objective.size, dtype=torch.float64)
        eye[:, part].fill_diagonal_(1)
        yield part, hvp(objective, eye)


def diagonal(objective: Objective) -> Float[Tensor, " p"]:
    """The diagonal λ of an L2 penalty's Hessian, zero where a parameter is free."""
    return _by_block(objective, objective.penalty.strengths if isinstance(objective.penalty, L2) else {})


def _by_block(objective: Objective, values: Mapping[str, float | Tensor]) -> Float[Tensor, " p"]:
    """A number for every parameter, from one for each block or a tensor that broadcasts against it; 0 elsewhere."""
    pieces = [
        torch.as_tensor(values.get(name, 0.0), dtype=torch.float64).cpu().expand(block.shape).reshape(-1)
        for name, block in objective.blocks.items()
    ]
    return torch.cat(pieces)


def _function(objective: Objective) -> Callable[[Any], Tensor]:
    """r as a function of params that says what it returns if that is not one finite number."""

    def function(params: Any) -> Tensor:
        try:
            r = objective.penalty(params)  # type: ignore[operator, misc]
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            message = (
                f"The penalty failed: {type(error).__name__}: {first_line(error)}. It is called as penalty(params), "
                f"with params as in the Objective: {', '.join(objective.blocks)}."
            )
            raise InvalidInput(message) from error
        if not isinstance(r, Tensor) or r.shape != ():
            shape = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            message = (
                f"The penalty returned {shape}; it must return one number, a tensor of shape (), computed from params."
            )
            raise InvalidInput(message)
        if not bool(torch.isfinite(r.detach())):
            message = f"The penalty is {float(r.detach())} at the fitted parameters. Check it for log(0) or 0/0."
            raise InvalidInput(message)
        return r

    return function
