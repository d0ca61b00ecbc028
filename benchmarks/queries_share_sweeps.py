"""Claim: ten queries cost far less than ten times one, because all of them share every sweep over the data.

Softmax regression on the first 10,000 MNIST digits (p = 7,840, L2 0.01), residual 1e-6: `on_loss` for ten queries, the
same queries one at a time, and plain conjugate gradients in NumPy (float64, one query at a time), in one run.

    UPWEIGHT_DATA=… python benchmarks/queries_share_sweeps.py        # writes results/queries_share_sweeps.json
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import sklearn
import torch
from common import numpy_cg, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw

N, QUERIES, L2, RTOL = 10_000, 10, 0.01, 1e-6


def main() -> None:
    data = uw.datasets.mnist()
    X, y = data.images[:N] / 255, data.labels[:N]
    model = LogisticRegression(C=1 / (L2 * N), fit_intercept=False, tol=1e-6, max_iter=1000).fit(X, y)
    wrong = np.flatnonzero(model.predict(data.test_images / 255) != data.test_labels)[:QUERIES]
    Xq, yq = data.test_images[wrong] / 255, data.test_labels[wrong]
    influence = uw.explain(model, X, y, solver=uw.solvers.CG(rtol=RTOL))
    influence.on_loss(Xq[:1], yq[:1])  # warm the caches of every library

    P, Pq = model.predict_proba(X), model.predict_proba(Xq)
    G = (P - np.eye(10)[y])[:, :, None]

    def naive() -> np.ndarray:
        lines = []
        for query in range(QUERIES):
            v = np.outer(Pq[query] - np.eye(10)[yq[query]], Xq[query])
            s, _ = numpy_cg(X, P, v, l2=L2, rtol=RTOL)
            lines.append(((X @ s.T)[:, :, None] * G).sum((1, 2)) / N)
        return np.stack(lines)

    together, scores = seconds(lambda: influence.on_loss(Xq, yq))
    apart, _ = seconds(lambda: [influence.on_loss(Xq[q : q + 1], yq[q : q + 1]) for q in range(QUERIES)])
    plain, reference = seconds(naive)
    flops = scores.certificate.sweeps * 2 * 2 * N * X.shape[1] * 10 * QUERIES
    A = torch.randn(2000, 2000, dtype=torch.float64)
    A @ A
    product, _ = seconds(lambda: [A @ A for _ in range(5)])
    rate = 5 * 2 * 2000**3 / product
    numbers = {
        "ten_together_seconds": together,
        "one_at_a_time_over_together": apart / together,
        "numpy_cg_over_together": plain / together,
        "sweeps": scores.certificate.sweeps,
        "gigaflops_of_this_machine_float64": rate / 1e9,
        "together_over_flop_limit": together / (flops / rate),
        "pearson_with_numpy_cg": float(np.corrcoef(scores.values.ravel(), reference.ravel())[0, 1]),
        "largest_difference": float(np.abs(scores.values - reference).max() / np.abs(reference).max()),
    }
    settings = {"n": N, "p": X.shape[1] * 10, "queries": QUERIES, "l2": L2, "rtol": RTOL}
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    versions = {
        "upweight": uw.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sklearn": sklearn.__version__,
    }
    report = {"settings": settings, "numbers": numbers, "machine": machine, "versions": versions}
    text = json.dumps(report, indent=1)
    (Path(__file__).parent / "results" / "queries_share_sweeps.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
