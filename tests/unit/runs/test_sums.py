"""The tree of sums: its shape is that of the number of chunks, whoever adds which part of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, strategies as st

from upweight.runs.sums import Sums, subtrees


def by_halves(values, start, level):
    """The node of `level` over values[start:], by its definition."""
    if start >= len(values):
        return None
    if level == 0:
        return values[start]
    left, right = (by_halves(values, start + half * 2 ** (level - 1), level - 1) for half in (0, 1))
    return left if right is None else left + right


def chunks(count):
    return np.random.default_rng(count).normal(size=(count, 2)) * 10.0 ** np.arange(-8, 8)[np.arange(count) % 16, None]


def added(sums, values, numbers):
    for number in numbers:
        sums.add(number, torch.tensor(values[number]))
    return sums


@given(st.integers(1, 200))
def test_the_total_is_the_tree_over_the_numbers(count):
    values = chunks(count)
    found = added(Sums(), values, range(count))
    assert len(found.nodes) == count.bit_count()
    assert np.array_equal(found.total().numpy(), by_halves(values, 0, 8))


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=4))
def test_parts_that_others_added_come_to_the_same_bits(count, cuts):
    values, ends = chunks(count), [0, *sorted(min(cut, count) for cut in cuts), count]
    whole = Sums()
    for start, stop in pairwise(ends):
        part = added(Sums(), values, range(start, stop))
        assert [node[:2] for node in part.nodes] == subtrees(range(start, stop))
        assert len(part.nodes) <= 2 * max(1, (stop - start).bit_length())
        for level, place, value in part.nodes:
            whole.add(place, value, level)
    assert np.array_equal(whole.total().numpy(), added(Sums(), values, range(count)).total().numpy())
