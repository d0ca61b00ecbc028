"""Claim: this build is not slower than another one: one query, 100 queries, scores of one CNN, and the certified solve
of an MLP (that of certified_solve.py, ten queries to 1e-4), in turns.

Each measurement is a process of its own that imports upweight from one of the two source folders, and
times `uw.explain(...)` to `.values`. Builds take turns, and the first of a pair changes; the ratio is the median over
the pairs.

    git worktree add --detach ../before COMMIT
    UPWEIGHT_DATA=… python benchmarks/beside_another_build.py ../before/src 5 [JOB …]      # those jobs alone
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
JOBS = ("one query", "100 queries", "CNN, 10 queries", "MLP, 10 queries to 1e-4")


def measured(job: str) -> float:
    """The seconds of one job in this process."""
    import numpy as np
    import torch

    import upweight as uw

    data = uw.datasets.mnist()
    if job.startswith("MLP"):
        from certified_solve import DAMPING, QUERIES, N, trained

        X = torch.from_numpy(data.images[:N] / 255).float()
        y = torch.from_numpy(data.labels[:N].astype(np.int64))
        Xq, yq = torch.from_numpy(data.test_images[:QUERIES] / 255).float(), torch.tensor(data.test_labels[:QUERIES])
        model, gauss_newton = trained(X, y), uw.operators.GaussNewton()
        settings = {"loss": torch.nn.functional.cross_entropy, "curvature": gauss_newton, "damping": DAMPING}

        def answer() -> object:
            solver = uw.solvers.CG(rtol=1e-4)
            return uw.explain(model, X, y, solver=solver, **settings).on_loss(Xq, yq.long()).values
    elif job.startswith("CNN"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(256, 10),
        ).eval()
        X = torch.from_numpy(data.images[:4000].reshape(-1, 1, 28, 28) / 255).float()
        y = torch.from_numpy(data.labels[:4000].astype(np.int64))
        settings = {"loss": torch.nn.functional.cross_entropy, "curvature": uw.operators.EKFAC(), "damping": 0.01}

        def answer() -> object:
            return uw.explain(model, X, y, **settings).on_loss(X[:10], y[:10]).values
    else:
        X, y, queries = data.images[5000:] / 255, data.labels[5000:], 1 if job == "one query" else 100
        theta = np.load(os.environ["UPWEIGHT_BENCHMARK_THETA"])
        from sklearn.linear_model import LogisticRegression

        fit = LogisticRegression(C=1 / (0.01 * len(X)), fit_intercept=False)
        fit.coef_, fit.intercept_, fit.classes_ = theta, np.zeros(10), np.arange(10)
        fit.n_features_in_, fit.n_iter_ = theta.shape[1], np.array([1])
        Xq, yq = data.test_images[:queries] / 255, data.test_labels[:queries]
        solver = uw.solvers.CG(rtol=1e-5, preconditioner=uw.solvers.TwoLevel())

        def answer() -> object:
            return uw.explain(fit, X, y, solver=solver).on_loss(Xq, yq).values

    if not job.startswith("100"):
        answer()  # warm
    time.sleep(0.5)
    start = time.perf_counter()
    answer()
    return time.perf_counter() - start


def process(source: Path, job: str) -> float:
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def theta(folder: Path) -> Path:
    """The fitted coefficients, once; those of UPWEIGHT_BENCHMARK_THETA if it names a file."""
    if "UPWEIGHT_BENCHMARK_THETA" in os.environ:
        return Path(os.environ["UPWEIGHT_BENCHMARK_THETA"])
    from sklearn.linear_model import LogisticRegression

    import upweight as uw

    file = folder / "theta.npy"
    if not file.exists():
        import numpy as np

        data = uw.datasets.mnist()
        X, y = data.images[5000:] / 255, data.labels[5000:]
        np.save(
            file,
            LogisticRegression(C=1 / (0.01 * len(X)), fit_intercept=False, tol=1e-7, max_iter=1000).fit(X, y).coef_,
        )
    return file


def main(other: Path, pairs: int, jobs: list[str]) -> None:
    import tempfile

    ours = HERE.parent / "src"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UPWEIGHT_BENCHMARK_THETA"] = str(theta(Path(folder)))
        results = HERE / "results" / "beside_another_build.json"
        report = json.loads(results.read_text()) if jobs else {}
        for job in jobs or JOBS:
            seconds: dict[str, list[float]] = {"this": [], "other": []}
            for pair in range(pairs):
                for name, source in sorted({"this": ours, "other": other}.items(), reverse=bool(pair % 2)):
                    seconds[name].append(process(source, job))
            ratios = [a / b for a, b in zip(seconds["this"], seconds["other"], strict=True)]
            report[job] = {
                "this_seconds": statistics.median(seconds["this"]),
                "other_seconds": statistics.median(seconds["other"]),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            print(job, report[job], flush=True)
    results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        print(measured(sys.argv[2]))
    else:
        main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:])
