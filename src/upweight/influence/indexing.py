"""An index is made: eigenvectors of Kronecker factors, which of their coordinates are kept, and every row along those.

`influence.index` is all of it, `influence.index_shard` a part of the rows. The eigenvectors come first, then the rows
chunk by chunk, last what belongs to all rows: whatever is there is not made again.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.ids import packed as packed_ids
from upweight.errors import InvalidInput, UnsupportedModel, checked_count
from upweight.influence import kept
from upweight.influence.index import BASIS, COORDINATES, ORDER, Index, opened
from upweight.influence.system import System
from upweight.model import per_row
from upweight.operators.kronecker import EKFAC, KFAC, Kronecker
from upweight.runs import ranks
from upweight.runs.progress import bar
from upweight.runs.quantised import BITS, packed, unpacked
from upweight.runs.stopping import stop_here
from upweight.runs.store import Store, chunk_name
from upweight.solvers.factored import Diagonalised, Factored

_PROBES, _NUMBERS = 24, 2**27  # rows on either side of the pairs on which the error is measured; numbers held for them
_FEWEST = 4  # rows: one on each side of two pairs
_CHUNK_NUMBERS = 2**23  # of coordinates in one chunk, and of gradients that are rotated together
_PART = 2**20  # coordinates that are compared at once: whole blocks of `quantised`
_FRACTIONS = 32  # of all coordinates, between which the count is chosen


def index(system: System, folder: str | os.PathLike[str], error: float, bits: int) -> Index:
    """`Influence.index`."""
    store = _store(system, folder, error, bits)
    with kept.taken(store):
        chunks = _made(store, system, float(error), bits)
        _fill(store, system, bits, range(len(chunks)))
        if ranks.first():
            _finish(store, system)
    return Index(store.path)


def shard(system: System, folder: str | os.PathLike[str], part: tuple[int, int], error: float, bits: int) -> range:
    """`Influence.index_shard`."""
    i, m = checked_count(part[0], "shard", least=0, hint="the first is 0"), checked_count(part[1], "of")
    if i >= m:
        message = f"shard={i}, of={m}. Shards are numbered from 0: pass shard=0 to shard={m - 1}."
        raise InvalidInput(message)
    store = _store(system, folder, error, bits, f"-{i}-of-{m}")
    with kept.taken(store):
        chunks = _made(store, system, float(error), bits)
        mine = range(len(chunks) * i // m, len(chunks) * (i + 1) // m)
        _fill(store, system, bits, mine)
    return range(chunks[mine.start].start, chunks[mine.stop - 1].stop) if mine else range(0)


def _store(system: System, folder: str | os.PathLike[str], error: float, bits: int, part: str = "") -> Store:
    """The folder of the index, or of a part of it; of several ranks the first one leads."""
    if not isinstance(error, int | float) or not 0 < error < 1 or bits not in BITS:
        message = (
            f"The error is {error!r}, and bits are {bits!r}. Pass an error between 0 and 1, such as 0.1, and 4 or 8 "
            "bits."
        )
        raise InvalidInput(message)
    if not isinstance(system.curvature, EKFAC | KFAC) or system.objective.linear is not None:
        message = (
            "An index keeps gradients along the eigenvectors of a network's Kronecker factors, and the curvature of "
            f"{system.objective.name} is {system.curvature!r}. Pass a network, and curvature=operators.EKFAC()."
        )
        raise UnsupportedModel(message)
    if system.n < _FEWEST:
        message = (
            f"{system.objective.name} has {system.n} training rows, and the error of an index is measured on pairs of "
            f"rows held out, for which {_FEWEST} are the fewest. Use on_loss, which needs no index."
        )
        raise InvalidInput(message)
    system.refuse_other_ranks()
    work = {"index": ORDER, **kept.work(system), "error": float(error), "bits": bits}
    return ranks.after_first("opening the store", lambda: Store(folder, work, part=part, follows=not ranks.first()))


def _made(store: Store, system: System, error: float, bits: int) -> list[range]:
    """The eigenvectors are in the folder now; the rows of every chunk."""
    kept.compare_losses(system, store)
    if not ranks.first_finds("eigenvectors", lambda: store.has(BASIS)):
        system.prepare_in(store)
        operator: Kronecker = system.operator  # type: ignore[assignment]
        checked = Factored().prepare(operator, system.damping)
        with operator.here():
            chosen, card = _choice(system, checked, error, bits)
            if ranks.first():
                _write_basis(store, system, chosen, card)
        ranks.after_first("writing eigenvectors", lambda: None)  # nobody reads what is not there yet
    return _chunks(store, system.n)


def _chunks(store: Store, n: int) -> list[range]:
    """The rows of every chunk."""
    rows = max(1, min(1024, _CHUNK_NUMBERS // len(store.kept(BASIS)[0]["eigenvalues"])))
    return [range(start, min(start + rows, n)) for start in range(0, n, rows)]


def _fill(store: Store, system: System, bits: int, numbers: range) -> None:
    """These chunks of the rows, but for those that are there; of several ranks each makes its share."""
    operator, chosen = opened(store.path, system)
    arrays, card = store.kept(BASIS)
    whiten = torch.from_numpy(1 / np.sqrt(arrays["eigenvalues"] + card["damping"])).to(system.objective.reference)
    quiet, chunks = replace(system.sweep, progress=False), _chunks(store, system.n)
    found = ranks.by_first("looking for finished chunks", lambda: {"": np.array([n in store for n in numbers])})
    assert found is not None  # the function gave it
    missing = [number for number, there in zip(numbers, found[""], strict=True) if not there]
    with ranks.work(f"index of {system.n:,} rows", len(missing)) as work:
        mine = work.shares(missing)[work.rank]
        with bar(len(mine), "index", system.sweep.progress, unit="chunk") as done:
            for number in mine:
                work.at(number)
                values = quiet.emit(
                    lambda batch, _: operator.coordinates(batch, chosen) * whiten,
                    vectors=per_row.width(quiet),
                    rows=np.array(chunks[number]),
                    label="index",
                )
                codes, scales = packed(values.astype(np.float32), bits)
                if len(missing) > 1 or ranks.first():
                    store.keep(chunk_name(number), {"codes": codes, "scales": scales}, event="chunk", number=number)
                    stop_here(f"chunk {number + 1} of {len(chunks)}")
                done(1)
        work.told(None)  # nobody goes on before all are there


def _finish(store: Store, system: System) -> None:
    """Written last: what belongs to all rows."""
    arrays, card = store.kept(BASIS)
    chunks = _chunks(store, system.n)
    card |= {"rows": len(chunks[0]), "coverage": system.objective.coverage}
    names = system.examples.names
    if names is not None:
        card |= {"names": packed_ids(names.values), "axis": names.name}
    told = {"eigenvalues": arrays["eigenvalues"], "constant": arrays["constant"], "weights": system.examples.weights}
    store.keep(COORDINATES, told, card)


# ---- which coordinates -----------------------------------------------------------------------------------------------


def _choice(system: System, checked: Diagonalised, error: float, bits: int) -> tuple[list[Tensor], dict[str, Any]]:
    """For every basis the coordinates that are kept: the fewest of the largest eigenvalues that leave this error."""
    operator: Kronecker = system.operator  # type: ignore[assignment]
    values = torch.cat([basis.eigenvalues.flatten() for basis in operator.bases])
    data = torch.cat([basis.values.flatten() for basis in operator.bases])
    p, reached = len(values), sum(basis.at.numel() for basis in operator.bases[: len(operator.layers)])
    order = data[:reached].argsort(descending=True)  # the loss does not use what is behind
    count = max(2, min(_PROBES, system.n // 4, _NUMBERS // (4 * p)))
    rows = system.examples.spread(4 * count)
    whitened = (values + system.damping).sqrt()
    Z = torch.empty(len(rows), p, dtype=system.objective.reference.dtype)
    for some in np.array_split(np.arange(len(rows)), min(len(rows), -(-len(rows) * p // _CHUNK_NUMBERS))):
        Z[some] = _rotated(operator, per_row.gradients(system.sweep, rows[some]), None).div_(whitened).to(Z)
    share = _rotated(operator, system.penalty_share[None], None) / whitened  # it is kept apart, and not rounded
    sides = [Z[number::4] for number in range(4)]  # two pairs of sides: to choose by, and to measure on
    step = -(-reached // _FRACTIONS)
    parts = torch.stack(
        [sides[0][:, some].double() @ (sides[1][:, some] + share[:, some]).T for some in order.split(step)]
    ).cumsum(0)
    missed = (parts - parts[-1]).flatten(1).norm(dim=1) / parts[-1].norm().clamp(min=1e-300)
    room = math.sqrt(max(error**2 - _rounding(sides[0], sides[1], share, bits) ** 2, 0.0))
    kept_count = min(reached, step * (1 + int(torch.nonzero(missed <= max(room, 1e-12))[0])))
    used = order[:kept_count].sort().values
    found, correlation = _missed(sides[2], sides[3], share, used, bits)
    told = {"error": found, "correlation": correlation, "pairs": len(sides[2]) * len(sides[3]), "size": p, "bits": bits}
    told |= {"lowest": checked.lowest, "largest": checked.largest}
    told |= {"damping": system.damping, "curvature": repr(system.curvature), "theta": kept.theta(system)}
    starts, chosen = 0, []
    for basis in operator.bases:
        inside = used[(used >= starts) & (used < starts + basis.at.numel())] - starts
        chosen.append(inside)
        starts += basis.at.numel()
    return chosen, told


def _missed(
    queries: Float[Tensor, "q p"],
    rows: Float[Tensor, "r p"],
    share: Float[Tensor, "1 p"],
    used: Int[Tensor, " k"],
    bits: int,
) -> tuple[float, float]:
    """How far values by these coordinates of rounded rows are from those by all: ‖ours − theirs‖/‖theirs‖, and r."""
    ours = theirs = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    for some in used.split(_PART):
        codes = packed(rows[:, some].float().numpy(), bits)
        rounded = torch.from_numpy(unpacked(*codes, bits, len(some))).double()
        ours = ours + queries[:, some].double() @ (rounded + share[:, some]).T
    for q, r, s in zip(queries.split(_PART, 1), rows.split(_PART, 1), share.split(_PART, 1), strict=True):
        theirs = theirs + q.double() @ (r + s).T
    both = torch.stack([ours.flatten(), theirs.flatten()])
    correlation = float(torch.corrcoef(both)[0, 1]) if both.shape[1] > 1 else float("nan")
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)), correlation


def _rounding(
    queries: Float[Tensor, "q p"], rows: Float[Tensor, "r p"], share: Float[Tensor, "1 p"], bits: int
) -> float:
    """The share of the values that rounding all coordinates costs."""
    return _missed(queries, rows, share, torch.arange(rows.shape[1]), bits)[0]


def _rotated(operator: Kronecker, G: Float[Tensor, "r p"], chosen: list[Tensor] | None) -> Float[Tensor, "r k"]:
    """Qᵀg of gradients that are written out, along all eigenvectors or some."""
    parts = []
    for number, basis in enumerate(operator.bases):
        Z = basis.rotated(G[:, basis.at]).flatten(1)
        parts.append(Z if chosen is None else Z[:, chosen[number]])
    return torch.cat(parts, 1)


def _write_basis(store: Store, system: System, chosen: list[Tensor], card: dict[str, Any]) -> None:
    """The eigenvectors that are used, in the precision of the model, and which pairs of them."""
    operator: Kronecker = system.operator  # type: ignore[assignment]
    dtype = system.objective.reference.dtype
    arrays: dict[str, NDArray[Any]] = {}
    for number, (basis, at) in enumerate(zip(operator.bases, chosen, strict=True)):
        arrays[f"{number}.chosen"] = at.numpy()
        for side in ("left", "right"):
            Q = getattr(basis, side)
            if Q is not None and len(at):
                arrays[f"{number}.{side}"] = Q.to(dtype).float().numpy() if dtype != torch.float64 else Q.numpy()
    eigenvalues = torch.cat([basis.eigenvalues.flatten()[at] for basis, at in zip(operator.bases, chosen, strict=True)])
    arrays["eigenvalues"] = eigenvalues.numpy()
    arrays["constant"] = _rotated(operator, system.penalty_share[None], chosen)[0].numpy()
    store.keep(BASIS, arrays, card, once=True)
