"""An index of training gradients on disk: new queries, dampings and leading rows without another pass over the data.

Along the eigenvectors of a Kronecker curvature the system is divided out, coordinate by coordinate:

    values[q, i] = (wᵢ/n) Σ_j z_qj (z_ij + c_j) / (Λ_j + λ)        z = Qᵀ∇L, c = Qᵀ of the row's share of the penalty

The index keeps, of every row, the coordinates of the largest Λ, as z/√(Λ + λ₀) in 4 bits (`runs.quantised`), as many as
an error that was asked for allows. What rounding loses is random from coordinate to coordinate and averages out, so
that many coordinates in few bits are nearer to the scores than few in many. The error is measured on pairs of rows that
had no part in the choice, and stands in the certificate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.ids import Ids, packed as packed_ids, unpacked as unpacked_ids
from upweight.errors import (
    Damaged,
    InvalidInput,
    NotPositiveDefinite,
    PathNotFound,
    StoreMismatch,
    UnsupportedModel,
    checked_count,
    first_line,
)
from upweight.influence import kept
from upweight.influence.certificate import Certificate
from upweight.influence.running import Largest
from upweight.influence.scores import Extremes, Scores, naming
from upweight.influence.system import System
from upweight.influence.top import TopK
from upweight.model import per_row
from upweight.operators.factors import Basis
from upweight.operators.kronecker import EKFAC, KFAC, Kronecker
from upweight.runs import ranks
from upweight.runs.progress import bar
from upweight.runs.quantised import BITS, packed, unpacked
from upweight.runs.stopping import stop_here
from upweight.runs.store import SUFFIX, Store, chunk_name, read_part, read_work
from upweight.solvers.base import checked_damping
from upweight.solvers.factored import ROUNDING, Factored
from upweight.solvers.lanczos import rounded_up

_PROBES, _NUMBERS = 24, 2**27  # rows on either side of the pairs on which the error is measured; numbers held for them
_FEWEST = 4  # rows: one on each side of two pairs
_CHUNK_NUMBERS = 2**23  # of coordinates in one chunk, and of gradients that are rotated together
_FRACTIONS = 32  # of all coordinates, between which the count is chosen
_COORDINATES, _BASIS = "coordinates", "basis"
_TOLD = ("rows", "bits", "damping", "error", "lowest", "largest", "coverage", "correlation")  # numbers of a card


@dataclass(frozen=True)
class Coordinates:
    """Queries along the eigenvectors of an index: all that is needed of them.

    Args:
        values: (q, k) z = Qᵀ∇L of each query.
        query_values: (q,) the queries' losses now.
        names: their names, or None.
    """

    values: Float[NDArray[np.float32], "q k"]
    query_values: Float[NDArray[np.float64], " q"]
    names: Ids | None = None

    def __len__(self) -> int:
        return len(self.values)


class Index:
    """Training gradients in few bits, in a folder; made by `influence.index`, opened by `Index.open`.

    Cost of a question: one pass over the files, 2·q·k flops a row; neither model nor data are needed.

    Args:
        folder: with a manifest, coordinates and chunks, as docs/store-format.md says.

    Raises:
        PathNotFound: if the folder holds no index; InvalidInput if it is not finished.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / f"{_COORDINATES}{SUFFIX}").is_file():
            message = (
                f"{self.folder} holds no finished index. Make one: influence.index({str(self.folder)!r}); the same "
                "call goes on where it was interrupted."
            )
            raise PathNotFound(message)
        self.card: dict[str, Any]
        arrays, self.card = _part(self.folder, _COORDINATES)
        try:
            self.eigenvalues, self.weights, self.constant = (
                arrays[name].astype(np.float64, casting="equiv") for name in ("eigenvalues", "weights", "constant")
            )
            axis = self.card.get("axis")
            name = tuple(axis) if isinstance(axis, list) else axis
            self.names = None if "names" not in self.card else Ids(unpacked_ids(self.card["names"]), name)
            numbers = {told: float(self.card[told]) for told in _TOLD}
            shapes = self.eigenvalues.ndim, self.weights.ndim, self.constant.shape
            if shapes != (1, 1, self.eigenvalues.shape) or numbers["rows"] < 1 or numbers["bits"] not in BITS:
                raise _other(self.folder / f"{_COORDINATES}{SUFFIX}", f"{shapes}, {numbers}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, Damaged):
                raise
            raise _other(self.folder / f"{_COORDINATES}{SUFFIX}", first_line(error)) from error
        missing = [chunk for chunk in range(self.chunks) if not self._file(chunk).is_file()]
        if missing:
            refusal = (
                f"{self.folder} lacks {len(missing)} of {self.chunks} chunks. Make the same call again, which goes on "
                f"where it was interrupted: influence.index({str(self.folder)!r})."
            )
            raise InvalidInput(refusal)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """The index in a folder."""
        return cls(folder)

    @property
    def n(self) -> int:
        """Training rows."""
        return len(self.weights)

    @property
    def k(self) -> int:
        """Coordinates kept of each row."""
        return len(self.eigenvalues)

    @property
    def damping(self) -> float:
        """The λ for which the index was made, and which acts unless another is asked for."""
        return float(self.card["damping"])

    @property
    def error(self) -> float:
        """‖values of the index − values of its curvature‖ / ‖values‖, on pairs of rows held out, at `damping`."""
        return float(self.card["error"])

    @property
    def chunks(self) -> int:
        """Files that hold the rows."""
        return -(-self.n // int(self.card["rows"]))

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def _repr_html_(self) -> str:
        return markup.facts("Index of training gradients", [("folder", self.folder), ("holds", repr(self)[6:-1])])

    def __repr__(self) -> str:
        return (
            f"Index({self.n:,} rows × {self.k:,} of {self.card['size']:,} coordinates in {self.card['bits']} bits, "
            f"{self.bytes / 1e6:.3g} MB; error {self.error:.2g}, correlation {self.card['correlation']:.4f} on "
            f"{self.card['pairs']} pairs held out; {self.card['curvature']} + {self.damping:.3g}·I)"
        )

    def coordinates(self, influence: Any, Xq: Any, yq: Any = None) -> Coordinates:
        """Queries for this index, by the model that it was made of.  Cost: a backward pass for each.

        Args:
            influence: of the same parameters; its factors are not needed.
            Xq: the queries' inputs.
            yq: their targets.

        Raises:
            StoreMismatch: if the parameters are others.
        """
        system: System = influence.system
        theirs, own = kept.theta(system), self.card["theta"]
        if theirs != own:
            message = (
                f"{self.folder} was made of other parameters (hash {own}) than those of {system.objective.name} "
                f"(hash {theirs}). Pass the Influence of the model as it was then, or make another index."
            )
            raise StoreMismatch(message)
        queries = system.encoded(Xq, yq)
        operator, chosen = _opened(self.folder, system)
        sweep = system.sweep.over(system.objective, queries)
        values = sweep.emit(
            lambda batch, _: operator.coordinates(batch, chosen), vectors=per_row.width(sweep), label="queries"
        )
        return Coordinates(values.astype(np.float32), per_row.measures(sweep), queries.names)

    def on_loss(self, queries: Coordinates, *, damping: float | None = None) -> Scores:
        """Equation 2 (`Influence.on_loss`) from the index.  Memory: q × n numbers.

        Args:
            queries: of `coordinates`.
            damping: another λ; None takes that of the index.

        Raises:
            NotPositiveDefinite: if C + λI has an eigenvalue that is too small to divide by.
        """
        values = np.concatenate([block for _, block in self._values(queries, damping)], 1)
        return Scores(
            values,
            "row removed",
            np.arange(self.n),
            self.n,
            self._certificate(queries, damping),
            -self.weights / self.n,
            query_values=queries.query_values,
            **naming(self.names, queries.names),
        )

    def extremes(self, queries: Coordinates, k: int = 10, *, damping: float | None = None) -> Extremes:
        """The k rows that help and harm each query most, by one pass that never holds q × n numbers.

        Args:
            queries: of `coordinates`.
            k: rows on either side.
            damping: as for on_loss.

        Raises:
            InvalidInput: if k is larger than the number of rows; NotPositiveDefinite as for on_loss.
        """
        if not 1 <= k <= self.n:
            message = f"k={k}, and the index has {self.n} rows. Ask for 1 to {self.n}."
            raise InvalidInput(message)
        best = {sign: Largest(len(queries), k) for sign in (1, -1)}
        for rows, block in self._values(queries, damping):
            for sign, most in best.items():
                most.add(int(rows[0]), sign * block.T)
        ids = None if self.names is None else self.names.values
        asked = None if queries.names is None else queries.names.values
        helpful, harmful = (
            TopK(rows, sign * keys, None if ids is None else ids[rows], asked)
            for sign, (rows, keys) in ((sign, most.found()) for sign, most in best.items())
        )
        return Extremes(helpful, harmful, queries.query_values, self._certificate(queries, damping))

    def _values(
        self, queries: Coordinates, damping: float | None
    ) -> Iterator[tuple[NDArray[np.int64], Float[NDArray[np.float64], "q c"]]]:
        """The rows of a chunk, and their values."""
        if queries.values.shape[1] != self.k:
            message = (
                f"These queries have {queries.values.shape[1]:,} coordinates, and the index {self.k:,}. Make them with "
                "this index: index.coordinates(influence, Xq, yq)."
            )
            raise InvalidInput(message)
        shift = self.damping if damping is None else checked_damping(damping)
        lowest, largest = self.card["lowest"], self.card["largest"]
        if lowest + shift <= ROUNDING * largest:
            refusal = (
                f"C has an eigenvalue of {lowest:.3g} against a largest of {largest:.3g}, which is too small to divide "
                f"by with damping={shift:g}: directions that the data do not bend. Ask with "
                f"damping={rounded_up(1e-3 * largest):g}, or leave it out for that of the index."
            )
            raise NotPositiveDefinite(refusal)
        whitened = np.sqrt(self.eigenvalues + self.damping)
        Z = queries.values / (self.eigenvalues + shift)
        share = (Z @ self.constant)[:, None]
        Z = np.ascontiguousarray((Z * whitened).T, dtype=np.float32)
        for chunk in range(self.chunks):
            arrays, _ = _part(self.folder, chunk_name(chunk))
            start = chunk * int(self.card["rows"])
            rows = np.arange(start, min(start + int(self.card["rows"]), self.n))
            try:
                found = unpacked(arrays["codes"], arrays["scales"], int(self.card["bits"]), self.k)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise _other(self._file(chunk), first_line(error)) from error
            if found.shape != (len(rows), self.k):
                raise _other(self._file(chunk), f"{found.shape} in place of {(len(rows), self.k)}")
            yield rows, ((found @ Z).T.astype(np.float64) + share) * self.weights[rows] / self.n

    def _certificate(self, queries: Coordinates, damping: float | None) -> Certificate:
        what = (
            f"{self.card['curvature']}, an index of {self.k:,} of {self.card['size']:,} coordinates in "
            f"{self.card['bits']} bits (error {self.error:.2g} on pairs held out, at damping {self.damping:.3g})"
        )
        return Certificate(
            residual=np.full(len(queries), np.nan),  # nothing was solved here: the error is told in words
            converged=True,
            damping=self.damping if damping is None else float(damping),
            gradient_norm=float("nan"),
            min_curvature=float("nan"),
            coverage=float(self.card["coverage"]),
            drift=np.full(len(queries), np.nan),
            curvature=what,
            solver="division by its eigenvalues",
        )

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk_name(chunk)}{SUFFIX}"


def _other(file: Path, found: str) -> Damaged:
    """The error about a file that is whole, and holds something else."""
    return Damaged(f"{file} holds no part of an index ({found}). Delete the folder, and make the index again.")


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
    work = {"index": 1, **kept.work(system), "error": float(error), "bits": bits}
    return ranks.after_first("opening the store", lambda: Store(folder, work, part=part, follows=not ranks.first()))


def _made(store: Store, system: System, error: float, bits: int) -> list[range]:
    """The eigenvectors are in the folder now; the rows of every chunk."""
    kept.compare_losses(system, store)
    if not ranks.first_finds("eigenvectors", lambda: store.has(_BASIS)):
        system.prepare_in(store)
        chosen, card = _choice(system, error, bits)
        if ranks.first():
            _write_basis(store, system, chosen, card)
        ranks.after_first("writing eigenvectors", lambda: None)  # nobody reads what is not there yet
    return _chunks(store, system.n)


def _chunks(store: Store, n: int) -> list[range]:
    """The rows of every chunk."""
    rows = max(1, min(1024, _CHUNK_NUMBERS // len(store.kept(_BASIS)[0]["eigenvalues"])))
    return [range(start, min(start + rows, n)) for start in range(0, n, rows)]


def _fill(store: Store, system: System, bits: int, numbers: range) -> None:
    """These chunks of the rows, but for those that are there; of several ranks each makes its share."""
    operator, chosen = _opened(store.path, system)
    arrays, card = store.kept(_BASIS)
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
    arrays, card = store.kept(_BASIS)
    chunks = _chunks(store, system.n)
    card |= {"rows": len(chunks[0]), "coverage": system.objective.coverage}
    names = system.examples.names
    if names is not None:
        card |= {"names": packed_ids(names.values), "axis": names.name}
    told = {"eigenvalues": arrays["eigenvalues"], "constant": arrays["constant"], "weights": system.examples.weights}
    store.keep(_COORDINATES, told, card)


# ---- which coordinates -----------------------------------------------------------------------------------------------


def _choice(system: System, error: float, bits: int) -> tuple[list[Tensor], dict[str, Any]]:
    """For every basis the coordinates that are kept: the fewest of the largest eigenvalues that leave this error.

    Raises:
        NotPositiveDefinite: if C + λI has an eigenvalue that is too small to divide by.
    """
    operator: Kronecker = system.operator  # type: ignore[assignment]
    checked = Factored().prepare(operator, system.damping)
    values = torch.cat([basis.eigenvalues.flatten() for basis in operator.bases])
    data = torch.cat([basis.values.flatten() for basis in operator.bases])
    p, reached = len(values), sum(basis.at.numel() for basis in operator.bases[: len(operator.layers)])
    order = data[:reached].argsort(descending=True)  # the loss does not use what is behind
    count = max(2, min(_PROBES, system.n // 4, _NUMBERS // (4 * p)))
    rows = system.examples.spread(4 * count)
    whitened = (values + system.damping).sqrt()
    Z = torch.empty(len(rows), p, dtype=torch.float64)
    for some in np.array_split(np.arange(len(rows)), -(-len(rows) * p // _CHUNK_NUMBERS)):
        Z[some] = _rotated(operator, per_row.gradients(system.sweep, rows[some]), None).div_(whitened)
    share = _rotated(operator, system.penalty_share[None], None) / whitened  # it is kept apart, and not rounded
    sides = [Z[number::4] for number in range(4)]  # two pairs of sides: to choose by, and to measure on
    step = -(-reached // _FRACTIONS)
    removed = sides[1] + share
    parts = torch.stack([sides[0][:, some] @ removed[:, some].T for some in order.split(step)]).cumsum(0)
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
    codes = packed(rows[:, used].float().numpy(), bits)
    rounded = torch.from_numpy(unpacked(*codes, bits, len(used))).double()
    ours, theirs = queries[:, used] @ (rounded + share[:, used]).T, queries @ (rows + share).T
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
    store.keep(_BASIS, arrays, card, once=True)


def _part(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What an index holds under a name."""
    return read_part(folder / f"{name}{SUFFIX}", read_work(folder))


def _opened(path: Path, system: System) -> tuple[Kronecker, list[Tensor]]:
    """The operator of the folder's eigenvectors, and the coordinates that are kept: for this model, without a sweep."""
    arrays, _ = _part(path, _BASIS)
    uses, blocks, rest = Kronecker.blocks_of(system.sweep)
    at = [block.at for block in blocks] + ([rest[None, None]] if len(rest) else [])
    bases, chosen = [], []
    for number, places in enumerate(at):
        sides = [arrays.get(f"{number}.{side}") for side in ("left", "right")]
        left, right = (None if Q is None else torch.from_numpy(Q) for Q in sides)
        nothing = torch.zeros(places.shape)
        bases.append(Basis(f"{number}", places, left, right, nothing, nothing))
        chosen.append(torch.from_numpy(arrays[f"{number}.chosen"]))
    return Kronecker(system.sweep, uses, blocks, bases), chosen
