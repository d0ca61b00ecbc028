"""The order in which the sums of chunks are added: a binary tree over their numbers, whoever computes which of them.

Chunk i is the leaf (0, i), and the node (level, j) is the sum of (level − 1, 2j) and (level − 1, 2j + 1). Its shape
follows from the number of chunks alone, so that a sum comes to the same bits in one process and in several, of which
each adds the complete subtrees among its own chunks. Rounding grows with the logarithm of the number of chunks.
Memory: a sum for every 1 in the binary digits of what was added so far, log₂(chunks) + 1 at most.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Sums:
    """The sums of some chunks, given in the order of their numbers, as far as they can be added already."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, Tensor]] = []  # level, place, sum

    def add(self, place: int, value: Tensor, level: int = 0) -> None:
        """Take the sum of a chunk, or of a complete subtree; it is added to, in place."""
        while place % 2 and self.nodes and self.nodes[-1][:2] == (level, place - 1):
            value = self.nodes.pop()[2].add_(value)
            level, place = level + 1, place // 2
        self.nodes.append((level, place, value))

    def total(self) -> Tensor:
        """The sum of all chunks, after the last of them; the tree's right edge is what is added here."""
        (*_, (_, _, value)) = self.nodes
        for _, _, left in reversed(self.nodes[:-1]):
            value = left.add_(value)
        return value


def subtrees(chunks: Iterable[int]) -> list[tuple[int, int]]:
    """(level, place) of the nodes that remain of some consecutive chunks when all that can be added is."""
    nodes: list[tuple[int, int]] = []
    for number in chunks:
        level, place = 0, number
        while place % 2 and nodes and nodes[-1] == (level, place - 1):
            nodes.pop()
            level, place = level + 1, place // 2
        nodes.append((level, place))
    return nodes
