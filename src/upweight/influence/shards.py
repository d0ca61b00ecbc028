"""Removal scores in parts, by processes that need not know of each other; and the whole, when all parts are there.

The c chunks of a store (`kept.span`) are divided: part i of m computes ⌊c·i/m⌋ to ⌊c·(i+1)/m⌋ − 1. Parts may keep them
in one folder or each in its own. The first part in a folder solves the systems and writes a card beside the chunks: all
that Scores have but their values. Later parts read the solutions and go straight to their rows. Parts hold locks of
their own: two processes are not at the same part, nor is one at the whole while another is at a part.

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
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.errors import InvalidInput, PathNotFound
from upweight.influence import kept, scoring
from upweight.influence.scores import Scores
from upweight.influence.scoring import Products
from upweight.influence.system import System
from upweight.model.chunks import CHUNK
from upweight.runs import ranks
from upweight.runs.store import SOLUTIONS, SUFFIX, Store, fingerprint

_CARD = "card"
_PARTS = "shards"


def chunks_of(part: tuple[int, int], n: int, span: int = 1) -> range:
    """The chunks of part i of m, when there are n rows, and `span` times 1,024 of them in a chunk."""
    (i, m), every = part, -(-n // (span * CHUNK))
    return range(every * i // m, every * (i + 1) // m)


def compute(system: System, on: tuple[Any, ...], folder: Path, part: tuple[int, int]) -> range:
    """Computes what a folder lacks of one part of the removal scores; the rows of that part.

    Args:
        system: of the training rows.
        on: (Xq, yq).
        folder: of this part, or of all.
        part: (i, m) with 0 ≤ i < m.

    Raises:
        InvalidInput: if the solver's answers are random, for chunks hold no standard error.
        StoreMismatch: if the folder holds other work.
        StorageFailed: if another process is at the same part, or at the whole.
    """
    queries = system.encoded(*on)
    system.refuse_other_ranks()
    kept.refuse_other_queries(queries, system.objective.name)
    store = kept.folder(system, queries, system.objective.name, folder, f"-{part[0]}-of-{part[1]}")
    chunks = chunks_of(part, system.n, store.span)
    with kept.taken(store):
        S = _solved(system, queries, store, part[1])
        solved = torch.where(S.isnan().any(1)[:, None], 0.0, S)  # queries whose system has no solution
        sweep, products = scoring.by_rows(system, solved, system.penalty_share)
        sweep.fill(products, store, chunks, vectors=scoring.vectors(system, solved), label="scores")
    size = store.span * CHUNK
    return range(min(system.n, chunks.start * size), min(system.n, chunks.stop * size))


def merge(folders: Sequence[Path]) -> Scores:
    """The scores whose parts are in these folders.

    Raises:
        StoreMismatch: if they hold different work, or solutions that differ by more than rounding.
        InvalidInput: if parts are missing.
    """
    stores = [_opened(folder, folders[0]) for folder in folders]
    first = stores[0]
    arrays, card = first.kept(_CARD)
    known, S = _without_values(arrays, card), first.solutions
    span = kept.span_in(first.path)
    for other in stores[1:]:
        other.agree(SOLUTIONS, S, kept.rounding(known.certificate.residual))
    places = [next((store for store in stores if k in store), None) for k in range(-(-known.n // (span * CHUNK)))]
    missing = [k for k, store in enumerate(places) if store is None]
    if missing:
        raise _unfinished(missing, known.n, span, int(card[_PARTS]), first.path)
    values = np.concatenate([store.read(k) for k, store in enumerate(places) if store is not None]).T
    values[np.isnan(S).any(1)] = np.nan
    assert known.scale is not None  # removal has a derivative
    return replace(known, values=values * -known.scale)


# ---- inner steps -----------------------------------------------------------------------------------------------------


def _solved(system: System, queries: Examples, store: Store, parts: int) -> Tensor:
    """The store's solutions; made now, with the card, if there are none."""
    kept.compare_losses(system, store)
    if ranks.first_finds("a card", lambda: store.has(_CARD)):
        return torch.from_numpy(store.solutions)
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
    kept.finish(store, known, _CARD, **{_PARTS: parts})
    return solution.x


def _without_values(arrays: dict[str, NDArray[Any]], card: dict[str, Any]) -> Scores:
    """The scores of a card, with 0 for every value."""
    shape = len(arrays["query_values"]), len(arrays["rows"])
    return Scores.of_parts(arrays | {"values": np.broadcast_to(0.0, shape)}, card)


def _opened(folder: Path, first: Path) -> Store:
    """The store of a folder whose systems are solved, if it holds the same work as the first."""
    if not (folder / f"{_CARD}{SUFFIX}").is_file():
        message = (
            f"{folder} holds no part of scores whose systems are solved. Name the folders that `upweight score STUDY "
            "--store FOLDER --shard i/n` was given, after it has ended."
        )
        raise PathNotFound(message)
    return Store(folder, fingerprint(first))


def _unfinished(missing: list[int], n: int, span: int, parts: int, folder: Path) -> InvalidInput:
    """The error that names the parts to run again."""
    again = [f"{i}/{parts}" for i in range(parts) if set(missing) & set(chunks_of((i, parts), n, span))]
    size = span * CHUNK
    rows = f"{missing[0] * size:,} to {min(n, (missing[-1] + 1) * size) - 1:,}"
    message = (
        f"{len(missing)} of {-(-n // size)} chunks are missing, the first and the last of them in rows {rows}: shard "
        f"{', '.join(again[:8])}{' …' if len(again) > 8 else ''} has not ended. Run it again, as `upweight score STUDY "
        f"--store {folder} --shard {again[0]}`; it computes what is missing."
    )
    return InvalidInput(message)
