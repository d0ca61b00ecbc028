"""Question: beside processes that keep every core busy, how does one query with the default compare with one thread?

MNIST softmax regression (n = 55,000, p = 7,840), one query to 1e-5, `uw.explain(...)` to `.values`, in processes of
their own that take turns: the default, `OMP_NUM_THREADS=1`, NumPy's float64 CG with one thread (with all one run
took 394 s), and an older build where its source folder is given. As many processes as there are cores multiply matrices
all the while.

    UPWEIGHT_DATA=… python benchmarks/beside_a_busy_process.py [TURNS] [../before/src]       # ten minutes
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from beside_another_build import theta

HERE = Path(__file__).parent
BUSY = "import numpy as np\nA = np.ones((300, 300))\nwhile True:\n    A @ A / 300\n"


def fitted() -> tuple[Any, Any, Any, Any]:
    """The model, its rows, and MNIST."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    import upweight as uw

    data = uw.datasets.mnist()
    X, y, coef = data.images[5000:] / 255, data.labels[5000:], np.load(os.environ["UPWEIGHT_BENCHMARK_THETA"])
    fit = LogisticRegression(C=1 / (0.01 * len(X)), fit_intercept=False)
    fit.coef_, fit.intercept_, fit.classes_ = coef, np.zeros(10), np.arange(10)
    fit.n_features_in_, fit.n_iter_ = coef.shape[1], np.array([1])
    return fit, X, y, data


def ours() -> float:
    """Seconds of the second of two calls."""
    import upweight as uw

    fit, X, y, data = fitted()
    for _ in range(2):
        start = time.perf_counter()
        solver = uw.solvers.CG(rtol=1e-5, preconditioner=uw.solvers.TwoLevel())
        uw.explain(fit, X, y, solver=solver, progress=False).on_loss(data.test_images[:1] / 255, data.test_labels[:1])
    return time.perf_counter() - start


def numpys() -> float:
    """The same by the textbook recurrence."""
    import numpy as np
    from common import numpy_cg

    fit, X, y, data = fitted()
    query, label = data.test_images[0] / 255, data.test_labels[0]
    start = time.perf_counter()
    Z = X @ fit.coef_.T
    P = np.exp(Z - Z.max(1, keepdims=True))
    P /= P.sum(1, keepdims=True)
    share = np.exp(fit.coef_ @ query - (fit.coef_ @ query).max())
    v = np.outer(share / share.sum() - np.eye(10)[label], query)
    s, _ = numpy_cg(X, P, v, l2=0.01, rtol=1e-5)
    _ = ((P - np.eye(10)[y]) * (X @ s.T)).sum(1)
    return time.perf_counter() - start


def process(source: Path, job: str, threads: str | None) -> tuple[float, float]:
    """Seconds and peak gigabytes of one of the two in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(source)} | ({} if threads is None else {"OMP_NUM_THREADS": threads})
    command = [sys.executable, __file__, "--job", job]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return float(told[-2]), float(told[-1])


def main(turns: int, before: Path | None) -> None:
    from common import report

    source = HERE.parent / "src"
    jobs = {
        "default": (source, "ours", None),
        "one thread": (source, "ours", "1"),
        "NumPy, one thread": (source, "numpy", "1"),
    } | ({} if before is None else {"older build": (before, "ours", None)})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UPWEIGHT_BENCHMARK_THETA"] = str(theta(Path(folder)))
        busy = [subprocess.Popen([sys.executable, "-c", BUSY], env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
                for _ in range(os.cpu_count() or 1)]  # fmt: skip
        try:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
            for turn in range(turns):
                for name in sorted(jobs, reverse=bool(turn % 2)):
                    found[name].append(process(*jobs[name]))
                    print(name, found[name][-1], flush=True)
        finally:
            for one in busy:
                one.kill()
    numbers = {
        name: {"seconds": statistics.median(s for s, _ in each), "peak_gigabytes": max(gb for _, gb in each)}
        for name, each in found.items()
    }
    default = [s for s, _ in found["default"]]
    ratios = {
        f"{name} over default": statistics.median(s / d for (s, _), d in zip(each, default, strict=True))
        for name, each in found.items()
        if name != "default"
    }
    report(__file__, {"turns": turns, "busy_processes": os.cpu_count(), "load": os.getloadavg()}, numbers | ratios)


if __name__ == "__main__":
    if "--job" in sys.argv:
        took = ours() if sys.argv[2] == "ours" else numpys()
        print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None)
