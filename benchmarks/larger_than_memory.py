"""Claim: the memory that an explanation takes does not grow with the width of the rows, which stay in their file.

Logistic regression on 5,000,000 × 100 float32 numbers (2 GB) in a memory-mapped file that this script makes, and on the
first fifth of its rows: `explain`, and `leading`, the 100 rows that help and the 100 that harm each of 64 queries
most, without a run folder and with one. Each run has a process of its own, whose largest resident size (VmHWM: its own
memory and mapped pages) is reported, beside the time of one pass over the same file by NumPy. The model is fitted by
Newton steps in plain NumPy; so are the values that all rows ought to have, of which those of the leading rows and of
2,000 others are compared.

    python benchmarks/larger_than_memory.py        # about ten minutes on 2 cores; 5 GB of disk
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import report, seconds
from sklearn.linear_model import LogisticRegression

N, D, QUERIES, K, SAMPLED = 5_000_000, 100, 64, 100, 2000
BLOCK = 50_000
KINDS = ("seconds", "cpu_seconds")


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, needed = Path(place), 1.05 * (4 * N * D + 8 * N)
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{folder} has not {needed / 1e9:.1f} GB left; name a larger folder in TMPDIR.")
        make(folder)
        runs = {f"{n:,} rows": run(folder, n) for n in (N // 5, N)}
    small, large = runs.values()
    growth = 1e9 * (large["peak_gigabytes"] - small["peak_gigabytes"]) / (N - N // 5)
    numbers = {**runs, "growth_in_bytes_a_row": growth, "bytes_of_a_row_in_the_file": 4 * D}
    report(__file__, {"d": D, "queries": QUERIES, "k": K, "format": "float32 .npy, mapped"}, numbers)


def make(folder: Path) -> None:
    """X and y, block by block."""
    draw = np.random.default_rng(0)
    coef = draw.normal(size=D) / 5
    X = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float32, (N, D))
    y = np.empty(N, np.int64)
    for start in range(0, N, BLOCK):
        X[start : start + BLOCK] = draw.standard_normal((BLOCK, D), dtype=np.float32)
        y[start : start + BLOCK] = X[start : start + BLOCK] @ coef + draw.logistic(size=BLOCK) > 0
    X.flush()
    np.save(folder / "y.npy", y)
    np.savez(folder / "queries.npz", X=draw.normal(size=(QUERIES, D)), y=np.arange(QUERIES) % 2)


def run(folder: Path, n: int) -> dict[str, Any]:
    """What two processes measured on the first n rows, and how far their answers are from NumPy's."""
    theta, curvature, missed = newton(folder, n)
    np.save(folder / "theta.npy", theta)
    reading = child("reading", folder, n)
    found = child("explaining", folder, n)
    found["with_a_run_folder"] = child("keeping", folder, n)
    answers = np.load(folder / "answers.npz")
    expected = values_by_numpy(folder, n, theta, curvature, answers["rows"])
    largest = np.abs(expected["extremes"]).max()
    found["passes_of_numpy"] = found["queries_seconds"] / reading["seconds"]
    return {
        "rows": n,
        "gradient_norm_of_the_fit": missed,
        **found,
        "seconds_of_a_pass_by_numpy": reading["seconds"],
        "largest_error_over_largest_value": {
            "leading_rows": float(np.abs(answers["extremes"] - expected["extremes"]).max() / largest),
            "other_rows": float(np.abs(answers["sampled"] - expected["sampled"]).max() / largest),
        },
        "leading_rows_that_are_the_same": float((answers["leading"] == expected["leading"]).mean()),
    }


def blocks(folder: Path, n: int) -> Any:
    """(start, X in float64 with a column of ones, y) of the rows in turn."""
    y = np.load(folder / "y.npy")
    for start in range(0, n, BLOCK):
        X = np.load(folder / "X.npy", mmap_mode="r")[start : min(start + BLOCK, n)]
        yield start, np.hstack([X, np.ones((len(X), 1))]), y[start : start + len(X)]


def newton(folder: Path, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The minimum of (1/n) Σ log-loss + ‖coef‖²/(2n), its Hessian, and ‖∇R‖ there."""
    held = np.r_[np.ones(D), 0.0] / n
    theta = np.zeros(D + 1)
    for _ in range(20):
        gradient, H = held * theta, np.diag(held)
        for _, X, y in blocks(folder, n):
            p = 1 / (1 + np.exp(-X @ theta))
            gradient += X.T @ (p - y) / n
            H += (X * (p * (1 - p))[:, None]).T @ X / n
        if np.linalg.norm(gradient) < 1e-13:
            break
        theta = theta - np.linalg.solve(H, gradient)
    return theta, H, float(np.linalg.norm(gradient))


def values_by_numpy(folder: Path, n: int, theta: np.ndarray, H: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The leading rows of each query and their values, and the values of `rows`, by the definition in float64."""
    given = np.load(folder / "queries.npz")
    Xq = np.hstack([given["X"], np.ones((QUERIES, 1))])
    S = np.linalg.solve(H, (Xq * (1 / (1 + np.exp(-Xq @ theta)) - given["y"])[:, None]).T)
    kept, sampled = Leading(), np.empty((QUERIES, len(rows)))
    for start, X, y in blocks(folder, n):
        values = ((X @ S) * (1 / (1 + np.exp(-X @ theta)) - y)[:, None]).T / n
        kept.add(values, start)
        inside = (rows >= start) & (rows < start + len(y))
        sampled[:, inside] = values[:, rows[inside] - start]
    return {"sampled": sampled, "leading": kept.rows, "extremes": kept.values}


class Leading:
    """The K largest and the K smallest values of every query so far, largest first, and their rows."""

    def __init__(self) -> None:
        self.values, self.rows = np.empty((QUERIES, 0)), np.empty((QUERIES, 0), np.int64)

    def add(self, values: np.ndarray, start: int) -> None:
        values = np.hstack([self.values, values])
        rows = np.hstack(
            [
                self.rows,
                np.broadcast_to(
                    np.arange(start, start + values.shape[1] - self.rows.shape[1]),
                    (QUERIES, values.shape[1] - self.rows.shape[1]),
                ),
            ]
        )
        few = np.argpartition(values, (K, values.shape[1] - K), axis=1)
        few = np.hstack([few[:, :K], few[:, -K:]])
        order = np.take_along_axis(few, np.argsort(-np.take_along_axis(values, few, 1), axis=1), 1)
        self.values, self.rows = (np.take_along_axis(part, order, 1) for part in (values, rows))


# ---- in processes of their own ---------------------------------------------------------------------------------------


def child(task: str, folder: Path, n: int) -> dict[str, Any]:
    """What this script prints as JSON when it is given a task."""
    call = [sys.executable, __file__, task, str(folder), str(n)]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def reading(folder: Path, n: int) -> dict[str, Any]:
    """The shortest of three passes."""
    X = np.load(folder / "X.npy", mmap_mode="r")[:n]
    passes = [seconds(lambda: [X[at : at + BLOCK].sum() for at in range(0, n, BLOCK)])[0] for _ in range(3)]
    return {"seconds": min(passes)}


def explained(folder: Path, n: int) -> tuple[float, Any, tuple[np.ndarray, np.ndarray]]:
    """How long `explain` takes, the influence, and the queries."""
    import upweight as uw

    X, y = np.load(folder / "X.npy", mmap_mode="r")[:n], np.load(folder / "y.npy")[:n]
    theta = np.load(folder / "theta.npy")
    model = LogisticRegression().fit(np.array(X[:1000]), y[:1000])  # a fitted estimator, for its attributes
    model.coef_, model.intercept_ = theta[None, :-1], theta[-1:]
    queries = np.load(folder / "queries.npz")
    took, influence = seconds(lambda: uw.explain(model, X, y, progress=False))
    return took, influence, (queries["X"], queries["y"])


def explaining(folder: Path, n: int) -> dict[str, Any]:
    """`explain` and `leading`; and the values of some rows, to be compared."""
    from upweight.influence import scoring

    before = resident()
    first, influence, on = explained(folder, n)
    second, found = seconds(lambda: influence.leading(*on, k=K))
    peak = resident()
    overhead = in_turns(influence, on, folder)
    rows = np.sort(np.random.default_rng(1).choice(n, SAMPLED, replace=False))
    solution = scoring.solutions(influence.system, influence.system.encoded(*on))
    sides = [
        (side.rows[:, ::step], side.values[:, ::step]) for side, step in ((found.largest, 1), (found.smallest, -1))
    ]
    leading, extremes = (np.hstack(parts) for parts in zip(*sides, strict=True))
    sampled = values_of(influence, solution, rows)
    np.savez(folder / "answers.npz", rows=rows, sampled=sampled, leading=leading, extremes=extremes)
    return {
        "seconds": first + second,
        "explain_seconds": first,
        "queries_seconds": second,
        "with_a_run_folder_in_turns": overhead,
        "gigabytes_before": before,
        "peak_gigabytes": peak,
        "largest_residual": float(solution.residual.max()),
    }


def in_turns(influence: Any, on: Any, folder: Path) -> dict[str, float]:
    """Seconds of `leading` with a run folder and without, on the wall and of the processor: the least of three each."""
    times: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    for turn in range(3):
        for name, store in (("without", {}), ("with", {"store": folder / f"turn {turn}"})):
            start = time.process_time()
            wall, _ = seconds(lambda store=store: influence.leading(*on, k=K, **store))
            times[name].append((wall, time.process_time() - start))
        shutil.rmtree(folder / f"turn {turn}")
    least = {name: np.min(taken, axis=0).tolist() for name, taken in times.items()}
    more = np.divide(least["with"], least["without"]) - 1
    return {
        **{f"{name}_{kind}": value for name, pair in least.items() for kind, value in zip(KINDS, pair, strict=True)},
        **{f"more_{kind}": float(value) for kind, value in zip(KINDS, more, strict=True)},
    }


def keeping(folder: Path, n: int) -> dict[str, Any]:
    """`leading` into a run folder."""
    _, influence, on = explained(folder, n)
    took, _ = seconds(lambda: influence.leading(*on, k=K, store=folder / "run"))
    size = sum(file.stat().st_size for file in (folder / "run").iterdir())
    shutil.rmtree(folder / "run")
    return {"queries_seconds": took, "peak_gigabytes": resident(), "gigabytes_on_disk": size / 1e9}


def values_of(influence: Any, solution: Any, rows: np.ndarray) -> np.ndarray:
    """on_loss for these rows."""
    from upweight.influence import scoring

    products = scoring.with_rows(influence.system, solution, influence.penalty_share, rows=rows)
    return products.mean * influence.examples.weights[rows] / influence.n


def resident() -> float:
    """The largest resident size so far, in gigabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    if len(sys.argv) > 1:
        tasks = {"reading": reading, "explaining": explaining, "keeping": keeping}
        print(json.dumps(tasks[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
