"""Question: how much longer did the build before take for self-influence of all rows of MNIST softmax regression?

n = 55,000, p = 7,840, values to a proven relative error of 1e-6 (`solvers.outer`), `uw.explain(...)` to `.values` in
processes of their own that take turns, one thread each; processor seconds, for the machine is shared.

    UPWEIGHT_DATA=… python benchmarks/self_influence_of_a_softmax.py ../before/src [PAIRS]       # an hour for five
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from beside_a_busy_process import fitted
from beside_another_build import theta

HERE = Path(__file__).parent


def measured(file: str) -> None:
    """The values to a file; processor seconds, seconds and peak gigabytes to stdout."""
    import upweight as uw

    fit, X, y, _ = fitted()
    processor, start = time.process_time(), time.perf_counter()
    values = uw.explain(fit, X, y, progress=False).of_self().values
    print(
        time.process_time() - processor,
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )
    np.save(file, values)


def process(source: Path, file: Path) -> list[float]:
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--job", str(file)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in told.split()[-3:]]


def main(before: Path, pairs: int) -> None:
    from common import report

    with tempfile.TemporaryDirectory() as folder:
        os.environ["UPWEIGHT_BENCHMARK_THETA"] = str(theta(Path(folder)))
        sources, found = {"this": HERE.parent / "src", "before": before}, {"this": [], "before": []}
        for pair in range(pairs):
            for name in sorted(sources, reverse=not pair % 2):
                found[name].append(process(sources[name], Path(folder) / f"{name}.npy"))
                print(name, found[name][-1], flush=True)
        ours, theirs = (np.load(Path(folder) / f"{name}.npy") for name in ("this", "before"))
    medians = {name: np.median(np.array(each), 0).tolist() for name, each in found.items()}
    numbers = {
        name: dict(zip(("processor_seconds", "seconds", "peak_gigabytes"), each, strict=True))
        for name, each in medians.items()
    }
    numbers["before_over_this"] = float(
        np.median([b[0] / t[0] for t, b in zip(found["this"], found["before"], strict=True)])
    )
    numbers["largest_relative_difference"] = float(np.abs(ours / theirs - 1).max())
    report(__file__, {"pairs": pairs, "threads": 1, "load": os.getloadavg()}, numbers)


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        measured(sys.argv[2])
    else:
        main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
