"""Numbers in few bits: within half a step of themselves, and random enough to average out."""

from __future__ import annotations

import numpy as np
import pytest

from upweight.runs.quantised import BLOCK, packed, unpacked


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 63, 64, 200])
def test_every_number_is_within_half_a_step_of_its_block(bits, k):
    X = np.random.default_rng(0).normal(size=(3, k)).astype(np.float32) * 10.0 ** np.arange(-8, 1, 4)[:, None]
    X = X.astype(np.float32)
    X[0, :1] = 0
    codes, scales = packed(X, bits)
    again = unpacked(codes, scales, bits, k)
    assert codes.nbytes == 3 * -(-k // BLOCK) * BLOCK * bits // 8
    steps = np.repeat(scales, BLOCK, 1)[:, :k]
    assert (np.abs(again - X) <= 0.5001 * steps).all()
    assert np.abs(again).max() == np.abs(X).max()  # the largest of a block is kept


def test_a_block_of_zeros_stays_zero():
    codes, scales = packed(np.zeros((2, 70), np.float32), 4)
    assert not unpacked(codes, scales, 4, 70).any()


def test_products_of_long_rows_lose_little():
    X = np.random.default_rng(1).normal(size=(2, 20_000)).astype(np.float32)
    X[1] = 0.3 * X[0] + X[1]
    again = unpacked(*packed(X, 4), 4, X.shape[1])
    assert again[0] @ X[1] == pytest.approx(X[0] @ X[1], rel=0.01)
