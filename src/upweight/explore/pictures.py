"""Cards that are pictures, as PNG: encoded again from their pixels, so that no file of anybody reaches the browser."""

from __future__ import annotations

import numpy as np

from upweight.explore.explorer import Explorer, Side
from upweight.show.png import png

MOST_PIXELS = 2**20  # of a picture that is shown


def png_of(explorer: Explorer, side: Side, number: int) -> bytes | None:
    """The picture of a row or query; None where it has none, or one too large."""
    card = explorer.cards(side, [number]).get(number)
    if not isinstance(card, np.ndarray) or card.shape[0] * card.shape[1] > MOST_PIXELS:
        return None
    return png(card, 1)
