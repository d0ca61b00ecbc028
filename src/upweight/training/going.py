"""How far the way back through a training is, and that kept in a folder, so that a call which was killed goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.influence.kept import compare_losses
from upweight.influence.system import System
from upweight.runs import threads
from upweight.runs.files import check_room
from upweight.runs.store import Store

KEPT_EVERY = 60.0  # seconds, at least: a state is large
_STATE, _ENDED, _VALUES = "state", "gradients", "values"


@dataclass(frozen=True)
class Going:
    """How far the way back is.

    Args:
        step: the adjoints are those before this step.
        a: (q, p) adjoints of the parameters.
        b: (q, p) adjoints of each thing that the optimiser remembers.
        values: (q, n) the scores of the steps from here on.
        first: (q,) the norm of a at the end.
        largest: its largest growth so far, and
        smallest: its smallest.
    """

    step: int
    a: Tensor
    b: list[Tensor]
    values: NDArray[np.float64]
    first: Tensor
    largest: float
    smallest: float

    def back(self, step: int, a: Tensor, b: list[Tensor]) -> Going:
        """One step earlier."""
        grown = float((a.norm(dim=1) / self.first.clamp(min=1e-300)).max())
        return replace(self, step=step, a=a, b=b, largest=max(self.largest, grown), smallest=min(self.smallest, grown))

    @property
    def growth(self) -> float:
        """By which factor the norm of a changed, largest over smallest."""
        return self.largest / max(self.smallest, 1e-300) if math.isfinite(self.largest) else math.inf

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it is made of, by name."""
        slots = {f"b{slot}": one.numpy() for slot, one in enumerate(self.b)}
        told = np.array([self.step, self.largest, self.smallest])
        return {"a": self.a.numpy(), **slots, "values": self.values, "first": self.first.numpy(), "told": told}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]]) -> Going:
        """The same, of what it was made of."""
        step, largest, smallest = arrays["told"]
        b = [torch.from_numpy(arrays[f"b{slot}"]) for slot in range(sum(name[0] == "b" for name in arrays))]
        first = torch.from_numpy(arrays["first"])
        return cls(
            int(step), torch.from_numpy(arrays["a"]), b, arrays["values"], first, float(largest), float(smallest)
        )


class Kept:
    """A folder in which the way back goes on where it was.

    Args:
        store: the folder, taken; None keeps nothing.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self.last = time.monotonic()

    def begun(self, end: Going, system: System) -> Going:
        """Where the way goes on: from the end of the training, or where it had come to.

        Raises:
            StoreMismatch: if the folder is of other gradients of the queries, or another loss or penalty was told.
        """
        if self.store is None:
            return end
        compare_losses(system, self.store)
        self.store.agree(_ENDED, end.a.numpy(), 1e-6)
        name = _VALUES if self.store.has(_VALUES) else _STATE
        return Going.of(self.store.kept(name)[0]) if self.store.has(name) else end

    def passed(self, state: Going) -> None:
        """A step is behind; it is kept if the last time was a while ago."""
        if self.store is not None and time.monotonic() - self.last >= KEPT_EVERY:
            self.store.keep(_STATE, state.arrays(), step=state.step)
            self.last = time.monotonic()

    def ended(self, state: Going) -> None:
        """The way is at its beginning: the scores are kept in place of the adjoints."""
        if self.store is None:
            return
        if not self.store.has(_VALUES):
            bare = replace(state, a=state.a[:, :0], b=[one[:, :0] for one in state.b])
            self.store.keep(_VALUES, bare.arrays(), step=state.step)
        self.store.end_state({})


@contextmanager
def kept_in(path: Any, fingerprint: dict[str, Any], needed: int) -> Iterator[Kept]:
    """The folder of a way back, taken for this process; one that keeps nothing where no path is named.

    Raises:
        StoreMismatch: if the folder holds other work.
        StorageFailed: if the disk has no room for it, or another process has it.
    """
    if path is None:
        yield Kept(None)
        return
    store = Store(path, fingerprint)
    check_room(store.path, needed)
    with store, threads.fixed():
        yield Kept(store)
