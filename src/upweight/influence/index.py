"""An index of training gradients on disk: new queries, dampings and leading rows without another pass over the data.

Along the eigenvectors of a Kronecker curvature the system is divided out, coordinate by coordinate:

    values[q, i] = (wᵢ/n) Σ_j z_qj (z_ij + c_j) / (Λ_j + λ)        z = Qᵀ∇L, c = Qᵀ of the row's share of the penalty

The index keeps, of every row, the coordinates of the largest Λ, as z/√(Λ + λ₀) in 4 bits (`runs.quantised`), as many as
an error that was asked for allows. What rounding loses is random from coordinate to coordinate and averages out, so
that many coordinates in few bits are nearer to the scores than few in many. The error is measured on pairs of rows that
had no part in the choice, and stands in the certificate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.data import markup
from upweight.data.ids import Ids, unpacked as unpacked_ids
from upweight.errors import (
    Damaged,
    InvalidInput,
    NotPositiveDefinite,
    PathNotFound,
    StoreMismatch,
    first_line,
)
from upweight.influence import kept
from upweight.influence.certificate import Certificate
from upweight.influence.running import Largest
from upweight.influence.scores import Extremes, Scores, naming
from upweight.influence.system import System
from upweight.influence.top import TopK
from upweight.model import per_row
from upweight.model.layers.convolution import Convolution
from upweight.operators.basis import Basis
from upweight.operators.held import Held
from upweight.operators.kronecker import Kronecker
from upweight.runs.quantised import BITS, unpacked
from upweight.runs.store import SUFFIX, chunk_name, fingerprint, read_part, read_work
from upweight.solvers.base import checked_damping
from upweight.solvers.factored import ROUNDING
from upweight.solvers.lanczos import rounded_up

COORDINATES, BASIS = "coordinates", "basis"
ORDER = 2  # of the entries of convolutions along eigenvectors: in 1 channels came before the kernel
_TOLD = ("rows", "bits", "damping", "error", "lowest", "largest", "coverage", "correlation")  # numbers of a card


@dataclass(frozen=True)
class Coordinates:
    """Queries along the eigenvectors of an index: all that is needed of them.

    Args:
        values: (q, k) z = Qᵀ∇L of each query.
        query_values: (q,) the queries' losses now.
        names: their names, or None.

    >>> import tempfile, torch, upweight as uw
    >>> X, y = torch.arange(12.0).reshape(6, 2) / 10, torch.tensor([0, 1, 0, 1, 1, 1])
    >>> model = torch.nn.Linear(2, 2)
    >>> for part in model.parameters():
    ...     _ = torch.nn.init.zeros_(part)
    >>> criterion = {"loss": torch.nn.functional.cross_entropy, "penalty": 0.1}
    >>> influence = uw.explain(model, X, y, curvature=uw.operators.EKFAC(), damping=0.1, **criterion)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     asked = influence.index(folder).coordinates(influence, X[:2], y[:2])
    >>> len(asked), asked.query_values.round(4)  # a model of zeros gives each class ½, a loss of ln 2
    (2, array([0.6931, 0.6931]))
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
        PathNotFound: if the folder holds no finished index; InvalidInput if chunks of it are missing.
        Damaged: if a file is not that of an index.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / f"{COORDINATES}{SUFFIX}").is_file():
            message = (
                f"{self.folder} holds no finished index. Make one: influence.index({str(self.folder)!r}); the same "
                "call goes on where it was interrupted."
            )
            raise PathNotFound(message)
        self.card: dict[str, Any]
        arrays, self.card = part_of(self.folder, COORDINATES)
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
                raise holds_other(self.folder / f"{COORDINATES}{SUFFIX}", f"{shapes}, {numbers}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, Damaged):
                raise
            raise holds_other(self.folder / f"{COORDINATES}{SUFFIX}", first_line(error)) from error
        missing = [chunk for chunk in range(self.chunks) if not self._file(chunk).is_file()]
        if missing:
            refusal = (
                f"{self.folder} lacks {len(missing)} of {self.chunks} chunks. Make the same call again, which goes on "
                f"where it was interrupted: influence.index({str(self.folder)!r})."
            )
            raise InvalidInput(refusal)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """The index in a folder.

        Raises:
            PathNotFound, InvalidInput, Damaged: as for Index itself.
        """
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
        """Of the files that answer: eigenvectors, chunks and what belongs to all rows."""
        names = (BASIS, COORDINATES, *map(chunk_name, range(self.chunks)))
        return sum((self.folder / f"{name}{SUFFIX}").stat().st_size for name in names)

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
        operator, chosen = opened(self.folder, system)
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
            arrays, _ = part_of(self.folder, chunk_name(chunk))
            start = chunk * int(self.card["rows"])
            rows = np.arange(start, min(start + int(self.card["rows"]), self.n))
            try:
                found = unpacked(arrays["codes"], arrays["scales"], int(self.card["bits"]), self.k)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise holds_other(self._file(chunk), first_line(error)) from error
            if found.shape != (len(rows), self.k):
                raise holds_other(self._file(chunk), f"{found.shape} in place of {(len(rows), self.k)}")
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


def holds_other(file: Path, found: str) -> Damaged:
    """The error about a file that is whole, and holds something else."""
    return Damaged(f"{file} holds no part of an index ({found}). Delete the folder, and make the index again.")


def part_of(folder: Path, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What an index holds under a name."""
    return read_part(folder / f"{name}{SUFFIX}", read_work(folder))


def opened(path: Path, system: System) -> tuple[Kronecker, list[Tensor]]:
    """The operator of the folder's eigenvectors, and the coordinates that are kept: for this model, without a sweep."""
    arrays, _ = part_of(path, BASIS)
    uses, blocks, rest = Kronecker.blocks_of(system.sweep)
    order = fingerprint(path).get("index")
    if order != ORDER and any(isinstance(piece, Convolution) for piece in uses.first):
        found = f"eigenvectors of convolutions in order {order}, which an older upweight wrote, and not in {ORDER}"
        raise holds_other(path / f"{BASIS}{SUFFIX}", found)
    at = [block.at for block in blocks] + ([rest[None, None]] if len(rest) else [])
    bases, chosen = [], []
    for number, places in enumerate(at):
        sides = [arrays.get(f"{number}.{side}") for side in ("left", "right")]
        left, right = (None if Q is None else torch.from_numpy(Q) for Q in sides)
        nothing = torch.zeros(places.shape)
        bases.append(Basis(f"{number}", places, left, right, nothing, nothing))
        chosen.append(torch.from_numpy(arrays[f"{number}.chosen"]))
    return Kronecker(system.sweep, uses, blocks, Held.all(bases)), chosen
