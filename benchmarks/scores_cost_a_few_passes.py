"""Claim: scores of every row for 100 queries cost little more than one forward-backward pass, and no memory with n.

A convolutional network of 0.98 million parameters on MNIST; 1, 10 and 100 right-hand sides that are at hand.
`scoring.with_rows` over n rows against plain forward-backward passes over the same rows, in the same batches, and the
2·q·p flops of the dot products at the rate of a matrix product, in one run; peak memory at two
sizes of n, each in its own process.

    UPWEIGHT_DATA=… python benchmarks/scores_cost_a_few_passes.py [rows]   # → results/scores_cost_a_few_passes.json
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from common import gigaflops, report, seconds
from torch import Tensor, nn

import upweight as uw
from upweight.influence import scoring
from upweight.solvers import Solution

HERE = Path(__file__).parent
QUERIES, BATCH = (1, 10, 100), 250


def network() -> nn.Module:
    torch.manual_seed(0)
    widths, strides = (1, 32, 64, 128, 256, 256), (2, 2, 1, 2, 1)
    stages = [
        layer
        for i, o, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        for layer in (nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.ReLU())
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def rows(n: int) -> tuple[Tensor, Tensor]:
    data = uw.datasets.mnist()
    images = np.concatenate([data.images, data.test_images])[:n].reshape(-1, 1, 28, 28) / 255
    return torch.from_numpy(images).float(), torch.from_numpy(
        np.concatenate([data.labels, data.test_labels])[:n]
    ).long()


def explained(n: int) -> uw.Influence:
    X, y = rows(n)
    identity = uw.operators.Identity()
    return uw.explain(network(), X, y, loss=nn.functional.cross_entropy, curvature=identity, batch_size=BATCH)


def at_hand(queries: int, p: int) -> Solution:
    S = torch.randn(queries, p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Solution(S, torch.zeros(queries), converged=True)


def scores(influence: uw.Influence, solution: Solution) -> np.ndarray:
    """The step of `on_loss` that grows with n: S · ∇L for every row."""
    return scoring.with_rows(influence.system, solution, torch.zeros_like(solution.x[0])).mean


def passes(model: nn.Module, X: Tensor, y: Tensor) -> None:
    """What training does for one epoch, without its step."""
    for start in range(0, len(X), BATCH):
        model.zero_grad()
        nn.functional.cross_entropy(model(X[start : start + BATCH]), y[start : start + BATCH]).backward()


def peak(n: int) -> float:
    """Peak memory in GiB of the scores of n rows, in a process of its own."""
    code = (
        f"import resource, scores_cost_a_few_passes as b; i = b.explained({n}); "
        "b.scores(i, b.at_hand(10, i.objective.size)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=HERE).stdout
    return int(out) / 2**20


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    influence = explained(n)
    p = influence.objective.size
    scores(explained(2 * BATCH), at_hand(2, p))  # warm the caches of every library
    model, (X, y) = network(), rows(n)
    passes(model, X[: 2 * BATCH], y[: 2 * BATCH])
    took = {}
    for queries in QUERIES:
        solution = at_hand(queries, p)
        took[queries], _ = seconds(lambda solution=solution: scores(influence, solution))
    plain, _ = seconds(lambda: passes(model, X, y))
    rate = gigaflops(torch.float32)
    dots = {queries: 2 * queries * p * n / rate / 1e9 for queries in QUERIES}
    numbers = {
        "parameters": p,
        "rows": n,
        "scores_seconds": took,
        "forward_backward_seconds": plain,
        "dot_product_seconds_at_the_rate_of_a_matrix_product": dots,
        "gigaflops_float32": rate,
        "over_forward_backward": {queries: took[queries] / plain for queries in QUERIES},
        "over_forward_backward_and_dot_products": {
            queries: took[queries] / (plain + dots[queries]) for queries in QUERIES
        },
        "passes_per_row": "1 forward, 1 backward, whatever the number of queries",
        "bytes_per_query": 8 * p + 8 * n,
        "peak_gib_4000_rows": peak(4000),
        "peak_gib_16000_rows": peak(16000),
    }
    report(__file__, {"queries": QUERIES, "batch": BATCH}, numbers)


if __name__ == "__main__":
    main()
