"""Columns that repeat or add up to others, each beside the same fit without what is too many."""

from __future__ import annotations

import numpy as np

N = 60
DRAW = np.random.default_rng(0)
FREE = DRAW.normal(size=(N, 3))
KIND = DRAW.integers(0, 4, N)
Y = FREE[:, 0] + 0.5 * (KIND == 1) + DRAW.normal(size=N)
REDUNDANT = {
    "a column twice": (np.c_[FREE, FREE[:, 0]], FREE),
    "a column twice in other units": (np.c_[FREE, 100 * FREE[:, 0]], FREE),
    "a sum of others": (np.c_[FREE, FREE @ [1.0, -2.0, 0.5]], FREE),
    "all levels beside an intercept": (np.c_[FREE, np.eye(4)[KIND]], np.c_[FREE, np.eye(4)[KIND][:, 1:]]),
    "a constant column": (np.c_[FREE, np.full(N, 3.0)], FREE),
    "a column of zeros": (np.c_[FREE, np.zeros(N)], FREE),
    "two at once": (np.c_[FREE, FREE[:, :2] @ [[1.0, 0.0], [1.0, 2.0]]], FREE),
}
