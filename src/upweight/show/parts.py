"""Which parts of a row matter to a query, as a run folder keeps them for the rows that lead: `write_run(…, parts=4)`.

    parts.safetensors   pairs (m, 2) of a query and a row, kinds (m,), shapes (m, 2), scales (m,), and what is told of
                        each as bytes, content, cut at ends

A value is in units of the query's loss, and + helps: of a token what it accounts for of the row's value; of a word, a
column or a pixel the predicted change of the query's loss if that part of the row were as in the mean of the rows
(a word: if it were left out), by equation 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import Damaged, first_line
from upweight.runs.store import SUFFIX, read_part, work_of
from upweight.show.run import Run

PARTS = "parts"
WORDS, COLUMNS, PIXELS, TOKENS = range(4)  # kinds
MOST = 2**26  # bytes of a run's parts
FEW = 64  # columns or words of a row that are kept, those of the largest values
LONGEST = 512  # tokens of a text that are kept
SIDE = 96  # pixels of a picture's side
_NAME = 200  # characters of a name
_LEVELS = 127


@dataclass(frozen=True)
class Parts:
    """The parts of one row, for one query.

    Args:
        kind: WORDS, COLUMNS, PIXELS or TOKENS.
        names: of words, columns or tokens; tokens in the order of the text.
        values: (k,) or, of pixels, (height, width); NaN for a token that is not counted.
        query_names, query_values: the tokens of the query, and what the whole row does to each.
    """

    kind: int
    names: list[str]
    values: NDArray[np.float64]
    query_names: list[str]
    query_values: NDArray[np.float64]


@dataclass(frozen=True)
class Packed:
    """The parts of one row as a file holds them."""

    kind: int
    shape: tuple[int, int]
    scale: float
    content: bytes


def of_columns(kind: int, names: Sequence[str], values: NDArray[np.float64]) -> Packed:
    """Words or columns: those of the largest values."""
    known = np.flatnonzero(np.isfinite(values) & (values != 0))
    chosen = known[np.argsort(-np.abs(values[known]), kind="stable")][:FEW]
    told = {"names": [names[j][:_NAME] for j in chosen.tolist()], "values": _short(values[chosen])}
    return Packed(kind, (0, 0), 0.0, json.dumps(told).encode())


def of_pixels(values: NDArray[np.float64]) -> Packed:
    """A picture of values, in 255 levels; of many pixels sums over blocks of them."""
    step = max(1, -(-max(values.shape) // SIDE))
    edges = [np.arange(0, size, step) for size in values.shape]
    few = np.add.reduceat(np.add.reduceat(np.nan_to_num(values), edges[0], 0), edges[1], 1)
    scale = float(np.abs(few).max()) / _LEVELS
    levels = np.round(few / scale).astype(np.int8) if scale else np.zeros(few.shape, np.int8)
    return Packed(PIXELS, (few.shape[0], few.shape[1]), scale, levels.tobytes())


def of_tokens(row: tuple[list[str], NDArray[np.float64]], query: tuple[list[str], NDArray[np.float64]]) -> Packed:
    """The tokens of a row and of a query; the first of many."""
    told: dict[str, Any] = {}
    for prefix, (names, values) in (("", row), ("query_", query)):
        told[f"{prefix}names"] = [name[:_NAME] for name in names[:LONGEST]]
        told[f"{prefix}values"] = _short(values[:LONGEST])
    return Packed(TOKENS, (0, 0), 0.0, json.dumps(told).encode())


def unpacked(kind: int, shape: Sequence[int], scale: float, content: bytes) -> Parts:
    """What a file holds of one row; parts that are none are an error of NumPy's or of JSON's."""
    none = np.zeros(0)
    if kind == PIXELS:
        levels = np.frombuffer(content, dtype=np.int8).reshape(int(shape[0]), int(shape[1]))
        return Parts(kind, [], levels.astype(np.float64) * scale, [], none)
    told = json.loads(content)
    sides = [
        ([str(name) for name in told.get(f"{prefix}names", [])], _long(told.get(f"{prefix}values", [])))
        for prefix in ("", "query_")
    ]
    return Parts(kind, *sides[0], *sides[1])


def arrays_of(found: Mapping[tuple[int, int], Packed]) -> dict[str, NDArray[Any]]:
    """What a file holds, by query and row."""
    each = list(found.values())
    return {
        "pairs": np.array(list(found), dtype=np.int64).reshape(-1, 2),
        "kinds": np.array([one.kind for one in each], dtype=np.uint8),
        "shapes": np.array([one.shape for one in each], dtype=np.int64).reshape(-1, 2),
        "scales": np.array([one.scale for one in each], dtype=np.float64),
        "content": np.frombuffer(b"".join(one.content for one in each), dtype=np.uint8),
        "ends": np.cumsum([len(one.content) for one in each], dtype=np.int64),
    }


def packed_in(run: Run) -> dict[tuple[int, int], Packed]:
    """The parts that a run keeps, by query and row; none where it keeps none.

    Raises:
        Damaged: if the file is, or holds something else.
    """
    file = run.path / f"{PARTS}{SUFFIX}"
    if not file.is_file():
        return {}
    arrays, _ = read_part(file, work_of(run.manifest))
    try:
        blob, ends = arrays["content"].tobytes(), arrays["ends"].tolist()
        starts = [0, *ends]
        return {
            (int(query), int(row)): Packed(
                int(arrays["kinds"][place]),
                (int(arrays["shapes"][place][0]), int(arrays["shapes"][place][1])),
                float(arrays["scales"][place]),
                blob[starts[place] : ends[place]],
            )
            for place, (query, row) in enumerate(arrays["pairs"].tolist())
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        message = f"{file} holds no parts of rows ({first_line(error)}). Delete it, and make the same call again."
        raise Damaged(message) from error


def parts(run: Run, query: int, row: int) -> Parts | None:
    """The parts of a row that matter to a query; None where the run keeps none.

    Raises:
        Damaged: if the file is, or holds something else.
    """
    found = packed_in(run).get((query, row))
    return None if found is None else unpacked(found.kind, found.shape, found.scale, found.content)


def _short(values: NDArray[np.float64]) -> list[float | None]:
    """Values to four digits; none where there is none."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def _long(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
