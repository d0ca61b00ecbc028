"""Weight normalisation in operations of torch: the second derivative of torch's own operation is wrong.

`torch._weight_norm`, which both weight_norm of torch.nn.utils call, has right values and first derivatives, and a
Hessian that is not even symmetric (torch 2.13.0; see findings/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OWN: Any = torch._weight_norm  # pyright: ignore


def normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v/‖v‖, with the norm over all axes but one; over all of them where dim is −1, as torch has it.

    >>> import torch
    >>> normed(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0], [1.0]]))
    tensor([[3., 4.],
            [0., 1.]])
    """
    over = None if dim == -1 else tuple(axis for axis in range(v.ndim) if axis != dim)
    return v * (g / v.square().sum(over, keepdim=dim != -1).sqrt())
