"""24 rows of two classes, and a small network for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

n = 24


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return X, (X[:, 0] + torch.randn(n, generator=draw, dtype=torch.float64) / 2 > 0).long()


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()
