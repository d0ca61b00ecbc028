"""What every benchmark shares: clocks, the machine's own limits, and the report beside the script."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch

import upweight as uw


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long one call takes, and what it returns."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median time of several calls."""
    return float(np.median([seconds(function)[0] for _ in range(repeats)]))


def gigaflops(dtype: torch.dtype, size: int = 2000) -> float:
    """The rate of a square matrix product on this machine, now."""
    A = torch.ones(size, size, dtype=dtype)
    A @ A
    return 2 * size**3 / median_seconds(lambda: A @ A, 3) / 1e9


def gigabytes_per_second(numbers: int = 2**26) -> float:
    """How fast the sum of a large float32 array reads memory on this machine, now."""
    x = torch.ones(numbers)
    x.sum()
    return 4 * numbers / median_seconds(x.sum, 5) / 1e9


def numpy_cg(X: np.ndarray, P: np.ndarray, v: np.ndarray, *, l2: float, rtol: float) -> tuple[np.ndarray, int]:
    """The textbook recurrence on W (10, 784), with the softmax Hessian written out."""

    def product(w: np.ndarray) -> np.ndarray:
        Z = X @ w.T
        R = P * (Z - (P * Z).sum(1, keepdims=True))
        return R.T @ X / len(X) + l2 * w

    x, r = np.zeros_like(v), v.copy()
    p, rho, steps = r.copy(), float((r * r).sum()), 0
    while np.sqrt(rho) > rtol * np.linalg.norm(v):
        Ap = product(p)
        alpha = rho / float((p * Ap).sum())
        x += alpha * p
        r -= alpha * Ap
        new = float((r * r).sum())
        p, rho, steps = r + new / rho * p, new, steps + 1
    return x, steps


def report(script: str, settings: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Print the results and write them to results/NAME.json beside the script."""
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    versions = {module.__name__: module.__version__ for module in (uw, torch, np, scipy, sklearn)}
    text = json.dumps({"settings": settings, "numbers": numbers, "machine": machine, "versions": versions}, indent=1)
    path = Path(script)
    (path.parent / "results" / f"{path.stem}.json").write_text(text + "\n")
    print(text)
