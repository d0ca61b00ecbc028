"""Hypothesis strategies for what must not matter, and for what must matter exactly so."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


def batch_sizes() -> st.SearchStrategy[int]:
    return st.integers(1, 70)


def weights(n: int) -> st.SearchStrategy[np.ndarray]:
    """Positive weights of several magnitudes."""
    return seeds().map(lambda seed: np.exp(np.random.default_rng(seed).normal(size=n)))


def permutations(n: int) -> st.SearchStrategy[np.ndarray]:
    return seeds().map(lambda seed: np.random.default_rng(seed).permutation(n))


def subsets(n: int, at_most: int = 6) -> st.SearchStrategy[list[int]]:
    """Non-empty sets of rows, in any order."""
    return st.lists(st.integers(0, n - 1), min_size=1, max_size=at_most, unique=True)


def vectors(k: int, p: int) -> st.SearchStrategy[np.ndarray]:
    return seeds().map(lambda seed: np.random.default_rng(seed).normal(size=(k, p)))
