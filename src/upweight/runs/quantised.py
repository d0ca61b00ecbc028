"""Rows of numbers in few bits: blocks of 64 with a scale of their own, two 4-bit numbers a byte.

A block is rounded to −7 … 7 (4 bits) or −127 … 127 (8 bits) times its scale, max|x| over the largest of them. What is
lost is random from number to number, so that it averages out in products of long rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

BLOCK = 64
BITS = (4, 8)


def packed(
    X: Float[NDArray[np.float32], "b k"], bits: int
) -> tuple[UInt8[NDArray[np.uint8], "b bytes"], Float[NDArray[np.float32], "b blocks"]]:
    """Codes and scales."""
    b, k = X.shape
    most = 2 ** (bits - 1) - 1
    blocks = np.pad(X, ((0, 0), (0, -k % BLOCK))).reshape(b, -1, BLOCK)
    scales = (np.abs(blocks).max(2) / most).astype(np.float32)
    rounded = np.rint(blocks / np.where(scales > 0, scales, 1)[:, :, None]).reshape(b, -1)
    codes = (rounded + most).astype(np.uint8)
    if bits == 4:
        codes = codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
    return codes, scales


def unpacked(
    codes: UInt8[NDArray[np.uint8], "b bytes"], scales: Float[NDArray[np.float32], "b blocks"], bits: int, k: int
) -> Float[NDArray[np.float32], "b k"]:
    """The numbers, as they were rounded."""
    most = 2 ** (bits - 1) - 1
    single: NDArray[Any] = codes if bits == 8 else np.stack([codes & 15, codes >> 4], 2).reshape(len(codes), -1)
    blocks = single.reshape(len(codes), -1, BLOCK).astype(np.float32) - most
    return (blocks * scales[:, :, None]).reshape(len(codes), -1)[:, :k]
