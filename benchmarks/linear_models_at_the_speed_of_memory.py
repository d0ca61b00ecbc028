"""Claim: on models with a linear predictor exact answers cost about what reading the data and multiplying it must.

Softmax regression on 55,000 MNIST digits (p = 7,840, L2 0.01), residual 1e-5, against plain conjugate gradients in
NumPy (float64) in the same run; then the exact Hessian and the self-influence of every row beside their flop bounds.
Times run from `uw.explain(...)` to `.values`: validation, the checks of the fit and all preparation are in them,
imports are not.

    UPWEIGHT_DATA=… python benchmarks/linear_models_at_the_speed_of_memory.py      # a few minutes on 2 cores
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from common import gigabytes_per_second, gigaflops, median_seconds, numpy_cg, report, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.solvers import CG, Cholesky, TwoLevel

L2, RTOL, QUERIES, NUMPY_QUERIES = 0.01, 1e-5, 100, 5


def rested(function: Callable[[], object]) -> float:
    """Its seconds, begun when the idle threads of the other library have stopped spinning on the cores."""
    time.sleep(0.5)
    return seconds(function)[0]


def main() -> None:
    data = uw.datasets.mnist()
    X, y = data.images[5000:] / 255, data.labels[5000:]
    n, d = X.shape
    model = LogisticRegression(C=1 / (L2 * n), fit_intercept=False, tol=1e-7, max_iter=1000).fit(X, y)
    Xq, yq = data.test_images[:QUERIES] / 255, data.test_labels[:QUERIES]

    def ours(queries: int) -> uw.Scores:
        influence = uw.explain(model, X, y, solver=CG(rtol=RTOL, preconditioner=TwoLevel()))
        return influence.on_loss(
            Xq[8 : 8 + queries] if queries == 1 else Xq, yq[8 : 8 + queries] if queries == 1 else yq
        )

    def naive(query: int) -> tuple[np.ndarray, int]:
        P = model.predict_proba(X)
        v = np.outer(model.predict_proba(Xq[query : query + 1])[0] - np.eye(10)[yq[query]], Xq[query])
        s, steps = numpy_cg(X, P, v, l2=L2, rtol=RTOL)
        return ((X @ s.T) * (P - np.eye(10)[y])).sum(1) / n, steps

    ours(1)  # warm the caches of every library
    one, alone, speeds = [], [], []
    for _ in range(5):  # side by side, so that other work on the machine slows both
        speeds.append((gigaflops(torch.float32), gigaflops(torch.float64), gigabytes_per_second()))
        one.append(rested(lambda: ours(1)))
        alone.append(rested(lambda: naive(8)))
    single = ours(1)
    reference, steps = naive(8)
    fast, exact, bandwidth = np.median(speeds, 0)
    hundred, scores = seconds(lambda: ours(QUERIES))
    several = [seconds(lambda q=q: naive(q))[0] for q in range(NUMPY_QUERIES)]
    print({"one": one, "numpy": alone, "hundred": hundred, "numpy several": several}, flush=True)

    influence = uw.explain(model, X, y, solver=Cholesky())
    assembling = median_seconds(influence.operator.matrix, 1)
    preparing, _ = seconds(lambda: influence.prepared)
    selfing, own = seconds(influence.of_self)
    outside = single.certificate.sweeps
    pass_flops = 4 * n * d * 10
    numbers = {
        "one_query_seconds": float(np.median(one)),
        "numpy_cg_seconds": float(np.median(alone)),
        "one_query_speedup": float(np.median(np.array(alone) / np.array(one))),
        "hundred_queries_seconds": hundred,
        "hundred_queries_speedup": QUERIES * float(np.mean(several)) / hundred,
        "numpy_cg_products": steps,
        "passes_over_the_data": outside,
        "one_query_limit_seconds_of_bytes": outside * n * d * 4 / (bandwidth * 1e9),
        "one_query_limit_seconds_of_flops": outside * pass_flops / (fast * 1e9),
        "hundred_queries_limit_seconds_of_flops": scores.certificate.sweeps * pass_flops * QUERIES / (fast * 1e9),
        "largest_residual": float(max(single.certificate.residual.max(), scores.certificate.residual.max())),
        "pearson_with_numpy_cg": float(np.corrcoef(single.values[0], reference)[0, 1]),
        "hessian_seconds": assembling,
        "hessian_over_flop_bound_float64": assembling / (45 * n * d * d / (exact * 1e9)),
        "prepare_cholesky_seconds": preparing,
        "self_influence_seconds": selfing,
        "self_influence_over_flop_bound_float64": selfing / (n * (10 * d) ** 2 / (exact * 1e9)),
        "self_influence_residual": float(own.certificate.residual.max()),
        "gigaflops_float32": float(fast),
        "gigaflops_float64": float(exact),
        "gigabytes_per_second": float(bandwidth),
        "peak_memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    settings = {"n": n, "p": 10 * d, "queries": QUERIES, "l2": L2, "rtol": RTOL, "numpy_queries_timed": NUMPY_QUERIES}
    report(__file__, settings, numbers)


if __name__ == "__main__":
    main()
