"""Growth: time and peak memory of a question against n, p, q and K, each alone; on log axes, with the slopes.

A logistic regression, or a softmax where K is more than 1, with everything left to the defaults, from the model to the
values of all rows; from 8,192 rows, 128 columns, 8 queries and K = 1, one of these grows. Least seconds of the
processor of three, on one thread; memory is the most that was taken beside data and model. A slope is that of the last
three points.

    python benchmarks/growth.py        # → results/growth.json and docs/pictures/growth.webp; a minute
"""

from __future__ import annotations

import ctypes
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from grid import Problem, Shape, problem
from upweight.show.plots.style import BLUE, COLORS, MARKERS, style

BASE = Shape(8192, 128, 1, queries=8)
GROWN = {
    "n, rows": [replace(BASE, n=n) for n in (2048, 4096, 8192, 16_384, 32_768, 65_536)],
    "p, parameters": [replace(BASE, d=d) for d in (32, 64, 128, 256, 512, 1024)],
    "q, queries": [replace(BASE, queries=q) for q in (1, 4, 16, 64, 256, 1024)],
    "K, outputs": [replace(BASE, K=K) for K in (2, 4, 8, 16, 32)],
}
TURNS, FITTED = 3, 3
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "growth.webp"


def along(name: str, shape: Shape) -> int:
    """What grows."""
    return {"n": shape.n, "p": shape.p, "q": shape.queries, "K": shape.K}[name[0]]


def measured(found: Problem) -> dict[str, Any]:
    found.values()  # what is imported when it is first needed
    taken = []
    for _ in range(TURNS):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back, or the next call would find it there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before, start = status("VmRSS"), time.process_time()
        scores = found.values()
        taken.append((time.process_time() - start, status("VmHWM") - before))
    seconds, megabytes = zip(*taken, strict=True)
    solver = scores.certificate.solver.split("(")[0]
    return {"seconds": min(seconds), "megabytes": max(max(megabytes), 0.1), "solver": solver}


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


def slope(x: list[int], y: list[float]) -> float:
    """Of the last points, on log axes."""
    return float(np.polyfit(np.log(x[-FITTED:]), np.log(y[-FITTED:]), 1)[0])


def drawn(found: dict[str, dict[str, Any]]) -> None:
    """One picture: time and memory for each thing that grows."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, len(found), sharey="row")
    for column, (name, line) in enumerate(found.items()):
        for row, (what, unit, color) in enumerate((("seconds", "s", BLUE), ("megabytes", "MB", COLORS[1]))):
            ax = style(panels[row, column], title=f"slope {line[f'slope_of_{what}']:.2f}")
            ax.loglog(line["at"], line[what], marker=MARKERS[row], color=color, linewidth=1.4, markersize=4.5)
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(line["at"][::2], [f"{value:,}" for value in line["at"][::2]])
            if row:
                ax.set_xlabel(name)
            if not column:
                ax.set_ylabel({"s": "processor time, s", "MB": "memory beside the data, MB"}[unit])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=90, pil_kwargs={"quality": 60, "method": 6})
    assert PICTURE.stat().st_size < 60_000


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    for name, shapes in GROWN.items():
        points = [measured(problem(shape)) for shape in shapes]
        line: dict[str, Any] = {"at": [along(name, shape) for shape in shapes]}
        line |= {what: [point[what] for point in points] for what in ("seconds", "megabytes", "solver")}
        for what in ("seconds", "megabytes"):
            line[f"slope_of_{what}"] = slope(line["at"], line[what])
        found[name] = line
        print(name, line, file=sys.stderr, flush=True)
    drawn(found)
    base = {"n": BASE.n, "p": BASE.p, "q": BASE.queries, "K": BASE.K}
    report(__file__, {"from": base, "turns": TURNS, "points_of_a_slope": FITTED, "threads": 1}, found)


if __name__ == "__main__":
    main()
