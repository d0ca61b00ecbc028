"""Pieces that the first sweep of EKFAC captures for the second, which needs no forward pass for them.

Both sweeps go over the same rows; where the draws of the second do not depend on what the first finds, its output
gradients can be taken from the same forward pass. They are kept for the first rows, as many as there is room for. Which
rows these are depends on neither how they are batched nor how many processes share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from upweight.model.layers.convolution import Convolution, Seen
from upweight.model.layers.pieces import Direct, Product
from upweight.operators.cotangents import Signs, Source

ROOM = 2**31  # bytes of pieces, and of the factors beside them


@dataclass
class Ahead:
    """What the second sweep will ask for.

    Args:
        source: whose output gradients the second sweep takes.
        rows: those with smaller numbers are kept.
        kept: the pieces of batches, by their first row and their length.
    """

    source: Source
    rows: int = 0
    kept: dict[tuple[int, int], list[Seen]] = field(default_factory=dict)

    def make_room(self, first: Sequence[Seen], each: int, room: int) -> None:
        """Finds for how many rows there is room, from the pieces of a few losses; others have `each` cotangents."""
        multiplied = [
            piece.images if isinstance(piece, Convolution) else piece.inputs
            for piece in first
            if isinstance(piece, Product | Convolution)
        ]
        inputs = {x.untyped_storage().data_ptr(): x for x in multiplied}
        slopes = [piece.values if isinstance(piece, Direct) else piece.slopes for piece in first]
        examples = first[0].examples if isinstance(first[0], Convolution) else slopes[0].shape[1]
        size = sum(x.numel() * x.element_size() for x in [*inputs.values(), *each * slopes]) // examples
        self.rows = max(0, room) // max(1, size)

    def sources(self, source: Source, numbers: Sequence[int]) -> list[Source]:
        """Whose output gradients the first sweep asks for at some rows."""
        return [source, self.source] if self._holds(numbers) and isinstance(source, Signs) else [source]

    def keep(self, pieces: list[Seen], numbers: Sequence[int]) -> None:
        """Keeps the pieces of a batch, if there is room for its rows."""
        if self._holds(numbers):
            self.kept[int(numbers[0]), len(numbers)] = pieces

    def take(self, numbers: Sequence[int]) -> list[Seen] | None:
        """The pieces of a batch, which are kept no longer; None where they were not."""
        return self.kept.pop((int(numbers[0]), len(numbers)), None)

    def _holds(self, numbers: Sequence[int]) -> bool:
        return int(numbers[-1]) < self.rows
