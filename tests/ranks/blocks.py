"""What the processes of test_blocks do: a curvature of several blocks, of which each rank holds its own.

Run as `python -m ranks.blocks FOLDER SCENARIO …`, with torchrun's variables set; `alone` comes before there are ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import upweight as uw
from ranks.work import QUERIES, X, Y, d, n
from upweight.model.sweep import Sweep
from upweight.operators import held
from upweight.operators.basis import Basis
from upweight.runs.sums import Sums

RANK = os.environ.get("RANK", "0")
ON = torch.from_numpy(QUERIES).float(), torch.from_numpy(Y[n:])
NEAR = uw.solvers.CG(rtol=1e-3, preconditioner=uw.solvers.Preconditioned(uw.operators.KFAC()))


class Deep(nn.Module):
    """Blocks of unlike sizes, with and without a bias, of a convolution, and of a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, d)), nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 24), nn.Tanh(),
            nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 2),
        )  # fmt: skip
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def deep(rows: int = n, per_example: bool = False, **settings) -> uw.Influence:
    """In float32, so that what travels is rounded as it is where it stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Deep().eval()
    known = {"penalty": 0.1, "penalty_per_example": per_example, "dtype": torch.float32}
    objective = uw.Objective.from_module(module, nn.functional.cross_entropy, **known)
    settings = {"curvature": uw.operators.EKFAC(), "damping": 0.1, "progress": False} | settings
    return uw.Influence(objective, (torch.from_numpy(X[:rows]).float(), torch.from_numpy(Y[:rows])), **settings)


@contextmanager
def little_room():
    """Inside, blocks come one after the other."""
    room, held.BROUGHT = held.BROUGHT, 1
    try:
        yield
    finally:
        held.BROUGHT = room


def answers() -> dict[str, np.ndarray]:
    """What is asked of the blocks, in solves and inside of sweeps, by its name."""
    here = deep()
    found = {
        "removal": here.on_loss(*ON).values,
        "residuals": here.on_loss(*ON).certificate.residual,
        "self-influence": here.of_self().values,
        "self-influence of some rows": here.of_self(rows=np.arange(0, 2000, 7)).values,
        "relative": uw.baselines.loss_relative_influence(here, *ON).values,
        "groups": here.of_groups({"a": np.arange(90)}, on=ON).values,
        "parameters": here.on_params(rows=np.arange(3)),
        "eigenvalues": here.operator.eigenvalues.numpy(),
        "products": here.operator.matrix().numpy(),
        "dampings": here.damping_path(*ON, dampings=[0.1, 1.0]).values,
        "λ that is not named": deep(damping=None).on_loss(*ON).values,
        "KFAC": deep(curvature=uw.operators.KFAC(samples=1)).of_self().values,
        "as a preconditioner": deep(curvature=uw.operators.GaussNewton(), solver=NEAR).on_loss(*ON).values,
        "rows with a part of the penalty": deep(per_example=True).of_self().values,
        "one chunk": deep(rows=700).on_loss(*ON).values,
    }
    with little_room():
        one_by_one = deep()
        found["block after block"] = np.concatenate([one_by_one.of_self().values, one_by_one.on_loss(*ON).values[0]])
    return found


def alone(folder: Path) -> None:
    """One process, before there are others."""
    if RANK == "0":
        np.savez(folder / "alone.npz", **answers())
        numbers(folder, "alone")


def together(folder: Path) -> None:
    np.savez(folder / f"rank-{RANK}.npz", **answers())
    numbers(folder, f"rank-{RANK}")


def numbers(folder: Path, name: str) -> None:
    """Bytes that are held: of sums while they are added, of other ranks' blocks at most, and in the end."""
    most = {"sums": 0, "brought": 0}
    add, brought = Sums.add, held.Held._brought

    def counted(self: Sums, place: int, value: Tensor, level: int = 0) -> None:
        add(self, place, value, level)
        most["sums"] = max(most["sums"], sum(one.untyped_storage().nbytes() for *_, one in self.nodes))

    def seen(self: held.Held, *asked) -> Basis:
        found = brought(self, *asked)
        one = held.Held({0: found}, [found.at]).bytes
        most["brought"] = max(most["brought"], one + held.Held(self.visiting, []).bytes)
        return found

    Sums.add, held.Held._brought = counted, seen
    try:
        with little_room():
            operator = deep().operator
    finally:
        Sums.add, held.Held._brought = add, brought
    blocks = {str(number): held.Held({0: one}, []).bytes for number, one in operator.held.own.items()}
    (folder / f"{name}.json").write_text(json.dumps(most | {"held": operator.held.bytes, "blocks": blocks}))


def killed(folder: Path) -> None:
    """Rank 1 dies in the middle of the factors."""
    whole, seen = Sweep._batches, []

    def batches(self: Sweep, function, chunk, vectors: int, label: str):
        seen.append(label)
        if RANK == "1" and seen.count("Kronecker factors") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, function, chunk, vectors, label)

    Sweep._batches = batches
    deep().on_loss(*ON, store=folder / "store")


def again(folder: Path) -> None:
    """What `killed` did not finish."""
    np.save(folder / f"again-{RANK}.npy", deep().on_loss(*ON, store=folder / "store").values)


if __name__ == "__main__":
    at, scenarios = Path(sys.argv[1]), sys.argv[2:]
    if scenarios[0] == "alone":
        alone(at)
    torch.distributed.init_process_group("gloo")
    for scenario in scenarios:
        if scenario != "alone":
            globals()[scenario](at)
