"""Pictures as PNG inside a page: no library, for a PNG of bytes is their zlib stream behind a head."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def small(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The picture with at most `side` pixels on its longer side: every k-th of them."""
    step = max(1, -(-max(picture.shape[:2]) // side))
    return np.ascontiguousarray(picture[::step, ::step])


def png(picture: NDArray[np.uint8], effort: int = 9) -> bytes:
    """The PNG of a picture (H, W), grey, or (H, W, 3), red, green and blue; 1 packs fast, 9 small."""
    height, width = picture.shape[:2]
    colour = 0 if picture.ndim == 2 else 2
    lines = np.ascontiguousarray(picture, dtype=np.uint8).reshape(height, -1)
    raw = np.concatenate([np.zeros((height, 1), dtype=np.uint8), lines], 1).tobytes()  # each line: filter 0, pixels
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, effort)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def address(picture: NDArray[np.uint8]) -> str:
    """The PNG as an address of the kind `data:`."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
