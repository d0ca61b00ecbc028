"""What a training found, as numbers that a folder keeps, and back again to the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.model.objective import L2, Objective


@dataclass(frozen=True)
class Found:
    """What a training found.

    Args:
        theta: (p,) its parameters.
        beside: other values of what the objective reads beside them, by name, such as running statistics.
        penalty: where it depends on what training found.
    """

    theta: Float[Tensor, " p"]
    beside: Mapping[str, Tensor]
    penalty: L2 | None

    def numbers(self, before: Objective) -> Float[NDArray[np.float64], " k"]:
        """All of it in one array, for a training of this objective."""
        strengths, tilt = ({}, {}) if self.penalty is None else (self.penalty.strengths, self.penalty.tilt)
        return _joined(
            [
                None if self.penalty is None else 1.0,
                self.theta,
                *map(self.beside.get, before.fixed),
                *map(strengths.get, before.blocks),
                *map(tilt.get, before.blocks),
            ]
        )

    @classmethod
    def read(cls, numbers: Float[NDArray[np.float64], " k"], before: Objective) -> Found:
        """What `numbers` holds."""
        f, b = len(before.fixed), len(before.blocks)
        has_penalty, theta, *rest = _parts(numbers, 2 + f + 2 * b)
        beside, strengths, tilt = (
            {name: part for name, part in zip(names, parts, strict=True) if part is not None}
            for names, parts in (
                (before.fixed, rest[:f]),
                (before.blocks, rest[f : f + b]),
                (before.blocks, rest[f + b :]),
            )
        )
        beside = {name: torch.as_tensor(part).to(before.fixed[name]) for name, part in beside.items()}
        return cls(theta, beside, None if has_penalty is None else L2(strengths, tilt))


def _joined(parts: Sequence[Any]) -> Float[NDArray[np.float64], " k"]:
    """Numbers and tensors in one array: of each its axes (how many, −1 for None, and how long), then all values."""
    tensors = [None if part is None else torch.as_tensor(part, dtype=torch.float64).detach() for part in parts]
    arrays = [None if tensor is None else tensor.cpu().numpy() for tensor in tensors]
    shapes = [[-1] if array is None else [array.ndim, *array.shape] for array in arrays]
    values = [array.reshape(-1) for array in arrays if array is not None]
    return np.concatenate([*shapes, *values]).astype(np.float64)


def _parts(joined: Float[NDArray[np.float64], " k"], count: int) -> list[Any]:
    """The `count` parts of a joined array; one without axes is a float."""
    shapes, place = [], 0
    for _ in range(count):
        axes = int(joined[place])
        shapes.append(None if axes < 0 else tuple(joined[place + 1 : place + 1 + axes].astype(int).tolist()))
        place += 1 + max(axes, 0)
    parts = []
    for shape in shapes:
        size = 0 if shape is None else math.prod(shape)
        part = torch.from_numpy(joined[place : place + size].copy())
        parts.append(None if shape is None else part.reshape(shape) if shape else float(part[0]))
        place += size
    return parts
