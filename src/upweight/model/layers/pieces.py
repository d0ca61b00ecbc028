"""Per-example gradients in the form that layers give them, and the algebra that never writes them out.

A weight that multiplies has, for every example b, the gradient Σ_t slope[b, t] ⊗ input[b, t]: activations times output
gradients. A `Product` holds the two factors, a `Lookup` the rows of a table that an example read, a `Direct` the
gradient itself. Slopes have a leading axis of m cotangents: one for a loss, one per output for a Jacobian. With J the
(b, m, p) Jacobian that the pieces stand for:

    along(pieces, V) = J V        onto(pieces, U) = Jᵀ U        squares(pieces) = ‖J[b, m]‖²        rows(pieces) = J

Where a product has several positions t, `along` writes out the matrices of its examples if that costs fewer flops:
2·t·i·o + 2·k·i·o against 2·t·k·i·o for k vectors, so when k > 1 and t > 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.model.layers.written import Vectors, written

T = TypeVar("T")


@dataclass(frozen=True)
class Product:
    """A weight that multiplies: the gradient of example b is Σ_t slopes[:, b, g, t, :] ⊗ inputs[b, g, t, :].

    Args:
        block: the weight's name.
        bias: the name of the bias that is added to the product, or None.
        inputs: (b, g, t, i) what the weight multiplied, for g groups of channels and t positions.
        slopes: (m, b, g, t, o) the gradient with respect to the output.
        shape: the block's shape.
        where: for each entry of the (g, o, i) matrices its place in the flat block; None where the order is the same.
    """

    block: str
    bias: str | None
    inputs: Float[Tensor, "b g t i"]
    slopes: Float[Tensor, "m b g t o"]
    shape: tuple[int, ...]
    where: Int[Tensor, " entries"] | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that it holds gradients of."""
        return (self.block,) if self.bias is None else (self.block, self.bias)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(g, o, i)."""
        return self.inputs.shape[1], self.slopes.shape[-1], self.inputs.shape[-1]

    def sides(self) -> tuple[Float[Tensor, "b g t i"], Float[Tensor, "m b g t o"]]:
        """Inputs and slopes."""
        return self.inputs, self.slopes

    def place(self, M: Float[Tensor, "... g o i"]) -> Float[Tensor, "... entries"]:
        """Matrices as flat gradients of the block."""
        flat = M.reshape(*M.shape[:-3], -1)
        if self.where is None:
            return flat
        return flat.new_zeros(*flat.shape[:-1], math.prod(self.shape)).index_add_(-1, self.where, flat)

    def matrices(self, W: Float[Tensor, "... entries"]) -> Float[Tensor, "... g o i"]:
        """Flat vectors of the block as matrices: the transpose of `place`."""
        return (W if self.where is None else W[..., self.where]).reshape(*W.shape[:-1], *self.sizes)

    def rows(self) -> dict[str, Tensor]:
        """(m, b, size) the gradients of weight and bias."""
        out = {self.block: self.place(self.slopes.transpose(-1, -2) @ self.inputs)}
        if self.bias is not None:
            out[self.bias] = self.slopes.sum(3).flatten(2)
        return out

    def along(self, V: Vectors) -> Float[Tensor, "k b m"]:
        """J v for vectors (k, size) of weight and bias."""
        b, g, t, i = self.inputs.shape
        k, o, m = len(V), self.slopes.shape[-1], len(self.slopes)
        if t > 1 and k > 1 and m == 1:
            across = V.tiles(self.block, self.sizes, self.where, self.matrices)
            out = written([(self.inputs, self.slopes[0])], across, k)[:, :, None]
            if self.bias is not None:
                out = out + torch.einsum("kc,mbc->kbm", V[self.bias], self.slopes.sum(3).flatten(2))
            return out
        W = self.matrices(V[self.block])  # (k, g, o, i)
        across = W.permute(1, 3, 0, 2).reshape(g, i, k * o)
        rows = self.inputs.transpose(0, 1).reshape(g, b * t, i)  # one product of matrices, not one for every row
        if self.bias is None:
            Z = rows @ across
        else:
            Z = torch.baddbmm(V[self.bias].reshape(k, g, o).transpose(0, 1).reshape(g, 1, k * o), rows, across)
        Z = Z.reshape(g, b, t, k, o).permute(1, 3, 0, 2, 4).reshape(b, k, g * t * o)
        return (Z @ self.slopes.permute(1, 2, 3, 4, 0).reshape(b, g * t * o, m)).transpose(0, 1)

    def onto(self, U: Float[Tensor, "k b m"]) -> dict[str, Tensor]:
        """Jᵀ u for weight and bias, (k, size)."""
        b, g, t, i = self.inputs.shape
        k, m, o = len(U), len(self.slopes), self.slopes.shape[-1]
        D = self.slopes.permute(1, 0, 2, 3, 4).reshape(b, m, g * t * o)
        mixed = (U.transpose(0, 1) @ D).reshape(b, k, g, t, o)  # Σ_m u d
        left = mixed.permute(2, 1, 4, 0, 3).reshape(g, k * o, b * t)
        M = (left @ self.inputs.permute(1, 0, 2, 3).reshape(g, b * t, i)).reshape(g, k, o, i).transpose(0, 1)
        out = {self.block: self.place(M)}
        if self.bias is not None:
            out[self.bias] = mixed.sum((0, 3)).reshape(k, g * o)
        return out

    def squares(self) -> Float[Tensor, "m b"]:
        """‖gradient‖² of every example, by the Gram matrices of positions where they are smaller."""
        _, _, t, i = self.inputs.shape
        o = self.slopes.shape[-1]
        if t * (i + o) < i * o:
            x, d = self.inputs.double(), self.slopes.double()  # what positions have in opposite directions cancels here
            out = ((x @ x.transpose(-1, -2)) * (d @ d.transpose(-1, -2))).sum((2, 3, 4)).clamp(min=0).to(self.slopes)
        else:
            out = (self.slopes.transpose(-1, -2) @ self.inputs).square().sum((2, 3, 4))
        return out if self.bias is None else out + self.slopes.sum(3).square().sum((2, 3))


@dataclass(frozen=True)
class Lookup:
    """A table whose rows are read: the gradient of example b is slopes[:, b, t] in row indices[b, t], summed over t.

    Args:
        block: the table's name.
        indices: (b, t) the rows read; a row that has no gradient (padding) is −1.
        slopes: (m, b, t, o) the gradient with respect to what was read.
        shape: (rows, o).
    """

    block: str
    indices: Int[Tensor, "b t"]
    slopes: Float[Tensor, "m b t o"]
    shape: tuple[int, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The table's name."""
        return (self.block,)

    def rows(self) -> dict[str, Tensor]:
        """(m, b, rows·o) the gradients."""
        m, b, t, o = self.slopes.shape
        flat = self.slopes.new_zeros(m, b, *self.shape)
        index = self.indices.clamp(min=0)[None, :, :, None].expand(m, b, t, o)
        return {self.block: flat.scatter_add_(2, index, self._kept()).flatten(2)}

    def along(self, V: Vectors) -> Float[Tensor, "k b m"]:
        """J v for vectors (k, rows·o) of the table."""
        table = V[self.block].reshape(-1, *self.shape)
        return torch.einsum("kbto,mbto->kbm", table[:, self.indices.clamp(min=0)], self._kept())

    def onto(self, U: Float[Tensor, "k b m"]) -> dict[str, Tensor]:
        """Jᵀ u, (k, rows·o)."""
        read = torch.einsum("kbm,mbto->kbto", U, self._kept()).flatten(1, 2)
        out = read.new_zeros(len(U), *self.shape)
        return {self.block: out.index_add_(1, self.indices.clamp(min=0).reshape(-1), read).flatten(1)}

    def squares(self) -> Float[Tensor, "m b"]:
        """‖gradient‖² of every example: rows that were read twice add up first."""
        same = (self.indices[:, :, None] == self.indices[:, None]).to(self.slopes)
        kept = self._kept()
        return ((kept @ kept.transpose(-1, -2)) * same).sum((2, 3))

    def _kept(self) -> Tensor:
        return self.slopes * (self.indices >= 0).to(self.slopes)[None, :, :, None]


@dataclass(frozen=True)
class Direct:
    """The gradient itself, for parameters that no structure makes smaller.

    Args:
        block: the parameter's name.
        values: (m, b, size) the gradients of what was used.
        shape: the block's shape.
        where: the place of each used entry in the flat block; None where all are used in order.
    """

    block: str
    values: Float[Tensor, "m b size"]
    shape: tuple[int, ...]
    where: Int[Tensor, " size"] | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The parameter's name."""
        return (self.block,)

    def rows(self) -> dict[str, Tensor]:
        """(m, b, size) the gradients."""
        if self.where is None:
            return {self.block: self.values}
        whole = self.values.new_zeros(*self.values.shape[:2], math.prod(self.shape))
        return {self.block: whole.index_add_(2, self.where, self.values)}

    def along(self, V: Vectors) -> Float[Tensor, "k b m"]:
        """J v."""
        used = V[self.block] if self.where is None else V[self.block][:, self.where]
        return torch.einsum("ks,mbs->kbm", used, self.values)

    def onto(self, U: Float[Tensor, "k b m"]) -> dict[str, Tensor]:
        """Jᵀ u."""
        out = torch.einsum("kbm,mbs->ks", U, self.values)
        if self.where is not None:
            out = out.new_zeros(len(U), math.prod(self.shape)).index_add_(1, self.where, out)
        return {self.block: out}

    def squares(self) -> Float[Tensor, "m b"]:
        """‖gradient‖² of every example."""
        return self.rows()[self.block].square().sum(2)


class Gradients(Protocol):
    """What gradients of examples know of themselves, whatever holds them."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that it holds gradients of."""
        ...

    def along(self, V: Vectors) -> Float[Tensor, "k b m"]:
        """J v."""
        ...

    def onto(self, U: Float[Tensor, "k b m"]) -> dict[str, Tensor]:
        """Jᵀ u."""
        ...

    def rows(self) -> dict[str, Tensor]:
        """J."""
        ...


Piece = Product | Lookup | Direct


def rows(pieces: Sequence[Gradients], sizes: dict[str, int]) -> Float[Tensor, "b m p"]:
    """J, written out; blocks in the order of `sizes`.  Memory: b·m·p numbers."""
    out = _summed([piece.rows() for piece in pieces])
    first = next(iter(out.values()))
    joined = [out.get(name, first.new_zeros(*first.shape[:2], size)) for name, size in sizes.items()]
    return torch.cat(joined, 2).transpose(0, 1)


def along(pieces: Sequence[Gradients], V: Float[Tensor, "k p"], sizes: dict[str, int]) -> Float[Tensor, "k b m"]:
    """J v for every vector."""
    return along_kept(pieces, Vectors(V, sizes, V))


def along_kept(pieces: Sequence[Gradients], V: Vectors) -> Float[Tensor, "k b m"]:
    """The same of vectors that keep what they were put in order for, from one batch to the next."""
    total: Tensor | None = None
    for piece in pieces:
        part = piece.along(V)
        total = part if total is None else total + part
    assert total is not None  # every objective depends on θ
    return total


def onto(pieces: Sequence[Gradients], U: Float[Tensor, "k b m"], sizes: dict[str, int]) -> Float[Tensor, "k p"]:
    """Jᵀ u for every u."""
    out = _summed([piece.onto(U) for piece in pieces])
    return torch.cat([out.get(name, U.new_zeros(len(U), size)) for name, size in sizes.items()], 1)


def squares(pieces: Sequence[Piece]) -> Float[Tensor, "b m"]:
    """‖J[b, m]‖²; parameters that were used more than once are summed first."""
    names = [name for piece in pieces for name in piece.blocks]
    shared = {name for name in names if names.count(name) > 1}
    alone = [piece for piece in pieces if not shared & set(piece.blocks)]
    together = [piece for piece in pieces if shared & set(piece.blocks)]
    parts = [piece.squares() for piece in alone]
    if together:
        parts += [gradient.square().sum(2) for gradient in _summed([piece.rows() for piece in together]).values()]
    return torch.stack(parts).sum(0).T


def merged(pieces: Sequence[T]) -> list[T | Product]:
    """The same gradients with the uses of a shared weight joined along their positions, where their layouts agree."""
    out: dict[object, T | Product] = {}
    for piece in pieces:
        key: object = (piece.blocks, *piece.sizes) if isinstance(piece, Product) and piece.where is None else id(piece)
        before = out.get(key)
        if isinstance(before, Product) and isinstance(piece, Product):
            out[key] = replace(
                before,
                inputs=torch.cat([before.inputs, piece.inputs], 2),
                slopes=torch.cat([before.slopes, piece.slopes], 3),
            )
        else:
            out[key] = piece
    return list(out.values())


def mapped(pieces: Sequence[Piece], function: Callable[[Tensor], Tensor]) -> list[Piece]:
    """The pieces with every floating-point tensor changed, such as to another precision."""

    def one(piece: Piece) -> Piece:
        if isinstance(piece, Product):
            return replace(piece, inputs=function(piece.inputs), slopes=function(piece.slopes))
        if isinstance(piece, Lookup):
            return replace(piece, slopes=function(piece.slopes))
        return replace(piece, values=function(piece.values))

    return [one(piece) for piece in pieces]


def taken(pieces: Sequence[Piece], index: Int[Tensor, " r"]) -> list[Piece]:
    """The pieces of some of the examples."""

    def one(piece: Piece) -> Piece:
        if isinstance(piece, Product):
            return replace(piece, inputs=piece.inputs[index], slopes=piece.slopes[:, index])
        if isinstance(piece, Lookup):
            return replace(piece, indices=piece.indices[index], slopes=piece.slopes[:, index])
        return replace(piece, values=piece.values[:, index])

    return [one(piece) for piece in pieces]


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            out[name] = out[name] + value if name in out else value
    return out
