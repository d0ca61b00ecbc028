"""Two runs of the same rows and queries beside each other: do they name the same rows?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from upweight.errors import InvalidInput
from upweight.explore.explorer import Explorer
from upweight.explore.leading import largest
from upweight.runs.files import write_file

_FEW = 20  # rows of either kind whose overlap is told


def together(path: Path, other: Path | None = None, *, progress: bool | None = None) -> Explorer:
    """The explorer of a run, with another run beside it if one is named.

    Raises:
        InvalidInput: if they are not of the same rows and queries.
    """
    beside = None if other is None else Explorer.open(other, progress=progress)
    found = Explorer.open(path, beside, progress=progress)
    if beside is not None:
        compared(found, beside, progress=progress)
    return found


def compared(explorer: Explorer, other: Explorer, *, progress: bool | None = None) -> list[dict[str, Any]]:
    """For every query, how alike the two runs' values are; computed once and kept in the index.

    Raises:
        InvalidInput: if they are not of the same rows and queries.
    """
    refuse_others(explorer, other)
    file = explorer.folder / f"compared-{other.work}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    hidden = not sys.stderr.isatty() if progress is None else not progress
    queries = tqdm(range(explorer.q), desc="comparing the runs", leave=False, disable=hidden)
    found = [alike(query, explorer.line(query), other.line(query)) for query in queries]
    write_file(file, json.dumps(found).encode())
    return found


def alike(query: int, here: NDArray[np.float64], there: NDArray[np.float64]) -> dict[str, Any]:
    """Pearson's r of a query's values, their slope, and the shares of the leading rows that both name.

    A share is None where no row of either run leads on that side.
    """
    k = min(_FEW, len(here))
    a, b = here - here.mean(), there - there.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    shares = [
        len(np.intersect1d(one, two)) / most if (most := max(len(one), len(two))) else None
        for one, two in zip(largest(here, k), largest(there, k), strict=True)
    ]
    known = np.isfinite(size) and size > 0
    return {
        "query": query,
        "pearson": float(a @ b) / size if known else None,
        "slope": float(a @ b) / float(a @ a) if known else None,
        "helpful": shares[0],
        "harmful": shares[1],
    }


def movers(here: NDArray[np.float64], there: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The k rows whose values differ most, the largest difference first."""
    keys = -np.abs(np.nan_to_num(there - here))
    few = np.argpartition(keys, k - 1)[:k] if k < len(keys) else np.arange(len(keys))
    return few[np.lexsort((few, keys[few]))]


def refuse_others(explorer: Explorer, other: Explorer) -> None:
    """Raises for runs that are not of the same rows and queries.

    Raises:
        InvalidInput: then.
    """
    mine, theirs = (one.run.manifest["fingerprint"] for one in (explorer, other))
    apart = [name for name in ("data", "queries", "n") if mine.get(name) != theirs.get(name)]
    if apart:
        message = (
            f"{other.run.path} is not of the same rows and queries as {explorer.run.path}: their {', '.join(apart)} "
            f"differ ({explorer.n:,} rows × {explorer.q:,} queries here, {other.n:,} × {other.q:,} there). Compare two "
            "runs that write_run made of the same data and queries, such as two curvatures."
        )
        raise InvalidInput(message)
