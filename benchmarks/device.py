"""Claim: a GPU answers as the processor does, and how much of it is used.

Scores of an MLP and of a small CNN on synthetic pictures, by EKFAC and by CG on the Gauss–Newton matrix, in float64 and
float32, on `cuda` and on `cpu`: their largest difference over the largest value beside what is allowed, rows per second
of a sweep (queries' products with every row), and the flops that torch counts in it, forward and backward, over those
of a matrix product on that device, now.

    python benchmarks/device.py                # two minutes on a GPU; results/device.json
    python benchmarks/device.py cpu 500        # the same script without a GPU: cpu beside cpu, on 500 rows
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import upweight as uw

SIDE, CLASSES, QUERIES, COMPARED = 28, 10, 16, 1024
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest value
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, 128), nn.Tanh(), nn.Linear(128, CLASSES)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, CLASSES),
    ),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "EKFAC": {"curvature": uw.operators.EKFAC(samples=1)},
    "CG": {"curvature": uw.operators.GaussNewton(), "solver": uw.solvers.CG(rtol=1e-6)},
}


def main(device: str, rows: int) -> None:
    numbers: dict[str, Any] = {}
    for net in NETS:
        for dtype in TOLERANCE:
            for way in WAYS:
                theirs = answered("cpu", net, dtype, way, min(rows, COMPARED))
                ours = answered(device, net, dtype, way, min(rows, COMPARED))
                apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                numbers[f"{net}, {dtype}, {way}: apart"] = apart
                if apart > TOLERANCE[dtype]:
                    sys.exit(f"{net}, {dtype}, {way}: {device} and cpu differ by {apart:.2g}, > {TOLERANCE[dtype]:.0e}")
            numbers[f"{net}, {dtype}: a sweep"] = {one: speed(one, net, dtype, rows) for one in {device, "cpu"}}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    settings = {
        "device": name,
        "rows": rows,
        "queries": QUERIES,
        "tolerance": {str(d): t for d, t in TOLERANCE.items()},
    }
    report(__file__, settings, numbers)


def explained(device: str, net: str, dtype: torch.dtype, rows: int, **settings: Any) -> tuple[uw.Influence, Any]:
    """The influence of a network, and its queries, all on a device."""
    torch.manual_seed(0)
    X = torch.randn(rows + QUERIES, 1, SIDE, SIDE)
    y = (X[:, 0, :2].mean((1, 2)) * 20 + 5).long().clamp(0, CLASSES - 1)
    module, X, y = NETS[net]().to(device, dtype), X.to(device, dtype), y.to(device)
    settings |= {"loss": nn.functional.cross_entropy, "damping": 1.0, "progress": False}
    return uw.explain(module, X[:rows], y[:rows], **settings), (X[rows:], y[rows:])


def answered(device: str, net: str, dtype: torch.dtype, way: str, rows: int) -> np.ndarray:
    influence, on = explained(device, net, dtype, rows, **WAYS[way])
    return influence.on_loss(*on).values


def speed(device: str, net: str, dtype: torch.dtype, rows: int) -> dict[str, float]:
    """Rows per second of the products of all rows with the queries' gradients, and the share of the device's peak."""
    influence, on = explained(device, net, dtype, rows, curvature=uw.operators.Identity())
    influence.on_loss(*on)
    least = min(timed(device, lambda: influence.on_loss(*on)) for _ in range(3))
    few, _ = explained(device, net, dtype, min(rows, 256), curvature=uw.operators.Identity())
    few.on_loss(*on)
    with FlopCounterMode(display=False) as counted:
        few.on_loss(*on)
    flops = counted.get_total_flops() / min(rows, 256) * rows
    return {"rows_per_second": rows / least, "share_of_peak": flops / least / peak(device, dtype)}


def timed(device: str, function: Callable[[], Any]) -> float:
    """Seconds of a call, and of what it has left to the device."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(device: str, dtype: torch.dtype) -> float:
    """Flops per second of a matrix product."""
    size = 8192 if device == "cuda" else 1024
    A = torch.ones(size, size, dtype=dtype, device=device)
    timed(device, lambda: A @ A)
    return 2 * size**3 / min(timed(device, lambda: A @ A) for _ in range(5))


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    if wanted == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. Try the script without one: python benchmarks/device.py cpu 500")
    main(wanted, int(sys.argv[2]) if len(sys.argv) > 2 else 60_000)
