"""A curvature whose blocks are dealt out to ranks: the bits of one process, in a part of its memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ranks import launch
from upweight.model.chunks import ends_of, split
from upweight.operators.held import _filled, shared_out


def ended(size: int, folder: Path, *scenarios: str) -> launch.Ended:
    return launch.launched(size, ["-m", "ranks.blocks", str(folder), *scenarios])


def same(folder: Path, size: int) -> None:
    alone = np.load(folder / "alone.npz")
    for rank in range(size):
        found = np.load(folder / f"rank-{rank}.npz")
        assert [name for name in alone if found[name].tobytes() != alone[name].tobytes()] == []
        assert len(found.files) == len(alone.files) == 16


def numbers(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def holds_a_part(folder: Path, size: int) -> None:
    """Each block is on one rank; what that holds, and adds to, is a part, and a block of others' at a time is more."""
    alone = numbers(folder, "alone")
    each = [numbers(folder, f"rank-{rank}") for rank in range(size)]
    largest = max(alone["blocks"].values())
    assert {name: held for one in each for name, held in one["blocks"].items()} == alone["blocks"]
    assert sum(one["held"] for one in each) == alone["held"] == sum(alone["blocks"].values())
    assert max(one["held"] for one in each) <= alone["held"] / size + largest
    assert max(one["held"] for one in each) < 0.7 * alone["held"]
    assert max(one["sums"] for one in each) < 0.7 * alone["sums"]
    assert alone["brought"] == 0
    assert 0 < max(one["brought"] for one in each) <= largest


def test_two_ranks_share_the_blocks_and_each_holds_its_own(tmp_path):
    done = ended(2, tmp_path, "alone", "together", "killed")
    same(tmp_path, 2)
    holds_a_part(tmp_path, 2)
    assert done.codes == [1, -9], done.said
    assert re.search(r"rank 1 \(process \d+ on .*it was last at: Kronecker factors of 4,196 rows", done.said[0])
    assert "at Kronecker factors of 4,196 rows" in done.said[0]


@pytest.mark.slow
def test_three_ranks_and_one_that_goes_on_alone(tmp_path):
    done = ended(3, tmp_path, "alone", "together", "again")
    assert done.codes == [0, 0, 0], done.said
    same(tmp_path, 3)
    holds_a_part(tmp_path, 3)
    alone = np.load(tmp_path / "alone.npz")["removal"]
    assert [np.load(tmp_path / f"again-{rank}.npy").tobytes() == alone.tobytes() for rank in range(3)] == [True] * 3
    (tmp_path / "lost").mkdir()
    lost = ended(2, tmp_path / "lost", "killed")
    assert lost.seconds < 60
    assert ended(1, tmp_path / "lost", "again").codes == [0]
    assert np.load(tmp_path / "lost" / "again-0.npy").tobytes() == alone.tobytes()


def test_blocks_are_dealt_out_in_their_order_and_the_largest_share_is_small():
    assert shared_out([5, 1, 1, 1, 5, 1], 3) == [0, 0, 1, 1, 2, 2]  # 6, 2 and 6 of 14
    assert shared_out([1, 9, 1], 2) == [0, 0, 1]
    assert shared_out([4], 3) == [0]
    draw = np.random.default_rng(0)
    for _ in range(30):
        sizes, among = draw.integers(1, 50, size=draw.integers(1, 9)).tolist(), int(draw.integers(1, 5))
        found = shared_out(sizes, among)
        assert found == sorted(found)
        assert max(found) < among
        assert _largest(sizes, found) == min(_largest(sizes, each) for each in _every(len(sizes), among))


def _largest(sizes, owners):
    return max(sum(size for size, owner in zip(sizes, owners, strict=True) if owner == one) for one in set(owners))


def _every(blocks, among):
    """All ways to cut so many blocks into consecutive shares."""
    if blocks == 1:
        return [[0]]
    return [[*one, owner] for one in _every(blocks - 1, among) for owner in (one[-1], one[-1] + 1) if owner < among]


def test_blocks_for_which_there_is_room_come_together():
    assert _filled([3, 3, 3, 9, 1], 6) == [0, 0, 1, 2, 3]
    assert _filled([3, 3], 0) == [0, 1]


def test_numbers_of_several_things_lie_in_the_order_of_their_owners():
    shapes = [[[2, 2], [3]], [[]], [[5]]]
    assert ends_of(shapes, [0, 0, 2], 3) == [0, 8, 8, 13]
    first, second, third = split(torch.arange(8.0), shapes, [True, True, False])
    assert torch.equal(first[0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(first[1], torch.tensor([4.0, 5.0, 6.0]))
    assert second[0].shape == ()
    assert float(second[0]) == 7
    assert third is None
