"""Claim: two processes on two cores answer in the bits of one, and in how much less time; and what is lost, and where.

Two networks on synthetic pictures, N rows: a CNN by EKFAC (two sweeps, a dense eigendecomposition, one more sweep), and
an MLP by CG on the Gauss–Newton matrix with nothing kept (a sweep for every product). Each is answered by one process
with one thread, by one with two, and by two with one each, in one run, the least of `REPEATS` times each. Of the two
processes the time of rank 0 is divided: visiting its own rows, waiting for the other to come, moving numbers, and the
rest, which every rank does alike (solves, choices). CPU seconds are of all processes together: on a machine that
others use, too, they say more than seconds on the wall do.

    REPEATS=3 python benchmarks/two_processes.py        # writes results/two_processes.json; starts its own processes
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.runs import ranks

N, QUERIES, SIDE, REPEATS = 4096, 8, 14, int(os.environ.get("REPEATS", "3"))
WAYS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}


def studies() -> dict[str, Any]:
    """Makers of an Influence, and the queries."""
    torch.manual_seed(0)
    X = torch.randn(N + QUERIES, 1, SIDE, SIDE)
    y = (X[:, 0, :7].sum((1, 2)) > 0).long() + 2 * (X[:, 0, 7:].sum((1, 2)) > 0).long()
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(8 * 25, 4),
    )  # fmt: skip
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 48), nn.Tanh(), nn.Linear(48, 4))
    common = {"loss": cross_entropy, "penalty": 1e-3, "damping": 0.1, "progress": False}
    by_cg = {"curvature": uw.operators.GaussNewton(keep=0), "solver": uw.solvers.CG(rtol=1e-3)}
    queries = X[N:], y[N:]
    return {
        "a CNN by EKFAC": lambda: (uw.explain(cnn, X[:N], y[:N], curvature=uw.operators.EKFAC(), **common), queries),
        "an MLP by CG": lambda: (uw.explain(mlp, X[:N], y[:N], **by_cg, **common), queries),
    }


def clocks() -> dict[str, float]:
    """Seconds that this process spends in sweeps, waiting for others, and moving numbers; added up from now on."""
    spent = {"sweeps": 0.0, "waiting": 0.0, "moving": 0.0}

    def timed(method: Any, kind: str) -> Any:
        def run(self: Any, *given: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(self, *given)
            finally:
                spent[kind] += time.perf_counter() - start

        return run

    class Timed:
        """A sweep's context with a clock."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> Any:
            self.start = time.perf_counter()
            return self.inner.__enter__()

        def __exit__(self, *error: object) -> Any:
            spent["sweeps"] += time.perf_counter() - self.start
            return self.inner.__exit__(*error)

    ranks.World.gather = timed(ranks.World.gather, "waiting")
    ranks.World.do = timed(ranks.World.do, "moving")
    during = ranks.World.during
    ranks.World.during = lambda self, what: Timed(during(self, what))
    return spent


def worker(study: str, file: str) -> None:
    """One process of one answer, which writes what it took."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    spent = clocks()
    influence, queries = studies()[study]()
    torch.ones(512, 512) @ torch.ones(512, 512)
    ranks.by_first("ready", lambda: None)  # the start of processes is not counted
    spent.update(dict.fromkeys(spent, 0.0))
    wall, cpu = time.perf_counter(), time.process_time()
    scores = influence.on_loss(*queries)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    spent["sweeps"] -= spent["waiting"] + spent["moving"]
    bits = int.from_bytes(scores.values.tobytes()[:8], "big"), float(np.abs(scores.values).sum())
    known = {"parameters": influence.objective.size, "products": scores.certificate.sweeps}
    Path(f"{file}-{os.environ['RANK']}").write_text(json.dumps([found, spent, bits, known]))


def answered(study: str, processes: int, threads: int, folder: Path) -> list[Any]:
    """What the processes of one answer wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, study, str(folder / "found")]
    running = [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r)}) for r in range(processes)]
    if any([one.wait() for one in running]):
        message = f"{study}: a process failed"
        raise RuntimeError(message)
    return [json.loads((folder / f"found-{rank}").read_text()) for rank in range(processes)]


def measured(study: str, folder: Path) -> dict[str, Any]:
    """The numbers of one study."""
    found = {way: [answered(study, *how, folder) for _ in range(REPEATS)] for way, how in WAYS.items()}
    best = {way: min(runs, key=lambda run: run[0][0]["wall"]) for way, runs in found.items()}
    wall = {way: run[0][0]["wall"] for way, run in best.items()}
    cpu = {way: min(sum(one[0]["cpu"] for one in run) for run in runs) for way, runs in found.items()}
    rank0 = best["two processes"][0]
    shares = {name: seconds / rank0[0]["wall"] for name, seconds in rank0[1].items()}
    alone, two = found["one process, one thread"][0][0], found["two processes"][0]
    return {
        **alone[3],
        "wall_seconds": wall,
        "cpu_seconds_of_all_processes": cpu,
        "two_threads_over_two_processes": wall["one process, two threads"] / wall["two processes"],
        "one_thread_over_two_processes": wall["one process, one thread"] / wall["two processes"],
        "cpu_of_two_processes_over_one_thread": cpu["two processes"] / cpu["one process, one thread"],
        "shares_of_rank_0": shares | {"the same on every rank": 1 - sum(shares.values())},
        "same_bits_as_one_process": all(one[2] == alone[2] for one in two),
    }


def main() -> None:
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    numbers = {study: measured(study, folder) for study in studies()}
    settings = {"rows": N, "queries": QUERIES, "repeats": REPEATS, "load_before": os.getloadavg()[0]}
    settings["note"] = "two cores, shared with other people's work while this ran"
    report(__file__, settings, numbers)


if __name__ == "__main__":
    worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()
