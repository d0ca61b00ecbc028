"""Claim: many queries against many rows take the time of one matrix product, and memory that grows with neither.

Logistic regression on synthetic data, float64. `influence.leading(…, k=20)` for 500 queries and 200,000 rows of 300
features: its memory above that of the data and the prepared solver, at half the rows, and at two and four times the
queries; that of `on_loss_in_blocks` beside the formula of its docstring; its time beside that of `on_loss`, and of the
product of the rows with 500 vectors alone, all measured in turns. Then 1,000,000 rows of 100 features, 64 queries,
k = 100. Every memory is that of a process of its own.

    python benchmarks/streaming.py        # about ten minutes on 2 cores
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report, seconds
from sklearn.linear_model import LogisticRegression

import upweight as uw

SHAPES = {"half": (100_000, 300), "whole": (200_000, 300), "million": (1_000_000, 100)}
QUERIES, K, TURNS = 500, 20, 3
MEMORY = {
    "leading": lambda influence, on: influence.leading(*on, k=K),
    "million": lambda influence, on: influence.leading(*on, k=100),
    "loop over blocks": lambda influence, on: [None for _ in influence.on_loss_in_blocks(*on)],
    "extremes of blocks": lambda influence, on: uw.extremes(influence.on_loss_in_blocks(*on), K),
    "on_loss": lambda influence, on: influence.on_loss(*on),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            write_fitted(Path(folder), name)
        memory = {
            f"{question}, {SHAPES[name][0]:,} rows, {queries} queries": measured(folder, question, name, queries)
            for question, name, queries in (
                ("leading", "half", QUERIES),
                ("leading", "whole", QUERIES),
                ("leading", "whole", 2 * QUERIES),
                ("leading", "whole", 4 * QUERIES),
                ("loop over blocks", "whole", QUERIES),
                ("extremes of blocks", "whole", QUERIES),
                ("on_loss", "whole", QUERIES),
                ("million", "million", 64),
            )
        }
        times = {"whole": turns(Path(folder), "whole", QUERIES, K), "million": turns(Path(folder), "million", 64, 100)}
    n, p = SHAPES["whole"][0], SHAPES["whole"][1] + 1
    formula = {"a block of 256": 8 * 256 * (n + 4 * p) / 1e6, "two blocks, in a loop": 2 * 8 * 256 * (n + 4 * p) / 1e6}
    settings = {"shapes": SHAPES, "queries": QUERIES, "k": K, "turns": TURNS, "threads": torch.get_num_threads()}
    report(__file__, settings, {"megabytes": memory, "megabytes_of_the_formula": formula, "seconds": times})


def write_fitted(folder: Path, name: str) -> None:
    """Data and a model that was fitted to them."""
    n, d = SHAPES[name]
    draw = np.random.default_rng(0)
    X = draw.normal(size=(n, d))
    y = (X @ draw.normal(size=d) / np.sqrt(d) + draw.logistic(size=n) > 0).astype(int)
    model = LogisticRegression(tol=1e-6, solver="newton-cholesky").fit(X, y)
    np.save(folder / f"{name}-X.npy", X)
    (folder / f"{name}.pickle").write_bytes(pickle.dumps((model, y)))


def prepared(folder: Path, name: str, queries: int) -> tuple[uw.Influence, tuple[Any, Any]]:
    """An Influence that has answered one query, and those to come."""
    X = np.load(folder / f"{name}-X.npy")
    model, y = pickle.loads((folder / f"{name}.pickle").read_bytes())
    draw = np.random.default_rng(1)
    Xq = draw.normal(size=(queries, X.shape[1]))
    on = (Xq, (Xq.sum(1) > 0).astype(int))
    influence = uw.explain(model, X, y, progress=False)
    influence.on_loss(Xq[:1], on[1][:1])
    return influence, on


def measured(folder: str, question: str, name: str, queries: int) -> dict[str, float]:
    """The memory of a question, in megabytes, by a process of its own."""
    words = [sys.executable, __file__, folder, question, name, str(queries)]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    print(question, name, queries, found, file=sys.stderr)
    return json.loads(found)


def peak(question: Callable[[], Any]) -> dict[str, float]:
    """Resident memory before a question, and what was added to it at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    taken, _ = seconds(question)
    return {"before": before, "above": status("VmHWM") - before, "seconds": taken}


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


def turns(folder: Path, name: str, queries: int, k: int) -> dict[str, float]:
    """Median seconds of a product of the rows with so many vectors, of `leading` and of `on_loss`, and their ratios."""
    influence, on = prepared(folder, name, queries)
    X = torch.from_numpy(influence.examples.x)
    S = torch.randn(queries, X.shape[1], dtype=X.dtype).T.contiguous()

    def product() -> None:
        for start in range(0, len(X), 1024):
            torch.mm(X[start : start + 1024], S)

    questions = {
        "product": product,
        "leading": lambda: influence.leading(*on, k=k),
        "on_loss": lambda: influence.on_loss(*on),
    }
    found: dict[str, list[float]] = {one: [] for one in questions}
    for _ in range(TURNS):
        for one, question in questions.items():
            found[one].append(seconds(question)[0])
    times = {one: float(np.median(taken)) for one, taken in found.items()}
    over = {f"leading_over_{one}": float(np.median(np.divide(found["leading"], found[one]))) for one in found}
    del over["leading_over_leading"]
    return times | over


if __name__ == "__main__":
    if len(sys.argv) > 1:
        where, what, which, many = sys.argv[1:]
        ready, asked = prepared(Path(where), which, int(many))
        print(json.dumps(peak(lambda: MEMORY[what](ready, asked))))
    else:
        main()
