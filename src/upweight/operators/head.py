"""A frozen linear layer at the model's end counts to the criterion, as the lm_head does beside adapters.

With f = W h and W held, Jᵀ (∂²ℓ/∂f²) J is the same with h as the output, and Wᵀ (∂²ℓ/∂f²) W as its middle: d numbers
a position in place of a vocabulary of them, and the derivatives of h never pass through W.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.data.trees import take
from upweight.model import calculus
from upweight.model.objective import Objective
from upweight.operators.cut import Watch, same


class _Layers(TorchFunctionMode):
    """Counts linear layers; before the one numbered `stop` it gives zeros that were not computed.

    Args:
        stop: a number, or None to run all of them.
    """

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.count = stop, 0
        self.taken: tuple[Tensor, Tensor, Tensor | None] | None = None  # of the last one: h, W and b
        self.given: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        self.count += 1
        stopped = self.stop is not None and self.count >= self.stop
        if not stopped or self.count == self.stop:
            named = dict(zip(("input", "weight", "bias"), args, strict=False), **(kwargs or {}))
            self.taken = named["input"], named["weight"], named.get("bias")
        if stopped:
            h, W, _ = self.taken  # type: ignore[misc]
            return h.new_zeros(1).expand(*h.shape[:-1], len(W))
        self.given = func(*args, **(kwargs or {}))
        return self.given


def before_head(objective: Objective, batch: Any) -> Objective:
    """The same loss, with what a frozen last layer takes as the outputs; as it is where there is none, or it is narrow.

    Cost: losses of up to 4 rows.
    """
    whole, criterion = calculus.structure(objective)
    example = take(batch, 0)
    with _Layers() as layers, Watch() as seen:
        output = whole(calculus.leaves_of(objective), example)
    chain = seen.back(output)
    last = chain[-1][0] if chain else output
    if layers.given is None or last is not layers.given or layers.taken is None:
        return objective
    h, W, b = layers.taken
    if W.requires_grad or (b is not None and b.requires_grad) or h.numel() >= output.numel():
        return objective
    steps = [step for _, step in reversed(chain)]

    def outputs(params: Any, example: Any) -> Tensor:
        with _Layers(layers.count) as now:
            whole(params, example)
        assert now.taken is not None
        return now.taken[0]

    def output_loss(h: Tensor, example: Any) -> Tensor:
        f = torch.nn.functional.linear(h, W, b)
        for step in steps:
            f = step(f)
        return criterion(f, example)

    found = replace(objective, outputs=outputs, output_loss=output_loss)
    return found if same(objective, found, batch) else objective
