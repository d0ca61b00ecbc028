"""Which blocks of a Kronecker curvature the uses of parameters make: which pieces share entries of θ, and how.

Uses that reach the same entries make one block. It is a `Weight` where all of them multiply by the same matrix, a
`Table` where all look it up, a `Tied` where one matrix is used in both ways, and a `Whole` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.model.layers.convolution import Convolution, Seen
from upweight.model.layers.pieces import Direct, Lookup, Piece, Product
from upweight.operators.factors import DENSE, Layer, Table, Tied, Weight, Whole


def layers_of(seen: Sequence[Seen], sizes: dict[str, int]) -> tuple[list[Layer], Int[Tensor, " rest"]]:
    """The blocks that these pieces (of any batch) make, and the places of θ that none of them reaches."""
    starts = _starts(sizes)
    pieces = [piece.by_pixel() if isinstance(piece, Convolution) else piece for piece in seen]
    at = [_places(piece, starts) for piece in pieces]
    owner = torch.full((sum(sizes.values()),), -1)
    groups: dict[int, list[int]] = {}
    for number, places in enumerate(at):
        met = {int(k) for k in owner[places.flatten()].unique() if k >= 0}
        joined = sorted({number}.union(*(groups.pop(k) for k in met)))
        groups[number] = joined
        for k in joined:
            owner[at[k].flatten()] = number
    layers = [_layer(pieces, at, tuple(numbers), sizes, starts) for numbers in groups.values()]
    return layers, torch.nonzero(owner < 0)[:, 0]


def _layer(
    pieces: Sequence[Piece], at: list[Tensor], numbers: tuple[int, ...], sizes: dict[str, int], starts: dict[str, int]
) -> Layer:
    """A Weight, a Table or a Tied if all uses read the same entries, else a Whole."""
    uses = [pieces[number] for number in numbers]
    name = " + ".join(dict.fromkeys(block for use in uses for block in use.blocks))
    first = at[numbers[0]]
    if all(torch.equal(at[number], first) for number in numbers):
        if all(isinstance(use, Product) for use in uses):
            return Weight(name, numbers, first)
        if all(isinstance(use, Lookup) for use in uses):
            return Table(name, numbers, first)
        if len(uses) == 1:
            return Whole(name, numbers, first, {}, first.flatten())
    whole = max((at[number] for number in numbers), key=Tensor.numel)
    if whole.numel() > DENSE and _is_tied(uses, [at[number] for number in numbers]):
        return Tied(name, numbers, whole)
    union = torch.cat([at[number].flatten() for number in numbers]).unique()
    blocks = {block: sizes[block] for block in sizes if any(block in use.blocks for use in uses)}
    joined = torch.cat([torch.arange(size) + starts[block] for block, size in blocks.items()])
    return Whole(name, numbers, union[None, None], blocks, torch.searchsorted(joined, union))


def _is_tied(uses: Sequence[Piece], at: list[Tensor]) -> bool:
    """Whether one weight is multiplied with and looked up, whole each time; a product may have a bias beside it."""
    products = [places for use, places in zip(uses, at, strict=True) if isinstance(use, Product)]
    lookups = [places for use, places in zip(uses, at, strict=True) if isinstance(use, Lookup)]
    if not products or len(products) + len(lookups) < len(uses):
        return False
    whole = products[0]
    return all(torch.equal(places, whole) for places in products) and all(
        torch.equal(places, whole[:, :, : places.shape[2]]) for places in lookups
    )


def _starts(sizes: dict[str, int]) -> dict[str, int]:
    """Where every block begins in flat θ."""
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name], total = total, total + size
    return starts


def _places(piece: Piece, starts: dict[str, int]) -> Int[Tensor, "g o i"]:
    """The place in flat θ of every entry of a piece's matrices."""
    start = starts[piece.block]
    if isinstance(piece, Lookup):
        return (start + torch.arange(piece.shape[0] * piece.shape[1])).reshape(1, *piece.shape)
    if isinstance(piece, Direct):
        inside = torch.arange(piece.values.shape[2]) if piece.where is None else piece.where.cpu()
        return (start + inside)[None, None]
    g, o, i = piece.sizes
    inside = torch.arange(g * o * i) if piece.where is None else piece.where.cpu()
    weight = (start + inside).reshape(g, o, i)
    if piece.bias is None:
        return weight
    return torch.cat([weight, (starts[piece.bias] + torch.arange(g * o)).reshape(g, o, 1)], 2)
