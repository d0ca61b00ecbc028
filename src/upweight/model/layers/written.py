"""Gradients of examples, written out tile by tile and multiplied with the same part of many vectors while near.

A tile is some lines and columns of a weight's matrix. The gradients of a block of rows in it are one batched product
of slopes and inputs, their products with k vectors one product of matrices, (k, entries) by (entries, rows). All rows
meet a tile before the next one does, so that vectors are read from memory once a batch; and they are put into the order
of tiles once, however many batches follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.model.products import convolves_faster, product

_TILE_BYTES, _TILE_ROWS, _TILE_LINES = 2**21, 64, 64  # of gradients written out at once: they stay near a processor
_MANY = 4  # times the rows, and half the entries, where products are convolutions, which take many rows
_TILE_BYTES_AWAY, _TILE_ROWS_AWAY = 2**25, 256  # on a device, where every tile is a launch


@dataclass(frozen=True)
class Tile:
    """Some lines and columns of every vector's matrices: across is (k, lines·columns)."""

    group: int
    lines: slice
    columns: slice
    across: Float[Tensor, "k entries"]


@dataclass(frozen=True)
class Vectors:
    """Vectors of parameters by block, for gradients of any number of batches; a layout that is asked for is kept.

    Args:
        source: (k, p) the vectors.
        sizes: numbers in every block, in their order.
        reference: a tensor whose precision and device the blocks get.
    """

    source: Float[Tensor, "k p"]
    sizes: dict[str, int]
    reference: Tensor
    _blocks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _tiles: dict[object, tuple[object, list[Tile]]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, block: str) -> Float[Tensor, "k size"]:
        """The vectors' part in a block."""
        if block not in self._blocks:
            self._blocks[block] = self._part(block)
        return self._blocks[block]

    def tiles(
        self, block: str, layout: object, where: Tensor | None, matrices: Callable[[Tensor], Float[Tensor, "k g o i"]]
    ) -> list[Tile]:
        """A block's tiles, made once for a layout and the places that its entries have; it is not kept beside them."""
        key = (block, layout, None if where is None else id(where))
        if key not in self._tiles:
            part = self._blocks[block] if block in self._blocks else self._part(block)
            self._tiles[key] = (where, tiles(matrices(part)))  # with `where`, so that its id stays its own
        return self._tiles[key][1]

    def _part(self, block: str) -> Tensor:
        starts = [0]
        for size in self.sizes.values():
            starts.append(starts[-1] + size)
        place = dict(zip(self.sizes, pairwise(starts), strict=True))[block]
        return self.source[:, slice(*place)].to(self.reference)


def tiles(W: Float[Tensor, "k g o i"]) -> list[Tile]:
    """The matrices of k vectors in parts."""
    k, groups, o, i = W.shape
    most = _TILE_LINES if W.device.type == "cpu" else o
    entries = max(1, _room(W) // (_rows(W) * W.element_size()))
    lines = min(o, most, entries)
    columns = min(i, max(1, entries // lines))
    found = []
    for group in range(groups):
        for line in range(0, o, lines):
            for column in range(0, i, columns):
                at = (slice(line, line + lines), slice(column, column + columns))
                found.append(Tile(group, *at, W[:, group, *at].reshape(k, -1)))
    return found


def written(
    parts: Sequence[tuple[Float[Tensor, "b g t i"], Float[Tensor, "b g t o"]]], across: Sequence[Tile], k: int
) -> Float[Tensor, "k rows"]:
    """Σ_t slopes ⊗ inputs of every example times k matrices, by writing it out, a tile at a time.

    Args:
        parts: inputs and slopes of some of the examples, one after the other.
        across: the matrices.
        k: how many.
    """
    blocks = list(_blocks(parts))
    first = parts[0][0]
    out = first.new_zeros(k, sum(len(inputs) for inputs, _ in parts))
    rows = max(len(inputs) for _, inputs, _ in blocks)
    room = first.new_empty(rows * max(tile.across.shape[1] for tile in across))
    for tile in across:
        for at, inputs, slopes in blocks:
            left = slopes[:, tile.group, :, tile.lines].transpose(-1, -2)
            right = inputs[:, tile.group, :, tile.columns]
            M = room[: len(left) * tile.across.shape[1]].view(len(left), left.shape[1], right.shape[2])
            torch.bmm(left, right, out=M)
            out[:, at] += product(M.view(len(left), -1), tile.across.T).T
    return out


def _blocks(parts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Places, inputs and slopes of as many rows as are written out at once."""
    begun = 0
    for inputs, slopes in parts:
        rows = _rows(inputs)
        for start in range(0, len(inputs), rows):
            inside = slice(start, min(start + rows, len(inputs)))
            yield slice(begun + inside.start, begun + inside.stop), inputs[inside], slopes[inside]
        begun += len(inputs)


def _rows(like: Tensor) -> int:
    """How many rows' gradients are written out at once."""
    if like.device.type != "cpu":
        return _TILE_ROWS_AWAY
    return _TILE_ROWS * (_MANY if like.dtype == torch.float32 and convolves_faster() else 1)


def _room(like: Tensor) -> int:
    """How many bytes they may take."""
    if like.device.type != "cpu":
        return _TILE_BYTES_AWAY
    return _TILE_BYTES * (2 if _rows(like) > _TILE_ROWS else 1)
