"""How a model uses its parameters, the same for rows of every shape.

Blocks of C are made of the pieces of one batch, and refer to them by their numbers. Rows of another length may give
other pieces: fewer or more entries of a table of positions, or the same ones in another order. `Uses.pieces` puts those
of any batch in the order of the first; where a weight is used in another way than there, no factors stand for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.data.examples import Examples
from upweight.data.trees import leaves
from upweight.errors import UnsupportedModel
from upweight.model import calculus, layers, linear
from upweight.model.layers.convolution import Seen
from upweight.model.layers.pieces import Direct, Product
from upweight.model.objective import Objective
from upweight.model.sweep import Sweep
from upweight.operators.cotangents import outputs

_PROBE = 2
Several = Callable[[Tensor], Sequence[Tensor]]  # from the outputs (b, …) of a batch to sets of cotangents, (m, b, K)


@dataclass(frozen=True)
class Slot:
    """What is the same of a piece in all batches: its kind, its parameters, and which of their entries it reaches."""

    kind: type
    blocks: tuple[str, ...]
    where: Tensor | None

    @classmethod
    def of(cls, piece: Seen) -> Slot:
        """That of a piece."""
        return cls(type(piece), piece.blocks, getattr(piece, "where", None))

    def holds(self, piece: Seen) -> bool:
        """Whether it is that of another piece, too."""
        where = getattr(piece, "where", None)
        if type(piece) is not self.kind or piece.blocks != self.blocks or (where is None) != (self.where is None):
            return False
        return where is self.where or torch.equal(where, self.where)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Uses:
    """Every use of every parameter, as one batch has them.

    Args:
        plan: how pieces are captured; None for a linear predictor.
        first: the pieces of that batch, of its losses.
        slots: theirs.
    """

    plan: layers.Plan | None
    first: list[Seen]
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, sweep: Sweep) -> Uses:
        """Those of a few rows; where they reach only a part of a parameter, of the longest row.

        Cost: a forward and a backward pass of two rows; then, where rows have no one shape, all of them are read.
        """
        objective, examples = sweep.objective, sweep.examples
        found = cls._in(objective, examples.batch(examples.spread(_PROBE)))
        if examples.x is None and any(slot.kind is Direct and slot.where is not None for slot in found.slots):
            found = cls._in(objective, examples.batch([_longest(examples)]))
        return found

    @classmethod
    def _in(cls, objective: Objective, batch: Any) -> Uses:
        known = objective.route.plan
        if known is not None and known.structured:
            plan = known.at(objective, batch)
        else:
            plan = None if objective.linear is not None else layers.plan(objective, batch)
        first = _pieces(objective, plan, batch, None)[0]
        return cls(plan, first, tuple(map(Slot.of, first)))

    def pieces(self, objective: Objective, batch: Any) -> list[Seen]:
        """The pieces of the losses of a batch, one for each slot.

        Raises:
            UnsupportedModel: if it uses parameters in another way.
        """
        return self.several(objective, batch, None)[0]

    def several(self, objective: Objective, batch: Any, cotangents: Several | None) -> list[list[Seen]]:
        """The pieces of a batch for every set of cotangents, one for each slot; of its losses, if there are none.

        Raises:
            UnsupportedModel: if it uses parameters in another way.
        """
        every = [self.aligned(pieces) for pieces in _pieces(objective, self.plan, batch, cotangents)]
        aligned = [pieces for pieces in every if pieces is not None]
        if len(aligned) == len(every):
            return aligned
        shapes = ", ".join(str(tuple(leaf.shape[1:])) for leaf in leaves(batch) if isinstance(leaf, Tensor))
        message = (
            f"{objective.name} uses its parameters in another way on rows of the shapes {shapes} than on others, so no "
            "Kronecker factors stand for all rows. Use curvature=GaussNewton(), or pass rows of one length."
        )
        raise UnsupportedModel(message)

    def found(self, objective: Objective, batch: Any) -> list[Seen]:
        """The pieces of the losses of a batch as they come."""
        return _pieces(objective, self.plan, batch, None)[0]

    def aligned(self, pieces: Sequence[Seen]) -> list[Seen] | None:
        """The same gradients, one piece for each slot; None where the slots do not hold them."""
        if len(pieces) == len(self.slots) and all(map(Slot.holds, self.slots, pieces)):
            return list(pieces)
        rest = dict(enumerate(pieces))
        out: list[Seen | None] = []
        for slot in self.slots:
            number = next((number for number, piece in rest.items() if slot.holds(piece)), None)
            out.append(None if number is None else rest.pop(number))
        for k, slot in enumerate(self.slots):
            if out[k] is None:
                out[k] = _gathered(slot, rest)
        every = [piece for piece in out if piece is not None]
        return every if not rest and len(every) == len(out) else None


def _gathered(slot: Slot, rest: dict[int, Seen]) -> Direct | None:
    """The gradient of a slot's entries from all pieces that are left of its parameter, which leave `rest`."""
    mine = [(number, piece) for number, piece in rest.items() if piece.blocks == slot.blocks]
    if slot.kind is not Direct or not all(isinstance(piece, Direct) for _, piece in mine) or not mine:
        return None
    whole = torch.stack([piece.rows()[slot.blocks[0]] for _, piece in mine]).sum(0)
    used = torch.arange(whole.shape[2], device=whole.device) if slot.where is None else slot.where.to(whole.device)
    if not all(bool(torch.isin(_where(piece, whole), used).all()) for _, piece in mine):
        return None
    for number, _ in mine:
        del rest[number]
    shape = next(piece.shape for _, piece in mine)
    return Direct(slot.blocks[0], whole[:, :, used], shape, slot.where)


def _where(piece: Seen, whole: Tensor) -> Tensor:
    where = getattr(piece, "where", None)
    return torch.arange(whole.shape[2], device=whole.device) if where is None else where.to(whole.device)


def _longest(examples: Examples) -> int:
    """The row with most numbers."""
    sizes = [
        sum(leaf.numel() for leaf in leaves(examples.batch([row])) if isinstance(leaf, Tensor))
        for row in range(len(examples))
    ]
    return sizes.index(max(sizes))


def _pieces(objective: Objective, plan: layers.Plan | None, batch: Any, cotangents: Several | None) -> list[list[Seen]]:
    """The pieces of a batch; for a linear predictor its inputs and the cotangents themselves."""
    if plan is not None:
        return layers.captured(objective, plan, batch, cotangents)
    structure = objective.linear
    assert structure is not None  # every other objective has a plan
    every = [linear.slopes(objective, batch)[None]] if cotangents is None else cotangents(outputs(objective, batch))
    X = calculus.ready(objective, batch)[0].to(every[0])
    coef, bias = [*objective.blocks, None][:2]  # a linear predictor's blocks, in this order, whatever their names
    assert coef is not None
    shape = (structure.n_outputs, structure.n_features)
    return [[Product(coef, bias, X[:, None, None], slopes[:, :, None, None], shape)] for slopes in every]
