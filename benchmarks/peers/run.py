"""The peers' table: every library on every workload, each in its own environment and process, one thread.

    UPWEIGHT_DATA=… python benchmarks/peers/run.py [LIBRARY …]    # an hour; goes on where it was stopped

Writes results/peers.json; `scripts/docs pages` makes docs/peers.md of it. Environments, workloads and finished cells
lie in ~/.cache/upweight-peers ($XDG_CACHE_HOME); remove a cell there to have it measured again. Needs scikit-learn,
transformers and xlrd where it runs, and nothing of upweight, which is measured like the others.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import environments
import numpy as np
import torch
import workloads
from table import LIBRARIES, Library, Method
from workloads import WORKLOADS

import truth

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "peers.json"
LIMIT, THREADS = 120, 1


def measured(library: str, method: str, workload: str) -> dict[str, Any]:
    """A cell, measured in a process of its own; kept, so that it is measured once."""
    kept = environments.cache() / "cells" / library / method / workload
    file = kept / "cell.json"
    if not file.exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        print(f"{library}, {method}, {workload}", flush=True)
        ended = _run(library, method, workload, kept)
        if ended is not None:
            file.write_text(json.dumps({"error": ended}))
    return json.loads(file.read_text())


def _run(library: str, method: str, workload: str, out: Path) -> str | None:
    """None if the process wrote its cell; otherwise what ended it."""
    interpreter = environments.interpreter(library)
    folder = environments.cache() / "workloads" / workload
    source = str(HERE.parents[1] / "src") if library == "upweight" else ""
    environment = os.environ | {
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": str(THREADS),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(interpreter), str(HERE / "cell.py"), library, method, workload, str(folder), str(out)]
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no answer in {LIMIT} s"
    if process.returncode < 0:
        return f"the process was killed by signal {-process.returncode}"
    if not (out / "cell.json").exists():
        lines = (out / "log.txt").read_text().strip().splitlines()
        return f"the process ended with {process.returncode}: {lines[-1] if lines else ''}"
    return None


def compared(library: Library, method: Method, workload: str, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with what its scores have in common with the dense answer, or as it is where there are none."""
    if "error" in cell:
        return {"error": shortened(cell["error"])}
    scores = np.load(environments.cache() / "cells" / library.name / method.name / workload / "scores.npy")
    with np.load(environments.cache() / "workloads" / workload / "truth.npz") as file:
        dense = dict(file)
    found = {key: round(value, 4) for key, value in cell.items()}
    if method.answers == "rows":
        return found | {"spearman_with_self": rank_correlation(-scores, dense["self"])}
    for system in ("hessian", "gauss_newton"):
        if system in dense:
            found[system] = agreement(scores, dense[system], method.factor(len(dense["self"])))
    return found


def agreement(scores: np.ndarray, dense: np.ndarray, factor: float | None) -> dict[str, Any]:
    """Pearson's r, the slope through 0 of factor × theirs on the dense values, and the largest error of both.

    The largest error is a share of the largest dense value; `rescaled` grants the library the one scale that suits it.
    """
    if scores.shape != dense.shape:
        return {"error": f"{scores.shape} scores for {dense.shape} pairs"}
    if not np.isfinite(scores).all():
        return {"error": f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite"}
    if not scores.any():
        return {"error": "every score is 0"}
    raw = float((scores * dense).sum() / (dense * dense).sum())
    largest = np.abs(dense).max()
    return {
        "pearson": float(np.corrcoef(scores.ravel(), dense.ravel())[0, 1]),
        "slope": raw if factor is None else factor * raw,
        "largest_error": None if factor is None else float(np.abs(factor * scores - dense).max() / largest),
        "largest_error_rescaled": float(np.abs(scores / raw - dense).max() / largest) if raw else None,
        "median_pearson_of_a_query": float(
            np.median([np.corrcoef(one, other)[0, 1] for one, other in zip(scores, dense, strict=True)])
        ),
    }


def rank_correlation(scores: np.ndarray, dense: np.ndarray) -> float:
    """Spearman's, without ties in mind."""
    return float(np.corrcoef(scores.argsort().argsort(), dense.argsort().argsort())[0, 1])


def shortened(text: str, length: int = 300) -> str:
    """The first line of an error, without folders of this machine."""
    line = " ".join(text.replace(str(environments.cache()), "…").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def lines_of_code(library: str) -> int:
    """Lines of the adapter that are neither blank nor a comment nor its docstring."""
    text = (HERE / "libraries" / f"{library}.py").read_text().split('"""', 2)[2]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def main() -> None:
    torch.set_num_threads(THREADS)
    wanted = sys.argv[1:] or [one.name for one in LIBRARIES]
    facts = {}
    for name, workload in WORKLOADS.items():
        folder = environments.cache() / "workloads" / name
        facts[name] = workloads.write(workload, folder) | {"title": workload.title}
        truth.write(name, folder)
        with np.load(folder / "truth.npz") as file:
            facts[name] |= {key: float(file[key]) for key in file if key.endswith("_lowest")}
    for library in LIBRARIES:
        if library.name in wanted:
            environments.make(library.name)
    cells: dict[str, Any] = {}
    for library in LIBRARIES:
        failure = environments.failure(library.name)
        for method in library.methods:
            for workload in WORKLOADS:
                key = f"{library.name}/{method.name}/{workload}"
                reason = library.why_not(method, workload)
                if reason is not None:
                    cells[key] = {"not": reason}
                elif failure is not None:
                    cells[key] = {"error": shortened(failure)}
                elif library.name in wanted:
                    cells[key] = compared(library, method, workload, measured(library.name, method.name, workload))
                else:
                    cells[key] = {"not": "not measured in this run"}
    write(facts, cells)


def write(facts: dict[str, Any], cells: dict[str, Any]) -> None:
    """results/peers.json."""
    libraries = {
        one.name: {
            "version": one.version,
            "lines_of_code": lines_of_code(one.name),
            "sign_and_unit": one.sign_and_unit,
            "leaves_out": one.leaves_out,
            "methods": {method.name: method.settings for method in one.methods},
            "compared_with": {method.name: method.system for method in one.methods},
        }
        for one in LIBRARIES
    }
    report = {
        "settings": {"limit_seconds": LIMIT, "threads": THREADS},
        "workloads": facts,
        "libraries": libraries,
        "cells": cells,
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
    }
    RESULT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    done = sum("seconds" in cell for cell in cells.values())
    print(f"{len(cells)} cells: {done} measured, {sum('error' in cell for cell in cells.values())} stopped by an error")


if __name__ == "__main__":
    main()
