"""Claim: a million rows are streamed at about the speed at which memory can be read.

Logistic regression on synthetic data, n = 1,000,000 × 100 float64: `on_loss` for ten queries and `of_self` for every
row, and one product with the Hessian (one pass over the data) beside the time that reading the data alone takes.

    python benchmarks/a_million_rows.py        # about a minute on 2 cores
"""

from __future__ import annotations

import resource

import numpy as np
import torch
from common import gigaflops, median_seconds, report, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw

N, D, QUERIES = 1_000_000, 100, 10


def main() -> None:
    draw = np.random.default_rng(0)
    X = draw.normal(size=(N, D))
    y = (X @ draw.normal(size=D) / 5 + draw.logistic(size=N) > 0).astype(int)
    model = LogisticRegression(C=1.0, tol=1e-8, solver="newton-cholesky").fit(X, y)
    Xq = draw.normal(size=(QUERIES, D))
    yq = (Xq.sum(1) > 0).astype(int)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    explaining, influence = seconds(lambda: uw.explain(model, X, y))
    asking, scores = seconds(lambda: influence.on_loss(Xq, yq))
    again, _ = seconds(lambda: influence.on_loss(Xq, yq))
    selfing, own = seconds(influence.of_self)
    vector = torch.ones(1, influence.objective.size, dtype=torch.float64)
    one_pass = median_seconds(lambda: influence.operator.apply(vector), 5)
    coarse = influence.operator.coarse
    coarse.apply(vector)
    one_coarse_pass = median_seconds(lambda: coarse.apply(vector), 5)
    tensor = torch.from_numpy(X)
    reading = median_seconds(tensor.sum, 5)
    exact = gigaflops(torch.float64)
    self_flops = N * (2 * D + D * D)
    numbers = {
        "explain_seconds": explaining,
        "ten_queries_seconds": asking,
        "ten_more_queries_seconds": again,
        "self_influence_seconds": selfing,
        "self_influence_over_flop_bound": selfing / (self_flops / (exact * 1e9)),
        "self_influence_over_reading": selfing / reading,
        "seconds_per_pass": one_pass,
        "seconds_to_read_the_data": reading,
        "pass_over_reading": one_pass / reading,
        "float32_pass_over_reading_half_the_bytes": one_coarse_pass / (reading / 2),
        "gigabytes_per_second": X.nbytes / reading / 1e9,
        "gigaflops_float64": exact,
        "largest_residual": float(max(scores.certificate.residual.max(), own.certificate.residual.max())),
        "memory_of_the_data_gigabytes": X.nbytes / 1e9,
        "memory_before_gigabytes": before,
        "peak_memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    report(__file__, {"n": N, "p": D + 1, "queries": QUERIES, "solver": repr(influence.solver)}, numbers)


if __name__ == "__main__":
    main()
