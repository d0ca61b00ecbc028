"""The parts of a row that matter to a query, as pages tell them: coloured words and tokens, columns, a picture."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.explore.cards import EXCERPT
from upweight.explore.explorer import Explorer
from upweight.show.parts import COLUMNS, PIXELS, TOKENS, Parts
from upweight.show.png import png
from upweight.show.run import Card

FEW, STRONGEST = 8, 4  # columns in a table, and words in a sentence
SHOWN = 240  # tokens of a text
_WORDS = re.compile(r"\w+|\W+")
_BLUE, _ORANGE = np.array([21.0, 92.0, 148.0]), np.array([205.0, 82.0, 12.0])


def parted(found: Parts, card: Card, address: str) -> dict[str, Any]:
    """The parts of a row, as templates and twins tell them.

    Args:
        found: the parts.
        card: what the row looks like.
        address: of their picture.
    """
    known = found.values[np.isfinite(found.values)]
    told = {"total": float(known.sum()), "largest": float(np.abs(known).max()) if known.size else 0.0}
    if found.kind == PIXELS:
        height, width = found.values.shape
        return {"kind": "pixels", "address": address, "height": height, "width": width, **told}
    order = np.argsort(-np.nan_to_num(np.abs(found.values)), kind="stable")
    lines = [{"name": found.names[j], "value": float(found.values[j])} for j in order.tolist() if found.values[j]]
    lines = [line for line in lines if line["value"] == line["value"]]
    if found.kind == TOKENS:
        told |= {"pieces": _tokens(found.names, found.values), "query": _tokens(found.query_names, found.query_values)}
        return {"kind": "tokens", "lines": lines[:STRONGEST], "cut": len(found.names) > SHOWN, **told}
    if found.kind == COLUMNS or not isinstance(card, str):
        return {"kind": "columns", "lines": lines[:FEW], "rest": max(0, len(lines) - FEW), **told}
    values = dict(zip(found.names, found.values.tolist(), strict=True))
    return {"kind": "words", "pieces": _words(card, values), "lines": lines[:STRONGEST], "cut": _cut(card), **told}


def _tokens(names: list[str], values: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The first tokens of a text with their values; None for those that are not counted."""
    spaced = any(name[:1].isspace() for name in names)
    return [
        {"text": name if spaced else f"{name} ", "value": None if np.isnan(value) else float(value)}
        for name, value in zip(names[:SHOWN], values[:SHOWN].tolist(), strict=True)
    ]


def _words(text: str, values: dict[str, float]) -> list[dict[str, Any]]:
    """The beginning of a text in pieces: words that are columns with their values, and what stands between."""
    pieces: list[dict[str, Any]] = []
    for piece in _WORDS.findall(text[:EXCERPT]):
        value = values.get(piece, values.get(piece.lower()))
        if value is None and pieces and pieces[-1]["value"] is None:
            pieces[-1]["text"] += piece
        else:
            pieces.append({"text": piece, "value": value})
    return pieces


def _cut(text: str) -> bool:
    return len(text) > EXCERPT


def overlay(explorer: Explorer, query: int, row: int) -> bytes | None:
    """The row's picture, paler, under the pixels that matter: blue where they help, orange where they harm; as PNG.

    None where there are no such parts.
    """
    found = explorer.parts(query, [row]).get(row)
    if found is None or found.kind != PIXELS:
        return None
    values, card = found.values, explorer.cards("rows", [row]).get(row)
    below = np.full(values.shape, 255.0)
    if isinstance(card, np.ndarray):
        grey = card.astype(np.float64) if card.ndim == 2 else card.astype(np.float64).mean(2)
        lines, columns = (np.arange(size) * other // size for size, other in zip(values.shape, grey.shape, strict=True))
        below = 127.5 + grey[np.ix_(lines, columns)] / 2
    largest = float(np.abs(values).max()) or 1.0
    strength = (np.abs(values) / largest)[..., None] ** 0.7
    colour = np.where(values[..., None] > 0, _BLUE, _ORANGE)
    return png(np.round(below[..., None] * (1 - strength) + colour * strength).astype(np.uint8), 1)
