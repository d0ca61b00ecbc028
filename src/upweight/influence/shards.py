"""Removal scores in parts, by processes that need not know of each other; and the whole, when all parts are there.

The c chunks of a store are divided: part i of m computes ⌊c·i/m⌋ to ⌊c·(i+1)/m⌋ − 1. Parts may keep them in one folder
or each in its own. The first part in a folder solves the systems and writes a card beside the chunks: all that Scores
have but their values. Later parts read the solutions and go straight to their rows.

A direct solver gives the same solutions on machines that are alike, and so the same bytes as one run would. Where
solutions differ by rounding (another processor, another number of threads, an iteration) in folders of their own, so do
the values; more than the solver's own residual allows is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, PathNotFound
from upweight.influence import kept, scoring
from upweight.influence.scores import Scores, read_card, write_card
from upweight.influence.scoring import Products
from upweight.influence.system import System
from upweight.model.sweep import CHUNK
from upweight.runs import ranks
from upweight.runs.store import SOLUTIONS, Store, fingerprint, read_tensors

_CARD = "card.safetensors"
_PARTS = "shards"


def chunks_of(part: tuple[int, int], n: int) -> range:
    """The chunks of part i of m, when there are n rows."""
    (i, m), every = part, -(-n // CHUNK)
    return range(every * i // m, every * (i + 1) // m)


def compute(system: System, on: tuple[Any, ...], folder: Path, part: tuple[int, int]) -> range:
    """Computes what a folder lacks of one part of the removal scores; the chunks of that part.

    Args:
        system: of the training rows.
        on: (Xq, yq).
        folder: of this part, or of all.
        part: (i, m) with 0 ≤ i < m.

    Raises:
        InvalidInput: if the solver's answers are random, for chunks hold no standard error.
        StoreMismatch: if the folder holds other work.
    """
    queries = system.encoded(*on)
    system.refuse_other_ranks()
    store, S = _solved(system, queries, folder, part[1])
    chunks = chunks_of(part, system.n)
    solved = torch.where(S.isnan().any(1)[:, None], 0.0, S)  # queries whose system has no solution
    sweep, products, vectors = scoring.by_rows(system, solved, system.penalty_share)
    sweep.fill(products, store, chunks, vectors=vectors, label="scores")
    return chunks


def merge(folders: Sequence[Path]) -> Scores:
    """The scores whose parts are in these folders.

    Raises:
        StoreMismatch: if they hold different work, or solutions that differ by more than rounding.
        InvalidInput: if parts are missing.
    """
    stores = [_opened(folder, folders[0]) for folder in folders]
    first, card = stores[0], stores[0].path / _CARD
    known = read_card(card)
    S = first.solutions
    for other in stores[1:]:
        other.agree(SOLUTIONS, S, kept.rounding(known.certificate.residual))
    places = [next((store for store in stores if k in store), None) for k in range(-(-known.n // CHUNK))]
    missing = [k for k, store in enumerate(places) if store is None]
    if missing:
        raise _unfinished(missing, known.n, int(read_tensors(card)[1][_PARTS]), first.path)
    values = np.concatenate([store.read(k) for k, store in enumerate(places) if store is not None]).T
    values[np.isnan(S).any(1)] = np.nan
    assert known.scale is not None  # removal has a derivative
    return replace(known, values=values * -known.scale)


# ---- inner steps -----------------------------------------------------------------------------------------------------


def _solved(system: System, queries: Examples, folder: Path, parts: int) -> tuple[Store, Tensor]:
    """The folder's store and solutions; made now, with the card, if there is none."""
    if ranks.first_finds(folder / _CARD):
        damping = fingerprint(folder).get("damping") if system.known_damping is None else system.damping
        store = kept.folder(system, queries, system.objective.name, folder, damping)
        kept.compare_losses(system, store)
        return store, torch.from_numpy(store.solutions)
    store = kept.folder(system, queries, system.objective.name, folder)
    solution = scoring.solutions(system, queries, store=store)
    if solution.replicas is not None:
        message = (
            f"{system.solver} gives estimates, and a store keeps no standard error of them. Use solver=CG() or "
            "Cholesky(), or score all rows at once, without --shard."
        )
        raise InvalidInput(message)
    solution = kept.compared(system, store, solution)
    nothing = Products(np.broadcast_to(0.0, (len(queries), system.n)))
    columns, scale = scoring.Columns.of(system.examples), -system.examples.weights / system.n
    known = scoring.scores(system, solution, nothing, scale, columns, "row removed", queries)
    if ranks.first():
        write_card(folder / _CARD, known, {_PARTS: str(parts)})
    return store, solution.x


def _opened(folder: Path, first: Path) -> Store:
    """The store of a folder whose systems are solved, if it holds the same work as the first."""
    if not (folder / _CARD).is_file():
        message = (
            f"{folder} holds no part of scores whose systems are solved. Name the folders that `upweight score STUDY "
            "--store FOLDER --shard i/n` was given, after it has ended."
        )
        raise PathNotFound(message)
    return Store(folder, fingerprint(first))


def _unfinished(missing: list[int], n: int, parts: int, folder: Path) -> InvalidInput:
    """The error that names the parts to run again."""
    again = [f"{i}/{parts}" for i in range(parts) if set(missing) & set(chunks_of((i, parts), n))]
    rows = f"{missing[0] * CHUNK:,} to {min(n, (missing[-1] + 1) * CHUNK) - 1:,}"
    message = (
        f"{len(missing)} of {-(-n // CHUNK)} chunks are missing, the first and the last of them in rows {rows}: shard "
        f"{', '.join(again[:8])}{' …' if len(again) > 8 else ''} has not ended. Run it again, as `upweight score STUDY "
        f"--store {folder} --shard {again[0]}`; it computes what is missing."
    )
    return InvalidInput(message)
