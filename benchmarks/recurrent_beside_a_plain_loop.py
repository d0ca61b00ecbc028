"""Claim: the influence of all rows of a small GRU is no slower than a plain loop that builds the dense matrix.

60 sequences of 12 steps, 354 parameters, the removal of every row on every row's loss:
`explain(…).on_loss(X, y).values` beside ten lines of torch that go through the rows, write out the Gauss–Newton matrix
and solve. In turns in one process, on one thread, in seconds of the processor; the ratio is the median of the turns. An
older build, where its source folder is given, takes turns in processes of its own.

    git worktree add --detach ../before COMMIT
    python benchmarks/recurrent_beside_a_plain_loop.py [../before/src]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import report

import upweight as uw

N, STEPS, INPUTS, WIDTH, CLASSES, DAMPING, TURNS = 60, 12, 4, 8, 2, 0.01, 15


class Steps(torch.nn.Module):
    """A recurrent layer and a head on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.GRU(INPUTS, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def data() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = Steps().eval()
    X = torch.randn(N, STEPS, INPUTS)
    return net, X, (X[:, :, 0].sum(1) > 0).long()


def ours(net: torch.nn.Module, X: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    settings = {"loss": torch.nn.functional.cross_entropy, "damping": DAMPING, "progress": False}
    return uw.explain(net, X, y, **settings).on_loss(X, y).values


def plain(net: torch.nn.Module, X: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    weights, n = list(net.parameters()), len(X)
    p = sum(weight.numel() for weight in weights)
    C, G = torch.zeros(p, p, dtype=torch.float64), []
    for i in range(n):
        f = net(X[i : i + 1])[0]
        rows = [torch.autograd.grad(f[k], weights, retain_graph=True) for k in range(CLASSES)]
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).double()
        share = f.softmax(0).detach().double()
        C += J.T @ (torch.diag(share) - torch.outer(share, share)) @ J / n
        G.append(J.T @ (share - torch.nn.functional.one_hot(y[i], CLASSES)))
    G = torch.stack(G)
    return (G @ torch.linalg.solve(C + DAMPING * torch.eye(p, dtype=torch.float64), G.T) / n).numpy()


def busy(function: Callable[..., Any], *given: Any) -> float:
    start = time.process_time()
    function(*given)
    return time.process_time() - start


def once(source: str) -> float:
    """The median of some calls by the build in a source folder, after a first one."""
    told = subprocess.run(
        [sys.executable, __file__, "--once"],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(told.stdout.splitlines()[-1]))


def main(source: str | None) -> None:
    known = data()
    values, expected = ours(*known), plain(*known)
    turns = np.array([(busy(ours, *known), busy(plain, *known)) for _ in range(TURNS)])
    numbers: dict[str, Any] = {
        "processor_seconds": float(np.median(turns[:, 0])),
        "plain_loop_seconds": float(np.median(turns[:, 1])),
        "plain_over_ours": float(np.median(turns[:, 1] / turns[:, 0])),
        "largest_difference": float(np.abs(values - expected).max() / np.abs(expected).max()),
    }
    if source is not None:
        here = f"{uw.__path__[0]}/.."
        pairs = np.array([(once(source), once(here)) for _ in range(3)])
        numbers |= {
            "other_build_seconds": float(np.median(pairs[:, 0])),
            "other_build_over_ours": float(np.median(pairs[:, 0] / pairs[:, 1])),
        }
    p = sum(weight.numel() for weight in known[0].parameters())
    settings = {"n": N, "p": p, "steps": STEPS, "queries": N, "damping": DAMPING, "turns": TURNS, "threads": 1}
    report(__file__, settings, numbers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--once" in sys.argv:
        given = data()
        ours(*given)
        print(json.dumps(float(np.median([busy(ours, *given) for _ in range(3)]))))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
