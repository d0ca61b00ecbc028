"""The bases of a block-diagonal curvature: all in one process, and of several ranks each its own blocks'.

Every block belongs to one rank, which alone keeps its eigenvectors and multiplies by them. Consecutive blocks belong to
one rank, cut so that the largest share is as small as it can be: it follows from the shapes of the layers and the
number of ranks alone. What a sweep over the rows needs of other ranks' blocks is brought for that sweep, as many blocks
at a time as there is room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import RankFailed
from upweight.model.chunks import CHUNK
from upweight.model.sweep import Sweep
from upweight.operators.basis import Basis
from upweight.operators.factors import DENSE, WIDEST, Layer, Whole
from upweight.runs import ranks

BROUGHT = 2**32  # bytes of all blocks together that a rank holds for a sweep; of more there are several sweeps
_NUMBERS = 2**24  # of the vectors that are rotated at once


@dataclass
class Held:
    """The bases that are here.

    Args:
        own: this process's, by number.
        at: the place in θ of every entry of every block.
        owners: the rank of every block, in ascending order; None where all are in every process.
        sides: the shapes of the eigenvectors of every block, left and right; None where they are unit vectors.
        visiting: others', as long as a sweep needs them.
    """

    own: Mapping[int, Basis]
    at: Sequence[Tensor]
    owners: Sequence[int] | None = None
    sides: Sequence[Sequence[Sequence[int] | None]] = ()
    visiting: dict[int, Basis] = field(default_factory=dict)
    _moved: dict[tuple[torch.dtype, torch.device], tuple[Basis, ...]] = field(default_factory=dict)

    @classmethod
    def all(cls, bases: Sequence[Basis]) -> Held:
        """All of them, here."""
        return cls(dict(enumerate(bases)), [basis.at for basis in bases])

    @classmethod
    def of(cls, own: Mapping[int, Basis], at: Sequence[Tensor], owners: Sequence[int] | None) -> Held:
        """Those of this rank, which are told to the others by their shapes."""
        if owners is None:
            return cls(own, at)
        with ranks.together("the blocks of the curvature") as work:
            told = work.told(
                [[None if Q is None else list(Q.shape) for Q in (one.left, one.right)] for one in own.values()]
            )
        sides = [sides for of_rank in told for sides in of_rank]
        return cls(own, at, owners, sides)

    def with_values(self, values: Mapping[int, Tensor]) -> Held:
        """The same eigenvectors with what the data give some of their pairs."""
        own = {number: replace(one, values=values.get(number, one.values)) for number, one in self.own.items()}
        return Held(own, self.at, self.owners, self.sides)

    @property
    def bytes(self) -> int:
        """Of eigenvectors and eigenvalues that are here."""
        known = [part for one in (*self.own.values(), *self.visiting.values()) for part in _numbers(one)]
        return sum(part.numel() * part.element_size() for part in known)

    def bases(self, numbers: Sequence[int] | None = None) -> tuple[Basis, ...]:
        """Those of some blocks, or of all.

        Raises:
            RankFailed: if one is on another rank.
        """
        wanted = range(len(self.at)) if numbers is None else numbers
        missing = [number for number in wanted if number not in self.own and number not in self.visiting]
        if missing:
            raise self._elsewhere(missing)
        return tuple(self.visiting[number] if number in self.visiting else self.own[number] for number in wanted)

    def like(self, reference: Tensor, numbers: Sequence[int] | None = None) -> tuple[Basis, ...]:
        """The same in the precision and on the device of a tensor; kept for the next batch where all are here."""
        if self.owners is not None:
            return tuple(one.like(reference) for one in self.bases(numbers))
        key = (reference.dtype, reference.device)
        if key not in self._moved:
            self._moved[key] = tuple(basis.like(reference) for basis in self.bases())
        return self._moved[key] if numbers is None else tuple(self._moved[key][number] for number in numbers)

    def rounds(self, sweep: Sweep, itemsize: int) -> list[range]:
        """Blocks that can be here together, in their order: all of them, unless that is too much."""
        if self.owners is None:
            return [range(len(self.at))]
        sizes = [
            itemsize * sum(math.prod(side) for side in sides if side is not None) + 16 * at.numel()
            for sides, at in zip(self.sides, self.at, strict=True)
        ]
        return rounds(sizes, sweep)

    @contextmanager
    def brought(self, numbers: Sequence[int], reference: Tensor) -> Iterator[None]:
        """Inside, some blocks are on every rank, in the precision and on the device of a tensor."""
        if self.owners is None:
            yield
            return
        with self._together("blocks of other ranks") as work:
            work.agreed(list(numbers))
            for number in numbers:
                self.visiting[number] = self._brought(work, number, reference)
        try:
            yield
        finally:
            self.visiting.clear()

    def mapped(self, function: Callable[[Tensor], Tensor], V: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """f(C) v for every row v: every rank its own blocks, and all get all."""
        out, alone = torch.zeros_like(V), self.owners is None or len(self.visiting) == len(self.at)
        for basis in self.bases() if alone else self.own.values():
            scale = function(basis.eigenvalues).to(V)
            step = max(1, _NUMBERS // basis.at.numel())
            for start in range(0, len(V), step):
                part = V[start : start + step]
                out[start : start + step, basis.at] = basis.back(basis.rotated(part[:, basis.at]) * scale)
        if alone or self.owners is None:
            return out
        with self._together("solutions by blocks") as work:
            work.agreed(list(V.shape))
            for rank in range(ranks.size()):
                places = [at.flatten() for at, owner in zip(self.at, self.owners, strict=True) if owner == rank]
                if places and len(V):
                    at = torch.cat(places)
                    mine = out[:, at] if rank == work.rank else None
                    found = work.brought(mine, torch.empty((), dtype=V.dtype).expand(len(V), len(at)), rank)
                    if mine is None:
                        out[:, at] = found.to(V)
        return out

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Of all blocks, one after the other."""
        if self.owners is None:
            return torch.cat([basis.eigenvalues.flatten() for basis in self.own.values()])
        parts = []
        with self._together("eigenvalues of all blocks") as work:
            work.agreed(len(self.at))
            for number, (at, owner) in enumerate(zip(self.at, self.owners, strict=True)):
                mine = self.own[number].eigenvalues.flatten() if number in self.own else None
                parts.append(work.brought(mine, torch.empty((), dtype=torch.float64).expand(at.numel()), owner))
        return torch.cat(parts)

    # ---- inner steps -------------------------------------------------------------------------------------------------

    @contextmanager
    def _together(self, what: str) -> Iterator[ranks.Alone | ranks.Shared]:
        """All ranks that hold blocks.

        Raises:
            RankFailed: if they are not all here.
        """
        if ranks.sharing() == 1:
            raise self._elsewhere([number for number in range(len(self.at)) if number not in self.own])
        with ranks.together(what) as work:
            yield work

    def _brought(self, work: ranks.Alone | ranks.Shared, number: int, reference: Tensor) -> Basis:
        assert self.owners is not None  # there are others
        own, rank, at = self.own.get(number), self.owners[number], self.at[number]

        def one(mine: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            sent = None if mine is None else mine.to(dtype)
            return work.brought(sent, torch.empty((), dtype=dtype).expand(*shape), rank)

        sides: list[Tensor | None] = []
        for side, shape in zip(("left", "right"), self.sides[number], strict=True):
            Q = getattr(own, side, None)
            mine = None if Q is None else Q.mT  # column by column, as they are where they were made: to the same bits
            found = None if shape is None else one(mine, [shape[0], shape[2], shape[1]], reference.dtype).mT
            sides.append(None if found is None else found.to(reference.device))
        values, penalty = (one(getattr(own, name, None), at.shape, torch.float64) for name in ("values", "penalty"))
        return Basis(f"{number}" if own is None else own.name, at, sides[0], sides[1], values, penalty)

    def _elsewhere(self, numbers: Sequence[int]) -> RankFailed:
        message = (
            f"{len(numbers)} of {len(self.at)} blocks of this curvature are on other ranks, which do not come to this "
            "call: the process group has ended since, or this is inside a sweep that the ranks share, or alone on one "
            "rank. Make the call on all ranks, outside of sweeps and before destroy_process_group(); where the blocks "
            "themselves are needed, as `operator.bases` are, make it inside `with influence.operator.here():`."
        )
        return RankFailed(message)


def shared_out(sizes: Sequence[int], among: int) -> list[int]:
    """The rank of every block: consecutive blocks for each, so that the largest share is as small as it can be."""
    least, most = max(sizes), sum(sizes)
    while least < most:
        middle = (least + most) // 2
        if _filled(sizes, middle)[-1] < among:
            most = middle
        else:
            least = middle + 1
    return _filled(sizes, least)


def rounds(sizes: Sequence[int], sweep: Sweep) -> list[range]:
    """Consecutive blocks that fit what a rank may hold of all together, too large ones alone; as rank 0 finds them."""
    room = float(sweep.at_most(BROUGHT, 4))
    if ranks.sharing() > 1:
        room = float(ranks.same("the room for blocks of other ranks", torch.tensor([room], dtype=torch.float64))[0])
    filled = _filled(sizes, int(room))
    return [range(filled.index(number), len(filled) - filled[::-1].index(number)) for number in range(filled[-1] + 1)]


def kept_bytes(block: Layer) -> int:
    """Of a block's eigenvectors and eigenvalues, what the penalty gives them included."""
    return 8 * _squares(block) + 24 * block.at.numel()


def summed_bytes(block: Layer) -> int:
    """Of the sums over rows that its factors are made of."""
    g, o, i = block.at.shape
    return 8 * (_squares(block) + g * (o + i))


def needed(blocks: Sequence[Layer], sweep: Sweep, among: int) -> int:
    """Memory while factors and eigenvectors are made: 32·p, 16·g·(i² + o²) for every block (g, o, i), and its work.

    Eigenvectors take the place of the sums, so that 8 of the 16 remain; the others are a batch's. Of more than 1,024
    rows 8·log₂ of the chunks come to them. LAPACK's work is 32·g·i² of one side, the widest. On one of several ranks
    16·p, of its own blocks 16·p and 32·g·(i² + o²), and one chunk's sums of what is summed together.
    """
    size = sweep.objective.size
    if among == 1:
        levels = (-(-sweep.n // CHUNK) - 1).bit_length()
        widest = max((block.at.shape[0] * max(_sides(block)) ** 2 for block in blocks), default=0)
        return 32 * size + (16 + 8 * levels) * sum(map(_squares, blocks)) + 32 * widest
    held = [0] * among
    for block, owner in zip(blocks, shared_out([kept_bytes(block) for block in blocks], among), strict=True):
        held[owner] += 32 * _squares(block) + 16 * block.at.numel()
    sums = [summed_bytes(block) for block in blocks]
    together = max(*sums, min(sum(sums), sweep.at_most(BROUGHT, 4)))
    return 16 * size + max(held) + 2 * together


def _squares(block: Layer) -> int:
    """Numbers in the eigenvectors of a block."""
    return block.at.shape[0] * sum(side**2 for side in _sides(block))


def _sides(block: Layer) -> list[int]:
    """The sides of its matrices that have eigenvectors of their own, and a side of 0."""
    _, o, i = block.at.shape
    if isinstance(block, Whole) and i > DENSE:
        return [0]
    return [0, *(side for side in (o, i) if side <= WIDEST)]


def _filled(sizes: Sequence[int], most: int) -> list[int]:
    """Numbers of bins, each filled up to so much, and at least by one, before the next."""
    numbers, number, held = [], 0, 0
    for size in sizes:
        if held and held + size > most:
            number, held = number + 1, 0
        held += size
        numbers.append(number)
    return numbers


def _numbers(basis: Basis) -> list[Tensor]:
    return [part for part in (basis.left, basis.right, basis.values, basis.penalty) if part is not None]
