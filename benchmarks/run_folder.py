"""Claim: a run folder costs little beside a network's answer, and beside a closed form's what its bytes cost.

The same call with `store=` and without, in turns, the least of `TURNS` each, and where the time goes: writing, waiting
for the disk (fsync). Four studies from much work a row to almost none: a CNN and an MLP by EKFAC, and logistic
regression of 300 features by `on_loss` and of 100 by `leading`, whose answer is one pass over the rows in memory.
`on_loss` keeps 8 bytes for each query and row, and computes them as fast as they can be written: its limit is the
larger of its own time and of the bytes over the rate at which this disk takes one file, measured beside it; and of the
processor's time the sum of its own and that of hashing and copying so many bytes. `leading` keeps no values.

    python benchmarks/run_folder.py        # some minutes on 2 cores; half a gigabyte in TMPDIR
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report, seconds
from sklearn.linear_model import LogisticRegression
from torch import nn

import upweight as uw
from upweight.runs import files

TURNS, QUERIES = 5, 64


def linear(n: int, d: int) -> tuple[uw.Influence, Any]:
    draw = np.random.default_rng(0)
    X = draw.standard_normal((n + QUERIES, d), dtype=np.float32)
    y = (X[:, 0] + draw.logistic(size=len(X)) > 0).astype(int)
    model = LogisticRegression(tol=1e-6, solver="newton-cholesky").fit(X[:n], y[:n])
    return uw.explain(model, X[:n], y[:n], progress=False), (X[n:], y[n:])


def network(n: int, net: nn.Module) -> tuple[uw.Influence, Any]:
    torch.manual_seed(0)
    X = torch.randn(n + QUERIES, 1, 14, 14)
    y = (X[:, 0, :2].mean((1, 2)) * 5 + 2).long().clamp(0, 3)
    settings = {"curvature": uw.operators.EKFAC(samples=1), "damping": 0.05, "progress": False}
    return uw.explain(net, X[:n], y[:n], loss=nn.functional.cross_entropy, **settings), (X[n:], y[n:])


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 128), nn.Tanh(), nn.Linear(128, 4))


STUDIES: dict[str, tuple[Callable[[], tuple[uw.Influence, Any]], Callable[..., Any]]] = {
    "a CNN, 8,192 rows": (lambda: network(8192, cnn()), lambda i, on, **kept: i.on_loss(*on, **kept)),
    "an MLP, 32,768 rows": (lambda: network(32768, mlp()), lambda i, on, **kept: i.on_loss(*on, **kept)),
    "logistic, 200,000 × 300": (lambda: linear(200_000, 300), lambda i, on, **kept: i.on_loss(*on, **kept)),
    "logistic, 200,000 × 100, leading": (
        lambda: linear(200_000, 100),
        lambda i, on, **kept: i.leading(*on, k=100, **kept),
    ),
}


def measured(make: Callable[[], tuple[uw.Influence, Any]], ask: Callable[..., Any]) -> dict[str, Any]:
    influence, on = make()
    ask(influence, on)  # curvature and solver are prepared
    without, inside = [], []
    for _ in range(TURNS):
        without.append(clocked(lambda: ask(influence, on)))
        folder = Path(tempfile.mkdtemp())
        inside.append(clocked(lambda folder=folder: ask(influence, on, store=folder / "run")))
        size, chunks = sum(f.stat().st_size for f in (folder / "run").iterdir()), len(list(folder.glob("run/chunk-*")))
        shutil.rmtree(folder)
    (wall, cpu), (wall_with, cpu_with) = (np.min(times, axis=0).tolist() for times in (without, inside))
    bytes_alone = alone(size)
    return {
        "bytes_alone": bytes_alone,
        "over_the_limit": {
            "seconds": wall_with / max(wall, bytes_alone["seconds"]),
            "cpu_seconds": cpu_with / (cpu + bytes_alone["cpu_seconds"]),
        },
        "seconds": {"without": wall, "with": wall_with, "more": wall_with / wall - 1},
        "cpu_seconds": {"without": cpu, "with": cpu_with, "more": cpu_with / cpu - 1},
        "megabytes": size / 1e6,
        "chunks": chunks,
        "of_them": parts(influence, on, ask),
    }


def clocked(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the wall and of the processor."""
    start = time.process_time()
    return seconds(function)[0], time.process_time() - start


def parts(influence: uw.Influence, on: Any, ask: Callable[..., Any]) -> dict[str, float]:
    """Seconds in fsync and in writing small files, of one more run."""
    spent = {"fsync": 0.0, "write_file": 0.0}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    before = os.fsync, files.write_file
    os.fsync, files.write_file = timed(os.fsync, "fsync"), timed(files.write_file, "write_file")
    try:
        with tempfile.TemporaryDirectory() as folder:
            ask(influence, on, store=Path(folder) / "run")
    finally:
        os.fsync, files.write_file = before
    return spent


def alone(size: int) -> dict[str, float]:
    """So many bytes to one file, hashed, flushed at the end, with nothing computed: the least of `TURNS`."""
    content, folder = memoryview(bytes(2**19)), Path(tempfile.mkdtemp())

    def written() -> None:
        found = hashlib.sha256()
        with (folder / "file").open("wb", buffering=0) as file:
            for _ in range(-(-size // len(content))):
                found.update(content)
                file.write(content)
            os.fsync(file.fileno())

    times = np.min([clocked(written) for _ in range(TURNS)], axis=0).tolist()
    shutil.rmtree(folder)
    return {"seconds": times[0], "cpu_seconds": times[1], "megabytes_a_second": size / 1e6 / times[0]}


def disk() -> dict[str, float]:
    """What this machine does with a chunk of 512 kB, without this library."""
    content, folder = bytes(2**19), Path(tempfile.mkdtemp())
    flush, digest = [], []
    for number in range(50):
        with (folder / str(number)).open("wb") as file:
            file.write(content)
            file.flush()
            flush.append(seconds(lambda file=file: os.fsync(file.fileno()))[0])
        digest.append(seconds(lambda: hashlib.sha256(content))[0])
    shutil.rmtree(folder)
    return {"fsync_milliseconds": 1e3 * float(np.median(flush)), "sha256_milliseconds": 1e3 * float(np.median(digest))}


if __name__ == "__main__":
    found = {name: measured(*study) for name, study in STUDIES.items()}
    settings = {"queries": QUERIES, "turns": TURNS, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    report(__file__, settings, found | {"a chunk of 512 kB": disk()})
