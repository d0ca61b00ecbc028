"""States of a training in a folder, so that memory holds one of them; and the steps, when all are made.

folder/
manifest.json                {"format": 2, "fingerprint": {"recording": 1, optimiser, clip, blocks and shapes}}
step-000000.safetensors      the parameters, and what the optimiser remembers of them, before a step
step-000004.safetensors      …
steps.safetensors            written last: rows, scales, weights and numbers of every step; which states belong
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import InvalidInput
from upweight.runs.store import MANIFEST, Store, fingerprint, read_part, read_work
from upweight.training.trajectory import Part, State, Step

RECORDING, STEPS = "recording", "steps"
_PARAMETERS = "parameters"
_SUFFIX = ".safetensors"


class KeptStates(MutableMapping[int, State]):
    """States by the number of the step that they are before, each in a file of its own.

    Args:
        path: the folder.
        work: what ties the files to it.
        steps: whose states are there.
        store: who writes them; None where they are only read.
    """

    def __init__(self, path: Path, work: str, steps: Sequence[int] = (), store: Store | None = None) -> None:
        self.path, self.work, self.store = path, work, store
        self.steps = set(steps)

    def __getitem__(self, at: int) -> State:
        if at not in self.steps:
            raise KeyError(at)
        arrays, card = read_part(self.path / f"{_name(at)}{_SUFFIX}", self.work)
        parameters: dict[str, Tensor] = {}
        memory: dict[str, dict[str, Tensor]] = {}
        for name, array in arrays.items():
            kind, block = name.split("/", 1)
            one = torch.from_numpy(array)
            if kind == _PARAMETERS:
                parameters[block] = one
            else:
                memory.setdefault(block, {})[kind] = one
        order: list[str] = card["blocks"]
        slots = {block: tuple(memory[block][str(k)] for k in range(len(memory[block]))) for block in order}
        return State({block: parameters[block] for block in order}, slots)

    def __setitem__(self, at: int, state: State) -> None:
        assert self.store is not None
        arrays = {f"{_PARAMETERS}/{name}": one.numpy() for name, one in state.parameters.items()}
        for name, slots in state.memory.items():
            arrays |= {f"{k}/{name}": one.numpy() for k, one in enumerate(slots)}
        self.store.keep(_name(at), arrays, {"blocks": list(state.parameters)}, step=at)
        self.steps.add(at)

    def __delitem__(self, at: int) -> None:
        assert self.store is not None
        self.steps.remove(at)
        self.store.drop(_name(at))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.steps))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Told:
    """What a folder tells of a training beside its states.

    Args:
        steps: all of them.
        states: those that are there.
        optimiser: its name.
        clip: max_norm of the clipping.
        group_of: the parameter group of every block.
        moving: the blocks that the steps move.
        rounding: how coarse the numbers were.
    """

    steps: list[Step]
    states: KeptStates
    optimiser: str
    clip: float | None
    group_of: dict[str, int]
    moving: list[str]
    rounding: float


def opened_for(path: Any, work: Mapping[str, Any]) -> Store:
    """The folder of a training that is about to be recorded; what an unfinished one has left is dropped.

    Raises:
        InvalidInput: if it holds a whole training.
    """
    store = Store(path, {RECORDING: 1, **work}, waiting=False)
    if store.has(STEPS):
        message = (
            f"{store.path} holds a training that was recorded to its end. Go on with "
            f"uw.Recording.open({str(store.path)!r}, model, X, y, loss=…), or name another folder."
        )
        raise InvalidInput(message)
    for left in store.path.glob(f"step-*{_SUFFIX}"):
        store.drop(left.name.removesuffix(_SUFFIX))
    return store


def ended(store: Store, steps: Sequence[Step], states: Sequence[int], card: Mapping[str, Any]) -> None:
    """The training has ended: its steps are kept."""
    parts = [part for step in steps for part in step.parts]
    names = list(steps[0].groups[0]) if steps else []
    store.keep(
        STEPS,
        {
            "rows": np.concatenate([part.rows for part in parts]) if parts else np.zeros(0, np.int64),
            "lengths": np.array([len(part.rows) for part in parts], np.int64),
            "scales": np.array([part.scale for part in parts]),
            "parts": np.array([len(step.parts) for step in steps], np.int64),
            "settings": np.array([[[group[name] for name in names] for group in step.groups] for step in steps]),
            "states": np.array(sorted(states), np.int64),
        },
        {**card, "names": names},
    )


def told(path: Any) -> Told:
    """What the folder of a recorded training holds.

    Raises:
        InvalidInput: if there is none, or it did not end.
    """
    folder = Path(path)
    known = fingerprint(folder) if (folder / MANIFEST).exists() else {}
    if RECORDING not in known:
        message = (
            f"{folder} holds no recorded training. One is kept by uw.Recording(model, optimizer, X, y, store=folder)."
        )
        raise InvalidInput(message)
    work, file = read_work(folder), folder / f"{STEPS}{_SUFFIX}"
    if not file.exists():
        message = (
            f"The training in {folder} has not ended: it was interrupted, or still runs. Run the script that records "
            "it again; it begins anew in the same folder."
        )
        raise InvalidInput(message)
    arrays, card = read_part(file, work)
    states = KeptStates(folder, work, arrays["states"].tolist())
    return Told(
        _steps(arrays, card["names"]),
        states,
        known["optimiser"],
        known["clip"],
        card["group_of"],
        card["moving"],
        card["rounding"],
    )


def _steps(arrays: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[Step]:
    rows = np.split(arrays["rows"], np.cumsum(arrays["lengths"])[:-1])
    parts = [Part(some, float(scale)) for some, scale in zip(rows, arrays["scales"], strict=True)]
    found, place = [], 0
    for count, groups in zip(arrays["parts"].tolist(), arrays["settings"].tolist(), strict=True):
        settings = tuple(dict(zip(names, group, strict=True)) for group in groups)
        found.append(Step(tuple(parts[place : place + count]), settings))
        place += count
    return found


def _name(at: int) -> str:
    return f"step-{at:06d}"
